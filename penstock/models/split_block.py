"""A block in parts that compute at the same time: heads and the MLP's inner width divided.

`jobs.py` puts them in the blocks' places, `parallel/tensor.py` lets them meet. Names of parameters
are the whole block's. It must never know about processes.

Source: Shoeybi et al., "Megatron-LM", arXiv 1909.08053, §3: what follows the activations is cut by
columns, the projections back by rows, and each part's share of their products is added up.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import Parameter

from penstock.models.architecture import Architecture
from penstock.models.cut import Cut
from penstock.models.layers import dropout
from penstock.models.projection import Projection
from penstock.models.transformer import Block, Transformer

_MASK32 = 0xFFFFFFFF
_COUNTER_STRIDE = 0x9E3779B9
"""That of `layers.dropout`."""


def cut_of(architecture: Architecture, name: str) -> Cut | None:
    """How a parameter of the whole model is cut; None: every part has all of it."""
    a = architecture
    if not name.startswith("blocks."):
        return None
    inside = name.split(".", 2)[2]
    by_rows = {
        "attention.query_key_value": (a.hidden_size, a.kv_size, a.kv_size),
        "mlp.up": (a.mlp_size,),
        "mlp.gate": (a.mlp_size,),
    }
    by_columns = {
        "attention.output.weight": (a.hidden_size,),
        "mlp.down.weight": (a.mlp_size,),
    }
    if inside in by_columns:
        return Cut(1, by_columns[inside])
    rows = by_rows.get(inside.rpartition(".")[0])
    return None if rows is None else Cut(0, rows)


def has_partial_gradient(architecture: Architecture, name: str) -> bool:
    """Whether each part has a share of a parameter's gradient, though all of the parameter: norms
    of what the parts read.
    """
    is_norm = name.startswith("blocks.") and "_norm." in name
    return is_norm and architecture.norm_position == "before"


class Meeting(Protocol):
    """Where the parts of a block meet."""

    def spread(self, x: Tensor) -> Tensor:
        """X as it is, for all parts to read; its gradient is the sum of theirs."""
        ...

    def total(self, x: Tensor) -> Tensor:
        """The sum of all parts' tensors, whose gradient is every part's."""
        ...


class _Rows(Projection):
    """A projection's product over some of its inputs; the bias belongs to the sum of all parts."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] - as Projection's
        self, x: Float[Tensor, "... I"], keys: Int[Tensor, "B sites"] | None = None
    ) -> Float[Tensor, "... O"]:
        """X (..., some inputs) → its share of (..., outputs)."""
        return F.linear(x, self.weight)


