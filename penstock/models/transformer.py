"""The transformer: Embed, Blocks, Head, as plain modules.

Compiled and eager training, evaluation and generation all run this one model; the compiler may
replace the three regions' `forward`. It must never know about optimizers, devices or files.

Tensor letters: B batch, T positions, D hidden, H heads, S head size, F mlp, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from penstock.models.architecture import Architecture
from penstock.models.attention import Attention
from penstock.models.layers import dropout, dropout_keys, layer_norm
from penstock.models.loss import loss_and_gradients, token_losses

_CHUNK_LOGITS = 1 << 24
"""Logits of one piece of the eager loss: 64 MiB in float32."""


class Norm(nn.Module):
    """Layer norm with weight and bias (D,)."""

    def __init__(self, architecture: Architecture) -> None:
        """Epsilon and width from the architecture."""
        super().__init__()
        self.epsilon = architecture.norm_epsilon
        self.weight = nn.Parameter(torch.ones(architecture.hidden_size))
        self.bias = nn.Parameter(torch.zeros(architecture.hidden_size))

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """Normalize x (..., D)."""
        return layer_norm(x, self.weight, self.bias, self.epsilon)


class Mlp(nn.Module):
    """Two linear layers around a tanh-approximated GELU (Hendrycks & Gimpel, arXiv 1606.08415)."""

    def __init__(self, architecture: Architecture) -> None:
        """Parameters: up (F, D), down (D, F), with biases."""
        super().__init__()
        self.up = nn.Linear(architecture.hidden_size, architecture.mlp_size)
        self.down = nn.Linear(architecture.mlp_size, architecture.hidden_size)

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """X (..., D) → (..., D)."""
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Embed(nn.Module):
    """Token plus learned position embeddings."""

    def __init__(self, architecture: Architecture) -> None:
        """Parameters: tokens (Vpadded, D), positions (P, D)."""
        super().__init__()
        self.rate = architecture.dropout
        self.tokens = nn.Embedding(architecture.padded_vocab_size, architecture.hidden_size)
        self.positions = nn.Embedding(architecture.max_positions, architecture.hidden_size)

    def forward(
        self, tokens: Int[Tensor, "B T"], keys: Int[Tensor, "B 1"] | None = None
    ) -> Float[Tensor, "B T D"]:
        """Tokens (B, T) int64 → (B, T, D); keys (B, 1) int64 drop from the sum."""
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        return x if keys is None else dropout(x, keys[:, 0], self.rate)

    def at(
        self, tokens: Int[Tensor, "B T"], positions: Int[Tensor, "B T"]
    ) -> Float[Tensor, "B T D"]:
        """Embed tokens (B, T) at given positions (B, T) int64, without dropout: (B, T, D)."""
        return self.tokens(tokens) + self.positions(positions)


class Block(nn.Module):
    """Pre-norm attention and MLP, each added to the residual stream (GPT-2, §2.3)."""

    def __init__(self, architecture: Architecture) -> None:
        """One layer's parameters."""
        super().__init__()
        self.rate = architecture.dropout
        self.attention_norm = Norm(architecture)
        self.attention = Attention(architecture)
        self.mlp_norm = Norm(architecture)
        self.mlp = Mlp(architecture)

    def forward(
        self, x: Float[Tensor, "B T D"], keys: Int[Tensor, "B 3"] | None = None
    ) -> Float[Tensor, "B T D"]:
        """X (B, T, D) → (B, T, D); keys (B, 3) int64: probabilities, attention, MLP dropout."""
        x = x + self.attention(self.attention_norm(x), keys)
        update = self.mlp(self.mlp_norm(x))
        return x + (update if keys is None else dropout(update, keys[:, 2], self.rate))

    def decode(
        self,
        x: Float[Tensor, "B T D"],
        cache_keys: Float[Tensor, "B H L S"],
        cache_values: Float[Tensor, "B H L S"],
        mask: Bool[Tensor, "B 1 T L+T"],
    ) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B H T S"], Float[Tensor, "B H T S"]]:
        """The same for new positions after cached ones; see `Attention.decode`."""
        update, key, value = self.attention.decode(
            self.attention_norm(x), cache_keys, cache_values, mask
        )
        x = x + update
        return x + self.mlp(self.mlp_norm(x)), key, value


