"""Stages of a model in processes of their own, micro-batches going through them one behind another.

`train_run.py` makes a `Pipeline` where the plan has stages; the train step and validation run it
as they run a whole model's passes. Schedules and what is sent are torch.distributed.pipelining's.
It must never know about optimizers.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
)

from penstock.data.loader import Batch
from penstock.parallel.mesh import Line, Mesh
from penstock.parallel.replicas import Replicas
from penstock.parallel.stage import TABLE, Stage
from penstock.tensors import OnDemand

_SCHEDULES: dict[str, Any] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "zero-bubble": ScheduleInterleavedZeroBubble,
}
"""By the names of `plan.schedule`. The last one with a piece on each device is ZB-H1 (Qi et al.,
arXiv 2401.10241, §2.2)."""


class _TorchStage(PipelineStage):
    """Torch's stage, whose gradients are taken up in float32 as soon as a pass has left them."""

    def __init__(self, stage: Stage, count: int, sums: dict[str, Tensor], **more: Any) -> None:  # noqa: ANN401 - torch's own arguments
        super().__init__(stage, stage.index, count, stage.z_loss.device, **more)
        self._own = dict(stage.named_parameters())
        self._sums = sums

    def forward_one_chunk(self, *args: Any, **more: Any) -> Any:  # noqa: ANN401 - as torch's
        output = super().forward_one_chunk(*args, **more)
        self._take()  # The head's, whose backward pass is done already.
        return output

    def backward_one_chunk(self, *args: Any, **more: Any) -> None:  # noqa: ANN401 - as torch's
        super().backward_one_chunk(*args, **more)
        self._take()

    def backward_weight_one_chunk(self, *args: Any, **more: Any) -> None:  # noqa: ANN401 - as torch's
        super().backward_weight_one_chunk(*args, **more)
        self._take()

    @torch.no_grad()
    def _take(self) -> None:
        for name, parameter in self._own.items():
            gradient = parameter.grad
            if gradient is None:
                continue
            if name in self._sums:
                self._sums[name] += gradient
            else:
                self._sums[name] = gradient.float()
            parameter.grad = None