class SplitBlock(Block):
    """One part of a block; `forward` computes what the whole block does."""

    def __init__(self, architecture: Architecture, part: int, parts: int) -> None:
        """Parameters without memory yet, of this part's shapes; see `of`."""
        a = architecture
        with torch.device("meta"):
            super().__init__(a)
            width, bias = a.hidden_size, a.attention_bias
            rows, inner = (width + 2 * a.kv_size) // parts, a.mlp_size // parts
            name = "attention.query_key_value"
            self.attention.query_key_value = Projection(a, name, width, rows, bias=bias)
            self.attention.output = _Rows(a, "attention.output", width // parts, width, bias=bias)
            self.mlp.up = Projection(a, "mlp.up", width, inner, bias=a.mlp_bias)
            self.mlp.down = _Rows(a, "mlp.down", inner, width, bias=a.mlp_bias)
            if a.gated_mlp:
                self.mlp.gate = Projection(a, "mlp.gate", width, inner, bias=a.mlp_bias)
        self.attention.heads = a.heads // parts
        self.attention.residual_rate = 0.0  # What is added up is dropped from, not the shares.
        self._part = part
        self.meeting: Meeting | None = None

    @staticmethod
    def of(whole: Block, architecture: Architecture, part: int, parts: int) -> "SplitBlock":
        """Part `part` of `parts` of a block, with copies of its share of the weights."""
        block = SplitBlock(architecture, part, parts)
        for name, parameter in whole.named_parameters():
            cut = cut_of(architecture, f"blocks.0.{name}")
            kept = parameter.detach()
            own = Parameter(
                kept if cut is None else cut.own(kept, part, parts), parameter.requires_grad
            )
            module, _, leaf = name.rpartition(".")
            setattr(block.get_submodule(module), leaf, own)
        return block

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        keys: Int[Tensor, "B sites"] | None = None,
        turns: Float[Tensor, "2 #B 1 T P"] | None = None,
        segments: Int[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """As `Block.forward`; all parts call it with the same tensors."""
        if self.meeting is None:
            raise RuntimeError("parts of a block must meet")
        spread, total = self.meeting.spread, self.meeting.total
        given = spread(x)
        whole = total(self.attend(given, self.own_keys(keys, x.shape[1]), turns, segments))
        bias = self.attention.output.bias
        update = _plus(whole, bias) if keys is None else self.attended(whole, keys)
        attended = self._added(x, update, self.attention_norm)
        whole = total(self.feed(given if self.is_parallel else spread(attended)))
        update = _plus(whole, self.mlp.down.bias) if keys is None else self.fed(whole, keys)
        return self._added(attended, update, self.mlp_norm)

    def attend(
        self,
        x: Float[Tensor, "B T D"],
        keys: Int[Tensor, "B sites"] | None = None,
        turns: Float[Tensor, "2 #B 1 T P"] | None = None,
        segments: Int[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """This part's share of what attention adds to x, less bias and dropout of the sum."""
        normalized = x if self.normalizes_sums else self.attention_norm(x)
        return self.attention(normalized, keys, turns, segments)

    def attended(
        self, total: Float[Tensor, "B T D"], keys: Int[Tensor, "B sites"]
    ) -> Float[Tensor, "B T D"]:
        """What attention adds where some is dropped, from the `total` of all parts' shares."""
        return dropout(_plus(total, self.attention.output.bias), keys[:, 1], self.rate)

    def feed(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """This part's share of what the MLP adds; x as the MLP reads it, before its norm."""
        if self.normalizes_sums:
            return self.mlp(x)
        return self.mlp((self.mlp_norm or self.attention_norm)(x))

    def fed(
        self, total: Float[Tensor, "B T D"], keys: Int[Tensor, "B sites"]
    ) -> Float[Tensor, "B T D"]:
        """The same of the MLP."""
        return dropout(_plus(total, self.mlp.down.bias), keys[:, 2], self.rate)

    def _added(self, x: Tensor, update: Tensor, norm: nn.Module | None) -> Tensor:
        """X and what is added to it, in families that do so normalized."""
        result = x + update
        return norm(result) if self.normalizes_sums and norm is not None else result

    def own_keys(
        self, keys: Int[Tensor, "B sites"] | None, length: int
    ) -> Int[Tensor, "B sites"] | None:
        """Keys whose first drops from some heads' probabilities what the whole block's drops from
        them: those of the heads before come first in its stream.
        """
        if keys is None:
            return None
        before = self._part * self.attention.heads * length**2
        first = keys[:, :1]
        low = (first + (before * _COUNTER_STRIDE & _MASK32)) & _MASK32
        return torch.cat([(first & ~_MASK32) | low, keys[:, 1:]], 1)


def _plus(total: Tensor, bias: Tensor | None) -> Tensor:
    return total if bias is None else total + bias


def split_blocks(model: Transformer, part: int, parts: int) -> None:
    """Leave of each block of `model` one part, in its place."""
    made: dict[int, SplitBlock] = {}
    for index, block in enumerate(model.blocks):  # shared layers are one block
        if id(block) not in made:
            if not isinstance(block, Block):
                raise TypeError("only blocks are split")
            made[id(block)] = SplitBlock.of(block, model.architecture, part, parts)
        model.blocks[index] = made[id(block)]
