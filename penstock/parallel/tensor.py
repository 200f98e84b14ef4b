"""Parts of each block in processes of their own, that meet twice in it.

`train_parts.py` calls it where the plan divides blocks (`plan.tensor`). What a part computes
`models/split_block.py` knows. It must never know about optimizers.

Source: Shoeybi et al., arXiv 1909.08053, §3: f is `spread` here, g `total`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from penstock.models.architecture import Architecture
from penstock.models.cut import Cut
from penstock.models.parameters import parameter_sizes
from penstock.models.split_block import (
    SplitBlock,
    adapter_names,
    cut_of,
    has_partial_gradient,
    own_tensors,
)
from penstock.models.transformer import Transformer
from penstock.parallel.mesh import Line
from penstock.parallel.replicas import Replicas
from penstock.tensors import OnDemand


class _Spread(torch.autograd.Function):
    """The identity; backward, the sum of the parts' gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, line: Line) -> Tensor:  # noqa: ANN401 - torch's context type is not public
        ctx.line = line
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401 - as above
        return ctx.line.sum(_copy(grad_outputs[0])), None


class _Total(torch.autograd.Function):
    """The sum of the parts' tensors; backward, the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, line: Line) -> Tensor:  # noqa: ANN401 - torch's context type is not public
        return line.sum(_copy(x))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401 - as above
        return grad_outputs[0], None


def _copy(tensor: Tensor) -> Tensor:
    """A copy to be summed in place: the tensor itself may be another's too."""
    return tensor.clone(memory_format=torch.contiguous_format)


class _Meeting:
    """The processes with the other parts of the same blocks."""

    def __init__(self, line: Line) -> None:
        self._line = line

    def spread(self, x: Tensor) -> Tensor:
        """See `split_block.Meeting`."""
        return _Spread.apply(x, self._line)

    def total(self, x: Tensor) -> Tensor:
        """See `split_block.Meeting`."""
        return _Total.apply(x, self._line)


def connect(model: Transformer, line: Line) -> None:
    """Let the parts of each block meet with those of the line's other processes."""
    for block in model.blocks:
        if isinstance(block, SplitBlock):
            block.meeting = _Meeting(line)


def cuts_of(architecture: Architecture) -> dict[str, list[int]]:
    """How parameters are cut, by name, for `parts.Part`."""
    names = [*parameter_sizes(architecture), *adapter_names(architecture)]
    cuts = {name: cut_of(architecture, name) for name in names}
    return {name: cut.to_json() for name, cut in cuts.items() if cut is not None}


class SharedMatrices:
    """Whole matrices for an optimizer that looks at such."""

    def __init__(self, line: Line, architecture: Architecture) -> None:
        """`line`: the processes with the parts."""
        self._line, self._architecture = line, architecture

    def whole(self, name: str, own: Tensor) -> Tensor:
        """See `muon.Shares`: the sum of what each part has, in its place among zeros."""
        cut = cut_of(self._architecture, name)
        if cut is None:
            return own
        nothing = torch.zeros_like(own)
        parts = [own if part == self._line.rank else nothing for part in range(self._line.size)]
        return self._line.sum(cut.joined(parts))

    def own(self, name: str, whole: Tensor) -> Tensor:
        """See `muon.Shares`."""
        cut = cut_of(self._architecture, name)
        return whole if cut is None else cut.own(whole, self._line.rank, self._line.size)


class TensorReplicas(Replicas):
    """What a process with a part of each block does with the others; with replicas, and other
    stages, what `inner` does.
    """

    def __init__(self, inner: Replicas, line: Line, architecture: Architecture) -> None:
        """`line`: the processes with the other parts."""
        super().__init__(peers=inner.peers)
        self.shard = inner.shard
        self._inner, self._line, self._architecture = inner, line, architecture

    @property
    def is_divided(self) -> bool:
        """Whether replicas hold only rows of what is theirs."""
        return self._inner.is_divided

    def needs_sums(self, accumulation: int) -> bool:
        """See `Replicas`."""
        return self._inner.needs_sums(accumulation)

    def begin(self, *, is_last: bool) -> None:
        """See `Replicas`."""
        self._inner.begin(is_last=is_last)

    def reduce(self, gradients: Sequence[Tensor], names: Sequence[str]) -> None:
        """Sum gradients over the replicas, and those of which each part has a share over the parts,
        in float32.
        """
        self._inner.reduce(gradients, names)
        shares = [
            gradient
            for gradient, name in zip(gradients, names, strict=True)
            if has_partial_gradient(self._architecture, name)
        ]
        if not shares:
            return
        flat = self._line.sum(torch.cat([share.reshape(-1).float() for share in shares]))
        pieces = flat.split([share.numel() for share in shares])
        for share, piece in zip(shares, pieces, strict=True):
            share.copy_(piece.view_as(share))

    def norm(self, own: Tensor) -> Tensor:
        """The Euclidean norm over all parts, () float32, from that of this one's `counted`."""
        return self._line.sum(self._inner.norm(own).double().square()).sqrt().float()

    def counted(self, gradients: Sequence[Tensor], names: Sequence[str]) -> list[Tensor]:
        """Those gradients whose norm no other part counts."""
        kept = [i for i, name in enumerate(names) if self._is_own(name)]
        return self._inner.counted([gradients[i] for i in kept], [names[i] for i in kept])

    def saved(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Those of this process's tensors that are its to save."""
        return self._inner.saved(OnDemand.chosen(filter(self._is_own, tensors), tensors))

    def rows_of(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This part's of a whole model's tensors, named by a parameter or KIND.PARAMETER."""
        line = self._line
        own = own_tensors(self._architecture, tensors, line.rank, line.size)
        return self._inner.rows_of(own)

    def _is_own(self, name: str) -> bool:
        """Whether a tensor is this part's alone, or the first has it for all."""
        return self._line.rank == 0 or self._cut(name) is not None

    def _cut(self, name: str) -> Cut | None:
        _, found, inside = name.partition("blocks.")
        return cut_of(self._architecture, found + inside)
