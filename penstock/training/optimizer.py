"""AdamW with fp32 masters over parameters held in the compute format.

The train step calls `AdamW.step`; checkpoints hold `AdamW.state_tensors`. It must never know the
model's structure: it sees names and parameters, nothing else.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from penstock.config.schema import OptimizerSection
from penstock.errors import CheckpointError
from penstock.parallel.replicas import local
from penstock.tensors import OnDemand, Pieces
from penstock.training.masters import (
    is_split,
    join,
    joined,
    joined_in_pieces,
    make_master,
    split_in_pieces,
)
from penstock.training.parameter_groups import Trained, learning_rate_shares, parameter_groups
from penstock.training.update_groups import Group, UpdateSettings, cut, round_masters

_GROUP_BYTES = {"cpu": 1 << 20, "cuda": 256 << 20}
"""Bound on the transient fp32 gradients of one group. On a CPU they, and masters as large, stay in
its caches."""
_KINDS = ("master", "exp_avg", "exp_avg_sq")
"""What there is of every parameter."""


class AdamW(Trained):
    """Adam with decoupled weight decay; masters and moments are fp32.

    Masters of bf16 parameters on a CPU are held as these and 16 bits more (`masters.py`).

    Per step: gradients → fp32 → `torch._fused_adamw_` (with clipping folded in) → masters rounded
    into the parameters, piece by piece; or, for split masters and bf16 gradients, a kernel.

    Source: Kingma & Ba, arXiv 1412.6980, algorithm 1; Loshchilov & Hutter, arXiv 1711.05101,
    algorithm 2; fp32 masters: Micikevicius et al., arXiv 1710.03740, §3.1.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Parameter]],
        section: OptimizerSection,
        *,
        masters: dict[str, Tensor] | None = None,
        layers: int | None = None,
        group_bytes: int | None = None,
    ) -> None:
        """Make the state: zero moments, and masters of all parameters that are not fp32.

        Args:
            named_parameters: a model's `named_parameters()`, on one device; frozen ones are left
                alone. Of those that replicas divided, all state is of this process's rows.
            section: the user's `optimizer` settings.
            masters: float32 values more exact than the parameters hold, by parameter name; they
                become part of the state, and the parameters are set to them, rounded. Those that
                are split are taken out of it, so that their memory serves the moments.
            layers: the model's, where the parameters are not of all of them.
            group_bytes: bound on the transient fp32 gradients; chosen by device when not given.
        """
        self._section = section
        named = list(named_parameters)
        decayed, others = parameter_groups(named, section.decay_all)
        names = (name for name, _ in named)
        self._shares = learning_rate_shares(names, section.layer_decay, layers)
        self._parameters = dict(decayed + others)
        self._decays = dict.fromkeys((name for name, _ in decayed), section.weight_decay)
        self._masters: dict[str, Tensor] = {}
        self._rests: dict[str, Tensor] = {}
        self._exp_avgs: dict[str, Tensor] = {}
        self._exp_avg_sqs: dict[str, Tensor] = {}
        self._weights = {name: local(p.detach()) for name, p in self._parameters.items()}
        for name, weight in self._weights.items():
            if is_split(weight):
                self._rests[name] = torch.zeros_like(weight, dtype=torch.int16)
            else:
                self._masters[name] = make_master(weight, (masters or {}).get(name))
        device = next((p.device for _, p in named), torch.device("cpu"))
        self._count = torch.zeros((), dtype=torch.float32, device=device)
        limit = (group_bytes or _GROUP_BYTES.get(device.type, 256 << 20)) // 4
        copied = sum(w.numel() for w in self._weights.values() if w.dtype != torch.float32)
        space = min(limit, copied)
        self._scratch = torch.empty(space, dtype=torch.float32, device=device)
        self._whole = torch.empty(space if self._rests else 0, dtype=torch.float32, device=device)
        for name, rest in self._rests.items():
            if masters and name in masters:
                split_in_pieces(masters.pop(name), self._weights[name], rest, self._whole)
        for name, weight in self._weights.items():
            self._exp_avgs[name] = torch.zeros_like(weight, dtype=torch.float32)
            self._exp_avg_sqs[name] = torch.zeros_like(weight, dtype=torch.float32)
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
            skip: () bool or 0/1; where true nothing changes, nor the count; it stays on the device.
            gradients: as `gradients()`, whose they are when not given, or in float32.
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
        done = self._step_by_kernel(gradients, lr, scale, stop)
        for group in self._groups:
            if done and group.rests:
                continue
            pieces = [gradients[i].reshape(-1)[start:end] for i, start, end in group.places]
            if group.scratch and any(piece.dtype != torch.float32 for piece in pieces):
                torch._foreach_copy_(group.scratch, pieces)
                pieces = group.scratch
            if group.rests:
                join(group.masters, group.weights, group.rests)
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
            round_masters(group)
        if stop is not None:
            self._count -= stop

    def _step_by_kernel(
        self,
        gradients: Sequence[Tensor],
        lr: float | Tensor,
        scale: Tensor | None,
        stop: Tensor | None,
    ) -> bool:
        """Do at once what the groups of split masters would; whether it was done."""
        split_ones = {i: name for i, name in enumerate(self._weights) if name in self._rests}
        kernel = self._adamw_kernel
        if not kernel or any(gradients[i].dtype != torch.bfloat16 for i in split_ones):
            return False
        if stop is not None and stop.item():  # skipped
            return True
        settings = UpdateSettings(self._section, self.steps, float(lr), scale)
        state = (self._weights, self._rests, self._exp_avgs, self._exp_avg_sqs)
        for index, name in split_ones.items():
            given = settings.tensor(self._shares[name], self._decays.get(name, 0.0))
            flat = (tensors[name].view(-1) for tensors in state)
            kernel([*flat, gradients[index].reshape(-1), given])
        return True

    def state_tensors(self) -> Mapping[str, Tensor]:
        """fp32 `master.NAME`, `exp_avg.NAME`, `exp_avg_sq.NAME` of every trainable parameter, in
        the parameter's shape: the state itself, not a copy, but for split masters.
        """
        return OnDemand(
            [f"{kind}.{name}" for kind in _KINDS for name in self._weights],
            self._state,
            self._state_in_pieces,
        )

    def _state(self, name: str) -> Tensor:
        kind, _, parameter = name.partition(".")
        if kind == "master" and parameter in self._rests:
            return joined(self._weights[parameter], self._rests[parameter])
        return self._kept()[_KINDS.index(kind)][parameter]

    def _state_in_pieces(self, name: str) -> Pieces:
        """A whole master may be the largest tensor there is, and a step has no room of its size."""
        kind, _, parameter = name.partition(".")
        if kind == "master" and parameter in self._rests:
            return joined_in_pieces(self._weights[parameter], self._rests[parameter])
        return Pieces.of(self._state(name))

    def _kept(self) -> tuple[dict[str, Tensor], ...]:
        """The state that is held as it is, of each kind."""
        return self._masters, self._exp_avgs, self._exp_avg_sqs

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
        self._take_up(tensors)

    def _take_up(self, tensors: Mapping[str, Tensor]) -> None:
        """The same, of tensors that fit."""
        for kind, kept in zip(_KINDS, self._kept(), strict=True):
            for name, own in kept.items():
                own.copy_(tensors[f"{kind}.{name}"])
        for name, rest in self._rests.items():
            split_in_pieces(tensors[f"master.{name}"], self._weights[name], rest, self._whole)
        self._round_masters()

    def _divide(self, indices: range, weight_decay: float, limit: int) -> list[Group]:
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

    def _make_group(self, places: list[tuple[int, int, int]], weight_decay: float) -> Group:
        """Make the views of one group of pieces."""
        names = list(self._parameters)

        def views(tensors: Mapping[str, Tensor]) -> list[Tensor]:
            return [tensors[names[i]].view(-1)[start:end] for i, start, end in places]

        sizes = [end - start for _, start, end in places]
        first = names[places[0][0]]
        is_copy = self._weights[first].dtype != torch.float32
        divided = first in self._rests
        return Group(
            weight_decay=weight_decay,
            share=self._shares[first],
            places=places,
            weights=views(self._weights) if is_copy else [],
            masters=cut(self._whole, sizes) if divided else views(self._masters),
            rests=views(self._rests) if divided else [],
            exp_avgs=views(self._exp_avgs),
            exp_avg_sqs=views(self._exp_avg_sqs),
            scratch=cut(self._scratch, sizes) if is_copy else [],
        )

    @torch.no_grad()
    def _round_masters(self) -> None:
        """Set every parameter in the compute format from its master; split ones are."""
        for group in self._groups:
            if not group.rests:
                round_masters(group)
