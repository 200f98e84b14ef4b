"""A stage whose weights, gradients or optimizer state its replicas divide by FSDP2.

`pipeline.py` tells it where a schedule stands: passes of several micro-batches overlap, and
gradients of inputs and weights may be passes of their own. It must never know about schedules.
"""

from typing import Any

from torch import nn

from penstock.parallel.stage import Stage


class _Opaque(nn.Module):
    """Hides from torch's pipelines that a stage is divided: they would gather all of its weights
    for the whole step, and sum gradients at its end, whatever is asked for.
    """

    def __init__(self, stage: nn.Module) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, *args: Any, **more: Any) -> Any:  # noqa: ANN401 - the stage's own
        return self.stage(*args, **more)


class DividedStage:
    """When a stage's weights are gathered and its gradients summed, by `plan.shard`."""

    def __init__(self, stage: Stage, shard: str) -> None:
        """`stage` is divided already; `shard`: optimizer, gradients or weights."""
        self.opaque = _Opaque(stage)
        self._stage: Any = stage
        self._parts: list[Any] = [m for m in stage.modules() if hasattr(m, "unshard")]
        self._sums_late = shard == "optimizer"
        self._frees = shard == "weights"

    def begin(self, kind: str) -> None:
        """Before a backward pass: "full", or of an "input" or of "weight"s alone."""
        is_full = kind == "full"
        if self._frees and not is_full:
            # Torch looks for the gathered weights, and no hook of theirs sees such a pass.
            for part in self._parts:
                part.unshard()
        self._set(frees=self._frees and is_full, sums=is_full and not self._sums_late)

    def end(self, kind: str) -> None:
        """After it."""
        if kind == "weight" and not self._sums_late:
            self.take_up()
        if self._frees and kind != "full":
            self._free()

    def take_up(self) -> None:
        """Sum gradients that a pass without hooks has left, or keep them in float32 till later."""
        self._set(frees=False, sums=not self._sums_late)
        self._pass_on()

    def finish(self) -> None:
        """After a step's last pass: sum what is not yet, and leave all weights divided."""
        if self._sums_late:
            self._set(frees=True, sums=True)
            self._pass_on()
        self._free()

    def _set(self, *, frees: bool, sums: bool) -> None:
        self._stage.set_reshard_after_backward(frees)
        self._stage.set_requires_gradient_sync(sums)
        self._stage.set_is_last_backward(sums)

    def _free(self) -> None:
        for part in self._parts:
            part.reshard()

    def _pass_on(self) -> None:
        """What FSDP's hooks do after a backward pass, as torch's `perform_reduce_grad` has it."""
        state: Any = self._stage._get_fsdp_state()
        for part in state._state_ctx.all_states:
            for group in part._fsdp_param_groups:
                group.post_backward()
        state._root_post_backward_final_callback()
