"""A block in parts that compute at the same time: heads and the MLP's inner width divided.

`jobs.py` puts them in the blocks' places, `parallel/tensor.py` lets them meet. Names of parameters
are the whole block's. It must never know about processes.

Source: Shoeybi et al., "Megatron-LM", arXiv 1909.08053, §3: what follows the activations is cut by
columns, the projections back by rows, and each part's share of their products is added up.
"""

import dataclasses
from collections.abc import Mapping
from typing import Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import Parameter

from penstock.models.adapter import SUMMED
from penstock.models.architecture import Architecture
from penstock.models.cut import Cut
from penstock.models.dropout_rates import BLOCK_DROPOUT_SITES
from penstock.models.frozen_base import HeldLinear, HeldProjection, become_held, held_product
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
    linear, _, adapter = inside.partition(".adapters.")
    if adapter:
        return _adapter_cut(architecture, linear, *adapter.split("."))
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


def _adapter_cut(architecture: Architecture, linear: str, key: str, matrix: str) -> Cut | None:
    """How an adapter's matrix is cut: with the rows of its layer B, with the columns A."""
    cut = cut_of(architecture, f"blocks.0.{linear}.weight")
    if cut is None or (matrix == "down") != (cut.dimension == 1):
        return None
    if matrix == "down":
        return cut
    sites = () if architecture.adapter is None else architecture.adapter.sites
    site = next(site for site in sites if (site.linear, site.key) == (linear, key))
    return cut.within(site.start, site.rows)


def adapter_names(architecture: Architecture) -> list[str]:
    """Names of all adapters' matrices."""
    a = architecture
    return [
        f"blocks.{layer}.{site.linear}.adapters.{site.key}.{matrix}"
        for layer in range(a.distinct_blocks(a.layers))
        for site in (() if a.adapter is None else a.adapter.sites)
        for matrix in ("down", "up")
    ]


