"""Stages of a model in processes of their own, micro-batches going through them one behind another.

`train_run.py` makes a `Pipeline` where the plan has stages; the train step and validation run it
as they run a whole model's passes. Schedules and what is sent are torch.distributed.pipelining's.
It must never know about optimizers.
"""

import functools
import logging
from collections.abc import Sequence
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
from penstock.parallel.divided_stage import DividedStage
from penstock.parallel.mesh import Line
from penstock.parallel.replicas import local
from penstock.parallel.stage import Stage
from penstock.spans import span

_SCHEDULES: dict[str, Any] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "zero-bubble": ScheduleInterleavedZeroBubble,
}
"""By the names of `plan.schedule`. The last one with a piece on each device is ZB-H1 (Qi et al.,
arXiv 2401.10241, §2.2)."""


_SHAPES_KEPT = 4
"""Shapes of micro-batches whose schedules and buffers are kept: those of training and validation,
and some where batches are grouped by length."""


class _TorchStage(PipelineStage):
    """Torch's stage, whose gradients are taken up in float32 as soon as a pass has left them."""

    def __init__(
        self,
        stage: Stage,
        count: int,
        sums: dict[str, Tensor],
        divided: DividedStage | None,
        **more: Any,  # noqa: ANN401 - torch's own arguments
    ) -> None:
        module = stage if divided is None else divided.opaque
        super().__init__(module, stage.index, count, stage.z_loss.device, **more)
        self._own = dict(stage.named_parameters())
        self._sums = sums
        self._divided = divided
        self._gives_gradient = stage.gives_gradient

    def forward_one_chunk(self, *args: Any, **more: Any) -> Any:  # noqa: ANN401 - as torch's
        output = super().forward_one_chunk(*args, **more)
        if self.is_last and torch.is_grad_enabled():
            # The head's backward pass is done already.
            if self._divided is not None:
                self._divided.take_up()
            self._take()
        return output

    def backward_maybe_with_nosync(
        self,
        backward_type: Any,  # noqa: ANN401 - as torch's
        bwd_kwargs: dict[str, Any],
        last_backward: bool = False,
    ) -> Any:  # noqa: ANN401 - as torch's
        if backward_type != "full" and not self._gives_gradient:
            # With nothing to pass on torch would find no way to the parameters: all at once.
            if backward_type == "weight":
                return (), None
            backward_type = "full"
            if bwd_kwargs["output_grads"] is None:
                bwd_kwargs = {**bwd_kwargs, "stage_output": bwd_kwargs["stage_output"][0]}
        if self._divided is not None:
            self._divided.begin(backward_type)
        with span("phase/backward"):
            found = super().backward_maybe_with_nosync(backward_type, bwd_kwargs, last_backward)
        if self._divided is not None:
            self._divided.end(backward_type)
        self._take()
        return found

    def finish(self) -> None:
        """Take up what is left, after a step's last pass."""
        if self._divided is not None:
            self._divided.finish()
            self._take()

    @torch.no_grad()
    def _take(self) -> None:
        for name, parameter in self._own.items():
            if parameter.grad is None:
                continue
            gradient = local(parameter.grad)
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
        names: Sequence[str],
        shard: str = "none",
    ) -> None:
        """All processes of the line call it.

        Args:
            stages: this process's pieces of the depth; all processes have as many.
            line: the processes of one replica, in the order of their stages.
            schedule: a name of `plan.schedule`.
            micro_batches: those of a step, on each replica.
            names: the trained parameters of these stages, in the optimizer's order.
            shard: what replicas have divided of these stages, a name of `plan.shard`.
        """
        logging.getLogger("torch.distributed.pipelining").setLevel(logging.CRITICAL)
        self.at_once = micro_batches
        self._stages, self._line, self._names = stages, line, list(names)
        self._sums: dict[str, Tensor] = {}
        self._name, self._shard = schedule, shard
        self._schedule = functools.lru_cache(_SHAPES_KEPT)(self._made_for)

    def _made_for(self, shape: torch.Size) -> tuple[list[_TorchStage], Any]:
        """Torch's stages and schedule for micro-batches (B, T) of tokens."""
        stages, line = self._stages, self._line
        a, dtype = stages[0].architecture, next(stages[0].parameters()).dtype

        def stream(needs_gradient: bool) -> Tensor:
            """What goes from stage to stage; known, since torch would have it sent, pickled."""
            stream = torch.empty(*shape, a.hidden_size, dtype=dtype, device="meta")
            return stream.requires_grad_(needs_gradient)

        tokens = torch.empty(shape, dtype=torch.int64, device="meta")
        loss = torch.empty((), device="meta")
        made = [
            _TorchStage(
                stage,
                line.size * len(stages),
                self._sums,
                None if self._shard == "none" else DividedStage(stage, self._shard),
                input_args=tokens if stage.index == 0 else stream(stage.gives_gradient),
                output_args=loss if stage.is_last else stream(stage.takes_gradient),
                group=line.group,
            )
            for stage in stages
        ]
        schedule = _SCHEDULES[self._name](
            made[0] if self._name in ("gpipe", "1f1b") else made,
            n_microbatches=self.at_once,
            loss_fn=lambda loss, _: loss,
            scale_grads=False,
        )
        return made, schedule

    @property
    def models(self) -> Sequence[Stage]:
        """What runs here: this process's stages."""
        return self._stages

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
        stages, schedule = self._schedule(batches[0].tokens.shape)
        schedule.step(
            tokens,
            target=given["targets"],
            losses=losses,
            return_outputs=False,
            loss_weights=weights,
            **given,
            **({} if keys is None else {"keys": keys}),
        )
        for stage in stages:
            stage.finish()
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
        _, schedule = self._schedule(batches[0].tokens.shape)
        losses: Tensor | None = schedule.eval(tokens, target=given["targets"], **given)
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
