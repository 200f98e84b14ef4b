"""The first region: tokens, and learned positions, to the residual stream.

`models/transformer.py` builds it. It must never know about blocks or batches.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from penstock.models.architecture import Architecture
from penstock.models.layers import dropout
from penstock.models.norm import Norm


class Embed(nn.Module):
    """Token embeddings, plus those of learned positions, normalized and projected in families
    that do so (BERT, Devlin et al., arXiv 1810.04805, §3; ALBERT, Lan et al., arXiv 1909.11942,
    §3.1).
    """

    def __init__(self, architecture: Architecture) -> None:
        """Parameters: tokens (Vpadded, E), positions (P, E) where they are learned, token_types
        (N, E), norm, projection (D, E) with its bias, where there are any.
        """
        super().__init__()
        a, width = architecture, architecture.embedding_width
        self.rate = a.embedding_rate
        self.offset = a.position_offset
        self.tokens = _table(a.padded_vocab_size, width)
        rows = a.max_positions + a.position_offset
        self.positions = _table(rows, width) if a.positions == "learned" else None
        self.token_types = _table(a.token_types, width) if a.token_types else None
        self.norm = Norm(a, width) if a.embedding_norm else None
        self.projection = None if a.embedding_size is None else nn.Linear(width, a.hidden_size)

    def forward(
        self,
        tokens: Int[Tensor, "B T"],
        keys: Int[Tensor, "B 1"] | None = None,
        positions: Int[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Tokens (B, T) int64 → (B, T, D); keys (B, 1) int64 drop from the sum; positions (B, T)
        int64, one after the other from 0 when not given.
        """
        x = self.tokens(tokens)
        if self.positions is not None:
            if positions is None:
                x = x + self.positions.weight[self.offset : self.offset + tokens.shape[1]]
            else:
                x = x + self.positions(positions + self.offset if self.offset else positions)
        if self.token_types is not None:
            x = x + self.token_types.weight[0]
        x = x if self.norm is None else self.norm(x)
        x = x if keys is None else dropout(x, keys[:, 0], self.rate)
        return x if self.projection is None else self.projection(x)


def _table(rows: int, width: int) -> nn.Embedding:
    # Uniform: on the meta device, torch 2.13 loads 800 modules (60 MiB) to draw normal numbers.
    return nn.Embedding.from_pretrained(torch.empty(rows, width).uniform_(-1, 1), freeze=False)
