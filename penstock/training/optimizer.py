"""AdamW with fp32 masters over parameters held in the compute format.

The train step calls `AdamW.step`; checkpoints hold `AdamW.state_tensors`. It must never know the
model's structure: it sees names and parameters, nothing else.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

from penstock.config.schema import OptimizerSection
from penstock.errors import CheckpointError
from penstock.parallel.replicas import local
from penstock.training.parameter_groups import Trained, learning_rate_shares, parameter_groups

_GROUP_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}
"""Bound on the transient fp32 gradients of one group. On a CPU they stay in its cache: 4 MiB was
as fast as any size from 1 to 64 MiB and a third faster than 256 KiB (2 Zen 5 cores, torch 2.13)."""


@torch.no_grad()
def make_master(weight: Tensor, exact: Tensor | None) -> Tensor:
    """The float32 value an optimizer updates for `weight`: the weight itself where it is float32.

    `exact`, float32, holds more digits than the weight; it becomes the master as it is, since a
    copy of all of them would be the peak of the run's memory.
    """
    if weight.dtype == torch.float32:
        return weight if exact is None else weight.copy_(exact)
    if exact is not None and exact.dtype == torch.float32 and exact.device == weight.device:
        return exact.contiguous()
    return weight.float() if exact is None else exact.to(weight.device, torch.float32)


@dataclass(frozen=True, slots=True)
class _Group:
    """Flat pieces of parameters that one fused call updates; all lists run in parallel."""

    weight_decay: float
    """Decoupled decay of every piece."""
    share: float
    """Of the learning rate, of every piece."""
    places: list[tuple[int, int, int]]
    """Of each piece: index of its parameter, first element, element past its last."""
    weights: list[Tensor]
    """(n,) views of the model's parameters in the compute format; empty when those are fp32."""
    masters: list[Tensor]
    """(n,) float32 views of the masters, or of the parameters themselves when those are fp32."""
    exp_avgs: list[Tensor]
    """(n,) float32 views of the first moments."""
    exp_avg_sqs: list[Tensor]
    """(n,) float32 views of the second moments."""
    scratch: list[Tensor]
    """(n,) float32 views of the space shared by all groups for fp32 copies of gradients."""