class Head(nn.Module):
    """Final norm, projection to the vocabulary, and the loss, in chunks of tokens."""

    def __init__(self, architecture: Architecture) -> None:
        """Parameters: norm, projection (Vpadded, D)."""
        super().__init__()
        self.vocab_size = architecture.vocab_size
        self.norm = Norm(architecture)
        self.projection = nn.Linear(
            architecture.hidden_size, architecture.padded_vocab_size, bias=False
        )

    def logits(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... V"]:
        """X (..., D) → logits (..., V) in x's dtype, the padding cut off."""
        return self.projection(self.norm(x))[..., : self.vocab_size]

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        targets: Int[Tensor, "B T"],
        loss_weights: Float[Tensor, "B T"],
        z_loss: Float[Tensor, ""] | None = None,
    ) -> Float[Tensor, ""]:
        """Sum of loss_weights × cross entropy, () float32, in nats.

        x (B, T, D); targets (B, T) int64; loss_weights (B, T) float32; z_loss () float32 is the
        factor of the squared log-partition (PaLM, arXiv 2204.02311, §5).
        """
        z_loss = x.new_zeros((), dtype=torch.float32) if z_loss is None else z_loss
        return _ChunkedLoss.apply(
            *self._parameters_in_order(), x, targets, loss_weights, z_loss, *self._options(x)
        )

    def token_losses(
        self, x: Float[Tensor, "B T D"], targets: Int[Tensor, "B T"]
    ) -> Float[Tensor, "B T"]:
        """Negative log-likelihood of each target in nats, (B, T) float32, without gradients."""
        epsilon, vocab_size, chunks = self._options(x)
        return token_losses(
            *self._parameters_in_order(),
            x,
            targets,
            epsilon=epsilon,
            vocab_size=vocab_size,
            chunks=chunks,
        )

    def _parameters_in_order(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.norm.weight, self.norm.bias, self.projection.weight

    def _options(self, x: Tensor) -> tuple[float, int, int]:
        """Norm epsilon, vocabulary, and pieces so that one piece's logits stay small."""
        rows = x.shape[:-1].numel()
        chunks = -(-rows * self.projection.out_features // _CHUNK_LOGITS)
        return self.norm.epsilon, self.vocab_size, min(rows, chunks)


class _ChunkedLoss(torch.autograd.Function):
    """`models/loss.py` as a differentiable function: gradients are made in the forward pass."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:  # noqa: ANN401 - torch's context type, mixed inputs
        """See `Head.forward`."""
        options: Any = dict(zip(("epsilon", "vocab_size", "chunks"), inputs[7:], strict=True))
        result = loss_and_gradients(*inputs[:7], **options)
        ctx.save_for_backward(result.norm_weight, result.norm_bias, result.projection, result.x)
        return result.loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 - as above
        """Scale the gradients by the one of the loss."""
        scaled = tuple(g * grad_outputs[0].to(g.dtype) for g in ctx.saved_tensors)
        return (*scaled, *(None,) * 6)


class Transformer(nn.Module):
    """A decoder: `embed`, `blocks`, `head`."""

    def __init__(self, architecture: Architecture) -> None:
        """Build with torch's default values; see `models/initialization.py`."""
        super().__init__()
        self.architecture = architecture
        self.embed = Embed(architecture)
        self.blocks = nn.ModuleList(Block(architecture) for _ in range(architecture.layers))
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
    ) -> Float[Tensor, "B T V"] | Float[Tensor, ""]:
        """Logits (B, T, V), or with targets the weighted loss () float32.

        tokens, targets (B, T) int64; loss_weights (B, T) float32, all 1 when not given; keys:
        dropout keys (B, 1) of the embedding, then (B, 3) of each block, or None for no dropout.
        """
        x = self._hidden(tokens, keys)
        if targets is None:
            return self.head.logits(x)
        if loss_weights is None:
            loss_weights = torch.ones_like(targets, dtype=torch.float32)
        return self.head(x, targets, loss_weights, z_loss)

    def dropout_keys(
        self, seed: int, step: int, sequences: Int[Tensor, " B"]
    ) -> list[Tensor] | None:
        """Keys for `forward`, int64: (B, 1) for the embedding, (B, 3) per block; None without
        dropout. A pure function of seed, step, each sequence's place in the step's global batch
        (B,) int64, layer and site, so that any split of the batch drops the same elements.
        """
        if self.architecture.dropout == 0:
            return None
        keys = [dropout_keys(seed, step, sequences, -1, 1)]
        return keys + [dropout_keys(seed, step, sequences, i, 3) for i in range(len(self.blocks))]

    @torch.no_grad()
    def token_losses(
        self, tokens: Int[Tensor, "B T"], targets: Int[Tensor, "B T"]
    ) -> Float[Tensor, "B T"]:
        """Negative log-likelihood of each target in nats, (B, T) float32."""
        return self.head.token_losses(self._hidden(tokens, None), targets)

    def _hidden(
        self, tokens: Int[Tensor, "B T"], keys: Sequence[Tensor] | None
    ) -> Float[Tensor, "B T D"]:
        """The residual stream after the last block, (B, T, D)."""
        x = self.embed(tokens, None if keys is None else keys[0])
        for index, block in enumerate(self.blocks):
            x = block(x, None if keys is None else keys[index + 1])
        return x
