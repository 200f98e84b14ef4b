"""The transformer: Embed, Blocks, Head, as plain modules.

Compiled and eager training, evaluation and generation all run this one model; the compiler may
replace the three regions' `forward`. It must never know about optimizers, devices or files.

Letters: B batch, T positions, D hidden, H heads, K kv heads, S head size, F mlp, V vocabulary,
P rotated pairs.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from penstock.models.architecture import Architecture
from penstock.models.attention import Attention
from penstock.models.layers import dropout, dropout_keys, normalize
from penstock.models.loss import loss_and_gradients, token_losses
from penstock.models.mlp import Mlp
from penstock.models.rotary import rotation

_CHUNK_LOGITS = 1 << 24
"""Logits of one piece of the eager loss: 64 MiB in float32."""


class Norm(nn.Module):
    """Layer norm with weight and bias (D,), or root-mean-square norm with a weight (D,)."""

    def __init__(self, architecture: Architecture) -> None:
        """Epsilon and width from the architecture."""
        super().__init__()
        self.epsilon = architecture.norm_epsilon
        self.weight = nn.Parameter(torch.ones(architecture.hidden_size))
        has_bias = architecture.norm == "layer"
        self.bias = nn.Parameter(torch.zeros(architecture.hidden_size)) if has_bias else None

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """Normalize x (..., D)."""
        return normalize(x, self.weight, self.bias, self.epsilon)


class Embed(nn.Module):
    """Token embeddings, plus those of learned positions."""

    def __init__(self, architecture: Architecture) -> None:
        """Parameters: tokens (Vpadded, D), positions (P, D) where they are learned."""
        super().__init__()
        width = architecture.hidden_size
        self.rate = architecture.embedding_rate
        self.tokens = _table(architecture.padded_vocab_size, width)
        learned = architecture.positions == "learned"
        self.positions = _table(architecture.max_positions, width) if learned else None

    def forward(
        self, tokens: Int[Tensor, "B T"], keys: Int[Tensor, "B 1"] | None = None
    ) -> Float[Tensor, "B T D"]:
        """Tokens (B, T) int64 → (B, T, D); keys (B, 1) int64 drop from the sum."""
        x = self.tokens(tokens)
        if self.positions is not None:
            x = x + self.positions.weight[: tokens.shape[1]]
        return x if keys is None else dropout(x, keys[:, 0], self.rate)

    def at(
        self, tokens: Int[Tensor, "B T"], positions: Int[Tensor, "B T"]
    ) -> Float[Tensor, "B T D"]:
        """Embed tokens (B, T) at given positions (B, T) int64, without dropout: (B, T, D)."""
        x = self.tokens(tokens)
        return x if self.positions is None else x + self.positions(positions)


def _table(rows: int, width: int) -> nn.Embedding:
    # Uniform: on the meta device, torch 2.13 loads 800 modules (60 MiB) to draw normal numbers.
    return nn.Embedding.from_pretrained(torch.empty(rows, width).uniform_(-1, 1), freeze=False)


class Block(nn.Module):
    """Pre-norm attention and MLP, added to the residual stream one after the other (GPT-2, §2.3)
    or both at once (GPT-J; Wang & Komatsuzaki, 2021).
    """

    def __init__(self, architecture: Architecture) -> None:
        """One layer's parameters."""
        super().__init__()
        self.rate = architecture.dropout
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
    ) -> Float[Tensor, "B T D"]:
        """X (B, T, D) → (B, T, D); keys (B, sites) int64: probabilities, attention, MLP
        dropout, then the adapters'; turns (2, 1, 1, T, P) float32: see `models/rotary.py`.
        """
        normalized = self.attention_norm(x)
        attended = x + self.attention(normalized, keys, turns)
        update = self._mlp_update(x, normalized, attended, keys)
        return attended + (update if keys is None else dropout(update, keys[:, 2], self.rate))

    def decode(
        self,
        x: Float[Tensor, "B T D"],
        cache_keys: Float[Tensor, "B K L S"],
        cache_values: Float[Tensor, "B K L S"],
        mask: Bool[Tensor, "B 1 T L+T"],
        turns: Float[Tensor, "2 B 1 T P"] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B K T S"], Float[Tensor, "B K T S"]]:
        """The same for new positions after cached ones; see `Attention.decode`."""
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
        if self.mlp_norm is None:
            return self.mlp(normalized, keys)
        return self.mlp(self.mlp_norm(x if self.is_parallel else attended), keys)


class Head(nn.Module):
    """Final norm, projection to the vocabulary, and the loss, in chunks of tokens."""

    def __init__(self, architecture: Architecture) -> None:
        """Parameters: norm, projection (Vpadded, D) with a bias (Vpadded,) if it has one."""
        super().__init__()
        self.vocab_size = architecture.vocab_size
        self.norm = Norm(architecture)
        self.projection = nn.Linear(
            architecture.hidden_size,
            architecture.padded_vocab_size,
            bias=architecture.head_bias,
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
        options = {**self._options(x), "trains_projection": self.projection.weight.requires_grad}
        return _ChunkedLoss.apply(
            *self._parameters_in_order(), x, targets, loss_weights, z_loss, options
        )

    def token_losses(
        self, x: Float[Tensor, "B T D"], targets: Int[Tensor, "B T"]
    ) -> Float[Tensor, "B T"]:
        """Negative log-likelihood of each target in nats, (B, T) float32, without gradients."""
        weight, norm_bias, projection, bias = self._parameters_in_order()
        return token_losses(
            weight, norm_bias, projection, x, targets, bias=bias, **self._options(x)
        )

    def _parameters_in_order(self) -> tuple[Any, ...]:
        """The norm's weight and bias, the projection's; None for a bias there is not."""
        norm, projection = self.norm, self.projection
        return norm.weight, norm.bias, projection.weight, projection.bias

    def _options(self, x: Tensor) -> dict[str, Any]:
        """Norm epsilon, vocabulary, and pieces so that one piece's logits stay small."""
        rows = x.shape[:-1].numel()
        chunks = -(-rows * self.projection.out_features // _CHUNK_LOGITS)
        return {
            "epsilon": self.norm.epsilon,
            "vocab_size": self.vocab_size,
            "chunks": min(rows, chunks),
        }


class _ChunkedLoss(torch.autograd.Function):
    """`models/loss.py` as a differentiable function: gradients are made in the forward pass."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:  # noqa: ANN401 - torch's context type, mixed inputs
        """See `Head.forward`."""
        weight, norm_bias, projection, bias, x, targets, loss_weights, z_loss, options = inputs
        result = loss_and_gradients(
            weight, norm_bias, projection, x, targets, loss_weights, z_loss, bias=bias, **options
        )
        ctx.save_for_backward(
            result.norm_weight, result.norm_bias, result.projection, result.bias, result.x
        )
        return result.loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 - as above
        """Scale the gradients by the one of the loss."""
        scaled = tuple(
            None if g is None else g * grad_outputs[0].to(g.dtype) for g in ctx.saved_tensors
        )
        return (*scaled, *(None,) * 4)


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
        dropout keys (B, 1) of the embedding, then (B, sites) of each block, or None for no dropout.
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
        self, tokens: Int[Tensor, "B T"], targets: Int[Tensor, "B T"]
    ) -> Float[Tensor, "B T"]:
        """Negative log-likelihood of each target in nats, (B, T) float32."""
        return self.head.token_losses(self._hidden(tokens, None), targets)

    def _hidden(
        self, tokens: Int[Tensor, "B T"], keys: Sequence[Tensor] | None
    ) -> Float[Tensor, "B T D"]:
        """The residual stream after the last block, (B, T, D)."""
        x = self.embed(tokens, None if keys is None else keys[0])
        turns = rotation(self.architecture, torch.arange(tokens.shape[1], device=x.device)[None])
        for index, block in enumerate(self.blocks):
            x = block(x, None if keys is None else keys[index + 1], turns)
        return x