class AdamW(Trained):
    """Adam with decoupled weight decay; masters and moments are fp32.

    Per step: gradients → fp32 → `torch._fused_adamw_` (the kernel of `torch.optim.AdamW` with
    fused=True, with clipping folded in) → masters rounded into the parameters; piece by piece,
    so that beside the state only a few MiB are needed.

    Source: Kingma & Ba, arXiv 1412.6980, algorithm 1; Loshchilov & Hutter, arXiv 1711.05101,
    algorithm 2; fp32 masters: Micikevicius et al., arXiv 1710.03740, §3.1.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Parameter]],
        section: OptimizerSection,
        *,
        masters: Mapping[str, Tensor] | None = None,
        layers: int | None = None,
        group_bytes: int | None = None,
    ) -> None:
        """Make the state: zero moments, and masters of all parameters that are not fp32.

        Args:
            named_parameters: a model's `named_parameters()`, on one device; frozen ones are left
                alone. Of those that replicas divided, all state is of this process's rows.
            section: the user's `optimizer` settings.
            masters: float32 values more exact than the parameters hold, by parameter name; they
                become part of the state, and the parameters are set to them, rounded.
            layers: the model's, where the parameters are not of all of them.
            group_bytes: bound on the transient fp32 gradients; chosen by device when not given.
        """
        self._section = section
        named = list(named_parameters)
        decayed, others = parameter_groups(named, section.decay_all)
        names = (name for name, _ in named)
        self._shares = learning_rate_shares(names, section.layer_decay, layers)
        self._parameters = dict(decayed + others)
        self._masters: dict[str, Tensor] = {}
        self._exp_avgs: dict[str, Tensor] = {}
        self._exp_avg_sqs: dict[str, Tensor] = {}
        self._weights = {name: local(p.detach()) for name, p in self._parameters.items()}
        for name, weight in self._weights.items():
            self._masters[name] = make_master(weight, (masters or {}).get(name))
            self._exp_avgs[name] = torch.zeros_like(weight, dtype=torch.float32)
            self._exp_avg_sqs[name] = torch.zeros_like(weight, dtype=torch.float32)
        device = next((p.device for _, p in named), torch.device("cpu"))
        self._count = torch.zeros((), dtype=torch.float32, device=device)
        limit = (group_bytes or _GROUP_BYTES.get(device.type, 256 << 20)) // 4
        copied = sum(w.numel() for w in self._weights.values() if w.dtype != torch.float32)
        self._scratch = torch.empty(min(limit, copied), dtype=torch.float32, device=device)
        self._groups = self._divide(range(len(decayed)), section.weight_decay, limit)
        self._groups += self._divide(range(len(decayed), len(self._parameters)), 0.0, limit)
        self._round_masters()

    @property
    def steps(self) -> int:
        """Updates applied so far; reading it waits for the device."""
        return int(self._count.item())

    @steps.setter
    def steps(self, value: int) -> None:
        """Go on after `value` updates, as a resumed run does."""
        self._count.fill_(value)

    @torch.no_grad()
    def step(
        self,
        lr: float | Tensor,
        *,
        grad_norm: Tensor | None = None,
        skip: Tensor | None = None,
        gradients: Sequence[Tensor] | None = None,
    ) -> None:
        """Update all parameters; gradients are clipped to `clip` when their norm is given.

        Gradients that are fp32 already may hold their clipped values afterwards.

        Args:
            lr: learning rate of this step; a number, or a () float32 tensor.
            grad_norm: () float32, the global norm before clipping; None: no clipping.
            skip: () bool or 0/1; where true nothing changes, not even the step count; the
                decision stays on the device.
            gradients: in the order of `gradients()`; float32, or the parameter's dtype; taken
                from there when not given.
        """
        self.before_step()
        gradients = self.gradients() if gradients is None else gradients
        section = self._section
        scale = None
        if grad_norm is not None and section.clip is not None:
            # The kernel divides gradients by `grad_scale` while it reads them.
            scale = (grad_norm / section.clip).clamp(min=1.0)
        stop = None if skip is None else skip.to(self._count.device, torch.float32)
        self._count += 1
        for group in self._groups:
            pieces = [gradients[i].reshape(-1)[start:end] for i, start, end in group.places]
            if group.scratch and any(piece.dtype != torch.float32 for piece in pieces):
                torch._foreach_copy_(group.scratch, pieces)
                pieces = group.scratch
            torch._fused_adamw_(
                group.masters,
                pieces,
                group.exp_avgs,
                group.exp_avg_sqs,
                [],
                [self._count] * len(pieces),
                lr=lr * group.share,
                beta1=section.betas[0],
                beta2=section.betas[1],
                weight_decay=group.weight_decay,
                eps=section.eps,
                amsgrad=False,
                maximize=False,
                grad_scale=scale,
                found_inf=stop,
            )
            if group.weights:
                torch._foreach_copy_(group.weights, group.masters)
        if stop is not None:
            self._count -= stop

    def state_tensors(self) -> dict[str, Tensor]:
        """Return the state itself, not a copy: fp32 `master.NAME`, `exp_avg.NAME`,
        `exp_avg_sq.NAME` of every trainable parameter, in the parameter's shape.
        """
        kinds = ("master", self._masters), ("exp_avg", self._exp_avgs)
        kinds += (("exp_avg_sq", self._exp_avg_sqs),)
        return {f"{kind}.{name}": value for kind, part in kinds for name, value in part.items()}

    @torch.no_grad()
    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up the state of `state_tensors` and set the parameters from the masters.

        Raises:
            CheckpointError: a name is missing or left over, or a shape or dtype differs; nothing
                has changed then.
        """
        own = self.state_tensors()
        unequal = sorted(own.keys() ^ tensors.keys()) or [
            name
            for name, value in own.items()
            if value.shape != tensors[name].shape or value.dtype != tensors[name].dtype
        ]
        if unequal:
            raise CheckpointError(
                f"the optimizer state does not fit the model: {unequal[0]} (one of {len(unequal)})",
                do="train the architecture the checkpoint was made with",
            )
        if own:
            torch._foreach_copy_(list(own.values()), [tensors[name] for name in own])
        self._round_masters()

    def _divide(self, indices: range, weight_decay: float, limit: int) -> list[_Group]:
        """Cut these parameters into pieces and gather them into groups of `limit` elements."""
        places: list[list[tuple[int, int, int]]] = []
        room = 0
        shares = [self._shares[name] for name in self._parameters]
        values = list(self._weights.values())
        kinds = [(values[index].dtype, shares[index]) for index in indices]
        for position, index in enumerate(indices):
            start, size = 0, values[index].numel()
            if position and kinds[position] != kinds[position - 1]:
                # One group has one share, and one kind of weight: copies of masters, or themselves.
                room = 0
            while start < size:
                if room == 0:
                    places.append([])
                    room = limit
                end = min(size, start + room)
                places[-1].append((index, start, end))
                room -= end - start
                start = end
        return [self._make_group(group, weight_decay) for group in places]

    def _make_group(self, places: list[tuple[int, int, int]], weight_decay: float) -> _Group:
        """Make the views of one group of pieces."""
        names = list(self._parameters)

        def views(tensors: Mapping[str, Tensor]) -> list[Tensor]:
            return [tensors[names[i]].view(-1)[start:end] for i, start, end in places]

        sizes = [end - start for _, start, end in places]
        first = self._weights[names[places[0][0]]]
        is_copy = first.dtype != torch.float32
        return _Group(
            weight_decay=weight_decay,
            share=self._shares[names[places[0][0]]],
            places=places,
            weights=views(self._weights) if is_copy else [],
            masters=views(self._masters),
            exp_avgs=views(self._exp_avgs),
            exp_avg_sqs=views(self._exp_avg_sqs),
            scratch=list(self._scratch[: sum(sizes)].split(sizes)) if is_copy else [],
        )

    def _round_masters(self) -> None:
        """Set every parameter in the compute format from its master."""
        for group in self._groups:
            if group.weights:
                torch._foreach_copy_(group.weights, group.masters)