def has_partial_gradient(architecture: Architecture, name: str) -> bool:
    """Whether each part has a share of a parameter's gradient, though all of the parameter: norms
    of what the parts read, and the adapters' matrices that all have.
    """
    if ".adapters." in name:
        return cut_of(architecture, name) is None
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

    def __init__(
        self, architecture: Architecture, name: str, inputs: int, parts: int, *, bias: bool
    ) -> None:
        """Of each of so many parts of a layer with so many inputs."""
        outputs = architecture.hidden_size
        super().__init__(architecture, name, inputs // parts, outputs, bias=bias)
        self.whole_inputs = inputs

    def own_product(self, x: Float[Tensor, "... I"]) -> Float[Tensor, "... O"]:
        """X (..., some inputs) → its share of (..., outputs)."""
        return F.linear(x, self.weight)


class _HeldRows(_Rows, HeldLinear):
    """The same of a weight in few bits."""

    def own_product(self, x: Float[Tensor, "... I"]) -> Float[Tensor, "... O"]:
        """As `_Rows`."""
        return held_product(x, self, None)


class SplitBlock(Block):
    """One part of a block; `forward` computes what the whole block does."""

    def __init__(self, architecture: Architecture, part: int, parts: int) -> None:
        """Parameters without memory yet, of this part's shapes; see `of`."""
        a = architecture
        if a.adapter is not None:
            a = dataclasses.replace(a, adapter=a.adapter.part(parts))
        with torch.device("meta"):
            super().__init__(a)
            width, bias = a.hidden_size, a.attention_bias
            rows, inner = (width + 2 * a.kv_size) // parts, a.mlp_size // parts
            name = "attention.query_key_value"
            self.attention.query_key_value = Projection(a, name, width, rows, bias=bias)
            self.attention.output = _Rows(a, "attention.output", width, parts, bias=bias)
            self.mlp.up = Projection(a, "mlp.up", width, inner, bias=a.mlp_bias)
            self.mlp.down = _Rows(a, "mlp.down", a.mlp_size, parts, bias=a.mlp_bias)
            if a.gated_mlp:
                self.mlp.gate = Projection(a, "mlp.gate", width, inner, bias=a.mlp_bias)
        self.attention.heads = a.heads // parts
        self.attention.residual_rate = 0.0  # What is added up is dropped from, not the shares.
        # First element of this part's columns in what each site drops from; see `own_keys`.
        sites = a.adapter.sites if a.adapter is not None and a.adapter_rate > 0 else ()
        columns = [part * site.columns if site.linear in SUMMED else 0 for site in sites]
        self._before = [0] * BLOCK_DROPOUT_SITES + columns
        self._heads_before = part * self.attention.heads
        self.meeting: Meeting | None = None

    @staticmethod
    def of(whole: Block, architecture: Architecture, part: int, parts: int) -> "SplitBlock":
        """Part `part` of `parts` of a block, with copies of its share of the weights."""
        block = SplitBlock(architecture, part, parts)
        for name, module in whole.named_modules():
            if isinstance(module, HeldLinear):
                cut = cut_of(architecture, f"blocks.0.{name}.weight")
                block._hold(name, module, cut, part, parts)
        for name, parameter in whole.named_parameters():
            cut = cut_of(architecture, f"blocks.0.{name}")
            kept = parameter.detach()
            own = Parameter(
                kept if cut is None else cut.own(kept, part, parts), parameter.requires_grad
            )
            module, _, leaf = name.rpartition(".")
            setattr(block.get_submodule(module), leaf, own)
        return block

    def _hold(self, name: str, whole: HeldLinear, cut: Cut | None, part: int, parts: int) -> None:
        """Hold of a layer this part's share as `whole` holds all of it."""
        own = self.get_submodule(name)
        if not isinstance(own, Projection) or cut is None:
            raise TypeError("only projections are held in few bits")
        kind = _HeldRows if isinstance(own, _Rows) else HeldProjection
        held = become_held(own, whole.kind, kind)
        held.is_elsewhere = whole.is_elsewhere
        if not whole.is_elsewhere:
            held.take_part(whole, cut, part, parts)

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
        given, own_keys = spread(x), self.own_keys(keys, x.shape[1])
        whole = total(self.attend(given, own_keys, turns, segments))
        bias = self.attention.output.bias
        update = _plus(whole, bias) if keys is None else self.attended(whole, keys)
        attended = self._added(x, update, self.attention_norm)
        whole = total(self.feed(given if self.is_parallel else spread(attended), own_keys))
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

    def feed(
        self, x: Float[Tensor, "B T D"], keys: Int[Tensor, "B sites"] | None = None
    ) -> Float[Tensor, "B T D"]:
        """This part's share of what the MLP adds; x as the MLP reads it, before its norm; keys are
        for its adapters.
        """
        if self.normalizes_sums:
            return self.mlp(x, keys)
        return self.mlp((self.mlp_norm or self.attention_norm)(x), keys)

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
        """Keys that drop from some heads' probabilities, and from some columns of what adapters
        are given, what the whole block's drop from them: what is before comes first in its streams.
        """
        if keys is None:
            return None
        before = [self._heads_before * length**2, *self._before[1:]]
        ahead = [count * _COUNTER_STRIDE & _MASK32 for count in before]
        low = (keys + torch.tensor(ahead, device=keys.device)) & _MASK32
        return (keys & ~_MASK32) | low


def _plus(total: Tensor, bias: Tensor | None) -> Tensor:
    return total if bias is None else total + bias


def own_tensors(
    architecture: Architecture, tensors: Mapping[str, Tensor], part: int, parts: int
) -> dict[str, Tensor]:
    """One part's of a whole model's tensors, named by a parameter or KIND.PARAMETER."""
    own: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        _, found, inside = name.partition("blocks.")
        cut = cut_of(architecture, found + inside)
        own[name] = tensor if cut is None else cut.own(tensor, part, parts)
    return own


def split_blocks(model: Transformer, part: int, parts: int) -> None:
    """Leave of each block of `model` one part, in its place."""
    made: dict[int, SplitBlock] = {}
    for index, block in enumerate(model.blocks):  # shared layers are one block
        if id(block) not in made:
            if not isinstance(block, Block):
                raise TypeError("only blocks are split")
            made[id(block)] = SplitBlock.of(block, model.architecture, part, parts)
        model.blocks[index] = made[id(block)]
