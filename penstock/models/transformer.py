"""The transformer: Embed, Blocks, Head, as plain modules.

Compiled and eager training, evaluation and generation all run this one model; the compiler may
replace the three regions' `forward`. It must never know about optimizers, devices or files.

Letters: B batch, T positions, D hidden, H heads, K kv heads, S head size, F mlp, V vocabulary,
P rotated pairs, E embedding width (D but in ALBERT).
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from penstock.models.architecture import Architecture
from penstock.models.attention import Attention
from penstock.models.embedding import Embed
from penstock.models.head import Head
from penstock.models.layers import dropout, dropout_keys
from penstock.models.mlp import Mlp
from penstock.models.norm import Norm
from penstock.models.rotary import positions_within, rotation


class Block(nn.Module):
    """Attention and MLP, added to the residual stream one after the other (GPT-2, §2.3) or both
    at once (GPT-J; Wang & Komatsuzaki, 2021); norms stand before them, or after each sum (BERT).
    """

    def __init__(self, architecture: Architecture) -> None:
        """One layer's parameters."""
        super().__init__()
        self.rate = architecture.dropout
        self.normalizes_sums = architecture.norm_position == "after"
        self.is_parallel = architecture.residual != "sequential"
        has_one_norm = architecture.residual == "parallel_one_norm"
        self.attention_norm = Norm(architecture)
        self.attention = Attention(architecture)
        self.mlp_norm = None if has_one_norm else Norm(architecture)
        self.mlp = Mlp(architecture)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        keys: Int[Tensor, "B sites"] | None = None,
        turns: Float[Tensor, "2 #B 1 T P"] | None = None,
        segments: Int[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """X (B, T, D) → (B, T, D); keys (B, sites) int64: probabilities, attention, MLP
        dropout, then the adapters'; turns (2, B or 1, 1, T, P) float32: see `models/rotary.py`;
        segments (B, T) int64: see `Attention.forward`.
        """
        normalized = x if self.normalizes_sums else self.attention_norm(x)
        attended = x + self.attention(normalized, keys, turns, segments)
        if self.normalizes_sums:
            attended = self.attention_norm(attended)
        update = self._mlp_update(x, normalized, attended, keys)
        update = update if keys is None else dropout(update, keys[:, 2], self.rate)
        if self.normalizes_sums and self.mlp_norm is not None:
            return self.mlp_norm(attended + update)
        return attended + update

    def decode(
        self,
        x: Float[Tensor, "B T D"],
        cache_keys: Float[Tensor, "B K L S"],
        cache_values: Float[Tensor, "B K L S"],
        mask: Bool[Tensor, "B 1 T L+T"],
        turns: Float[Tensor, "2 B 1 T P"] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B K T S"], Float[Tensor, "B K T S"]]:
        """The same for new positions after cached ones, in causal models; see
        `Attention.decode`.
        """
        normalized = self.attention_norm(x)
        update, key, value = self.attention.decode(
            normalized, cache_keys, cache_values, mask, turns
        )
        attended = x + update
        return attended + self._mlp_update(x, normalized, attended), key, value

    def _mlp_update(
        self,
        x: Float[Tensor, "B T D"],
        normalized: Float[Tensor, "B T D"],
        attended: Float[Tensor, "B T D"],
        keys: Int[Tensor, "B sites"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """What the MLP adds (B, T, D): from x, x behind attention's norm, or x and attention."""
        if self.normalizes_sums:
            return self.mlp(attended, keys)
        if self.mlp_norm is None:
            return self.mlp(normalized, keys)
        return self.mlp(self.mlp_norm(x if self.is_parallel else attended), keys)


class Transformer(nn.Module):
    """`embed`, `blocks`, `head`."""

    def __init__(self, architecture: Architecture) -> None:
        """Build with torch's default values; see `models/initialization.py`."""
        super().__init__()
        self.architecture = architecture
        self.embed = Embed(architecture)
        count = architecture.distinct_blocks(architecture.layers)
        blocks = [Block(architecture) for _ in range(count)]
        # Shared layers: one block, as often as there are layers; its parameters have one name.
        self.blocks = nn.ModuleList(blocks * (architecture.layers // count))
        self.head = Head(architecture)
        if architecture.tie_embeddings:
            self.head.projection.weight = self.embed.tokens.weight

    def forward(
        self,
        tokens: Int[Tensor, "B T"],
        targets: Int[Tensor, "B T"] | None = None,
        loss_weights: Float[Tensor, "B T"] | None = None,
        keys: Sequence[Tensor] | None = None,
        z_loss: Float[Tensor, ""] | None = None,
        segments: Int[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T V"] | Float[Tensor, ""]:
        """Logits (B, T, V), or with targets the weighted loss () float32.

        tokens, targets (B, T) int64; loss_weights (B, T) float32, all 1 when not given; keys:
        dropout keys (B, 1) of the embedding, then (B, sites) of each block, or None for no dropout;
        segments (B, T) int64: positions are counted within each run of equal numbers, and see
        only those of their own number. Padding has a number of its own.
        """
        x = self.hidden(tokens, segments, keys)
        if targets is None:
            return self.head.logits(x)
        if loss_weights is None:
            loss_weights = torch.ones_like(targets, dtype=torch.float32)
        return self.head(x, targets, loss_weights, z_loss)

    def dropout_keys(
        self, seed: int, step: int, sequences: Int[Tensor, " B"]
    ) -> list[Tensor] | None:
        """Keys for `forward`, int64: (B, 1) for the embedding, (B, sites) per block; None
        without dropout. A pure function of seed, step, each sequence's place in the step's global
        batch (B,) int64, layer and site, so that any split of the batch drops the same elements.
        """
        if not self.architecture.has_dropout:
            return None
        sites = self.architecture.dropout_sites
        keys = [dropout_keys(seed, step, sequences, -1, 1)]
        layers = range(len(self.blocks))
        return keys + [dropout_keys(seed, step, sequences, i, sites) for i in layers]

    @torch.no_grad()
    def token_losses(
        self,
        tokens: Int[Tensor, "B T"],
        targets: Int[Tensor, "B T"],
        segments: Int[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T"]:
        """Negative log-likelihood of each target in nats, (B, T) float32."""
        return self.head.token_losses(self.hidden(tokens, segments), targets)

    def hidden(
        self,
        tokens: Int[Tensor, "B T"],
        segments: Int[Tensor, "B T"] | None = None,
        keys: Sequence[Tensor] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """The residual stream after the last block, (B, T, D); see `forward`."""
        if segments is None and not self.architecture.is_causal:
            segments = torch.zeros_like(tokens)  # so that there is one kind of kernel
        positions = None if segments is None else positions_within(segments)
        learned = None if self.embed.positions is None else positions
        x = self.embed(tokens, None if keys is None else keys[0], learned)
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=x.device)[None]
        turns = rotation(self.architecture, positions)
        for index, block in enumerate(self.blocks):
            x = block(x, None if keys is None else keys[index + 1], turns, segments)
        return x