class Pipeline:
    """This process's stages, and the schedule by which they meet the others'."""

    def __init__(
        self,
        stages: Sequence[Stage],
        line: Line,
        *,
        schedule: str,
        micro_batches: int,
        shape: tuple[int, int],
        names: Sequence[str],
    ) -> None:
        """All processes of the line call it.

        Args:
            stages: this process's pieces of the depth; all processes have as many.
            line: the processes of one replica, in the order of their stages.
            schedule: a name of `plan.schedule`.
            micro_batches: those of a step, on each replica.
            shape: sequences of a micro-batch, and their tokens.
            names: the trained parameters of these stages, in the optimizer's order.
        """
        logging.getLogger("torch.distributed.pipelining").setLevel(logging.CRITICAL)
        self.at_once = micro_batches
        self._stages, self._line, self._names = stages, line, list(names)
        self._sums: dict[str, Tensor] = {}
        a, dtype = stages[0].architecture, next(stages[0].parameters()).dtype
        count = line.size * len(stages)
        # Known shapes: torch would have them sent, pickled.
        stream = torch.empty(*shape, a.hidden_size, dtype=dtype, device="meta", requires_grad=True)
        tokens = torch.empty(shape, dtype=torch.int64, device="meta")
        loss = torch.empty((), device="meta")
        made = [
            _TorchStage(
                stage,
                count,
                self._sums,
                input_args=tokens if stage.index == 0 else stream,
                output_args=loss if stage.is_last else stream,
                group=line.group,
            )
            for stage in stages
        ]
        single = schedule in ("gpipe", "1f1b")
        self._schedule = _SCHEDULES[schedule](
            made[0] if single else made,
            n_microbatches=micro_batches,
            loss_fn=lambda loss, _: loss,
            scale_grads=False,
        )

    @property
    def device(self) -> torch.device:
        """Where tensors of a step must be."""
        return self._stages[0].z_loss.device

    def train(self, batches: Sequence[Batch], total: Tensor, *, seed: int, step: int) -> Tensor:
        """Forward and backward; the loss () float32 of this replica's share of the step, the same
        in all its stages.

        Loss weights are divided by `total` () float32; `seed` and `step` name the dropout streams.
        """
        tokens, given = self._together(batches)
        weights = torch.cat([batch.loss_weights for batch in batches]).to(self.device) / total
        sequences = torch.cat([batch.sequences for batch in batches]).to(self.device)
        keys = self._stages[0].dropout_keys(seed, step, sequences)
        losses: list[Tensor] = []
        self._schedule.step(
            tokens,
            target=given["targets"],
            losses=losses,
            return_outputs=False,
            loss_weights=weights,
            **given,
            **({} if keys is None else {"keys": keys}),
        )
        loss = torch.stack(losses).sum() if losses else weights.new_zeros(())
        return self._line.sum(loss.detach())

    def gradients(self) -> list[Tensor]:
        """The step's gradients, float32, in the optimizer's order."""
        return [self._sums[name] for name in self._names]

    def clear(self) -> None:
        """Forget the step's gradients."""
        self._sums.clear()

    @torch.no_grad()
    def token_losses(self, batches: Sequence[Batch]) -> list[Tensor]:
        """Each target's negative log-likelihood in nats, (B, T) float32, of `at_once` batches; none
        but in the last stage.
        """
        tokens, given = self._together(batches)
        losses: Tensor | None = self._schedule.eval(tokens, target=given["targets"], **given)
        return [] if losses is None else list(losses.split(len(batches[0].tokens)))

    def _together(self, batches: Sequence[Batch]) -> tuple[Tensor, dict[str, Tensor]]:
        """Micro-batches in a row, that the schedule cuts: tokens, and what all stages get."""
        tokens = torch.cat([batch.tokens for batch in batches]).to(self.device)
        targets = torch.cat([batch.targets for batch in batches]).to(self.device)
        told = [batch.segments for batch in batches if batch.segments is not None]
        if told:
            return tokens, {"targets": targets, "segments": torch.cat(told).to(self.device)}
        if not self._stages[0].architecture.is_causal:
            return tokens, {"targets": targets, "segments": torch.zeros_like(tokens)}
        return tokens, {"targets": targets}


class StageReplicas(Replicas):
    """What one process does with the other replicas' copies of its stage, and with other stages."""

    def __init__(self, mesh: Mesh, own: Iterable[str], *, is_tied: bool) -> None:
        """`own` names this stage's parameters; `is_tied`: the table may also be another's."""
        super().__init__(peers=mesh.replicas)
        self._mesh = mesh
        self._held = frozenset(own)
        self._shares = is_tied and mesh.ends is not None and TABLE in self._held
        # Two hold it: the first one counts it and saves it.
        self._counts_twice = self._shares and mesh.stages.rank > 0

    def reduce(self, gradients: Sequence[Tensor], names: Sequence[str]) -> None:
        """Sum gradients over the replicas, and those of the table over its two copies."""
        super().reduce(gradients, names)
        if self._shares and self._mesh.ends is not None:
            self._mesh.ends.sum(gradients[names.index(TABLE)])

    def norm(self, own: Tensor) -> Tensor:
        """The Euclidean norm over all stages, () float32, from that of this one's `counted`."""
        return self._mesh.stages.sum(own.double().square()).sqrt().float()

    def counted(self, gradients: Sequence[Tensor], names: Sequence[str]) -> list[Tensor]:
        """Those gradients whose norm no other stage counts."""
        pairs = zip(gradients, names, strict=True)
        return [g for g, name in pairs if name != TABLE or not self._counts_twice]

    def rows_of(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This stage's of a whole model's tensors, named by a parameter or KIND.PARAMETER."""
        return {name: tensor for name, tensor in tensors.items() if self._parameter(name)}

    def saved(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Those of this stage's tensors that are its to save."""
        left = TABLE if self._counts_twice else None
        kept = [name for name in tensors if self._parameter(name) != left]
        return OnDemand(kept, tensors.__getitem__)

    def _parameter(self, name: str) -> str | None:
        """The parameter a tensor belongs to; None: it is not this stage's."""
        found = name if name in self._held else name.partition(".")[2]
        return found if found in self._held else None
