"""AdamW behind DeepSpeed's engine, with the interface and the saved state of `optimizer.AdamW`.

`train_parts.py` makes it where `plan.engine` is deepspeed; the train step uses it like `AdamW`. It
must never know the model's structure: it sees names and parameters, nothing else.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from penstock.config.schema import OptimizerSection
from penstock.errors import CheckpointError
from penstock.parallel.deepspeed_engine import Engine
from penstock.tensors import OnDemand
from penstock.training.parameter_groups import Trained, learning_rate_shares, parameter_groups

_MOMENTS = ("exp_avg", "exp_avg_sq")


class _AdamW(torch.optim.AdamW):
    """Torch's, which DeepSpeed steps for every group; a step that `skips` changes nothing."""

    skips = False

    def step(self, closure: Any = None) -> None:  # noqa: ANN401 # pyright: ignore[reportIncompatibleMethodOverride] - torch's has overloads
        if not self.skips:
            super().step(closure)


class DeepSpeedAdamW(Trained):
    """AdamW whose float32 masters and moments DeepSpeed's engine divides among processes.

    A step that is skipped is found out about on the host: on a GPU it waits for the device.

    Source: as `optimizer.AdamW`, in torch's implementation (fused).
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Parameter]],
        section: OptimizerSection,
        start: Callable[[torch.optim.Optimizer], Engine],
        masters: Mapping[str, Tensor],
    ) -> None:
        """Have `start` make the engine that will step torch's optimizer; zero moments.

        Args:
            named_parameters: a model's `named_parameters()`, before the engine divides them.
            section: the user's `optimizer` settings; clipping is the engine's.
            start: makes the engine from the optimizer.
            masters: whole float32 values more exact than the parameters hold, by parameter name.
        """
        named = list(named_parameters)
        decayed, others = parameter_groups(named, section.decay_all)
        self._parameters = dict(decayed + others)
        # Where weights are divided nothing is left of them.
        self._shapes = {name: parameter.shape for name, parameter in named}
        shares = learning_rate_shares([name for name, _ in named], section.layer_decay)
        groups: dict[tuple[float, float], list[Parameter]] = {}
        for members, decay in ((decayed, section.weight_decay), (others, 0.0)):
            for name, parameter in members:
                groups.setdefault((decay, shares[name]), []).append(parameter)
        self._adam = _AdamW(
            [{"params": p, "weight_decay": d, "share": s} for (d, s), p in groups.items()],
            lr=section.lr, betas=section.betas, eps=section.eps, fused=True,
        )  # fmt: skip
        self.engine = start(self._adam)
        self.engine.start({part: _zeros(part) for part in self.engine.partitions()})
        for name, master in masters.items():
            self.engine.put(self._parameters[name], master)

    @Trained.steps.setter
    def steps(self, value: int) -> None:
        """Go on after `value` updates, as a resumed run does."""
        self._steps = value
        for state in self._adam.state.values():
            state["step"].fill_(value)

    def gradients(self) -> list[Tensor]:
        """This process's parts of the step's gradients, in the order of `names`."""
        return [self.engine.gradient(parameter) for parameter in self._parameters.values()]

    def zero_gradients(self) -> None:
        """Nothing: the engine has let them go in `step`."""

    def step(
        self,
        lr: float | Tensor,
        *,
        grad_norm: Tensor | None = None,
        skip: Tensor | None = None,
        gradients: Sequence[Tensor] | None = None,
    ) -> None:
        """Update all parameters; `gradients` are those the engine has, which clips them itself by
        the `grad_norm` it takes. See `AdamW.step`.
        """
        self.before_step()
        self._adam.skips = skip is not None and bool(skip)
        for group in self._adam.param_groups:
            group["lr"] = float(lr) * group["share"]
        self.engine.step()
        self._steps += not self._adam.skips

    def state_tensors(self) -> Mapping[str, Tensor]:
        """As `AdamW.state_tensors`: whole, gathered when asked for, which all processes must do."""
        return OnDemand(self._names(), self._state)

    def _names(self) -> list[str]:
        return [f"{kind}.{name}" for kind in ("master", *_MOMENTS) for name in self._parameters]

    def _state(self, name: str) -> Tensor:
        kind, _, parameter = name.partition(".")
        return self.engine.whole(self._parameters[parameter], None if kind == "master" else kind)

    @torch.no_grad()
    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up the whole state of `state_tensors` and set the parameters from the masters.

        Raises:
            CheckpointError: a name is missing or left over, or a size differs; nothing has changed
                then.
        """
        names = self._names()
        unequal = sorted(set(names) ^ tensors.keys()) or [
            name for name in names if tensors[name].shape != self._shapes[name.partition(".")[2]]
        ]
        if unequal:
            raise CheckpointError(
                f"the optimizer state does not fit the model: {unequal[0]} (one of {len(unequal)})",
                do="train the architecture the checkpoint was made with",
            )
        for name in names:
            kind, _, parameter = name.partition(".")
            self.engine.put(
                self._parameters[parameter], tensors[name], None if kind == "master" else kind
            )


def _zeros(partition: Tensor) -> dict[str, Tensor]:
    """Torch's state of a tensor before its first update."""
    count = torch.zeros((), dtype=torch.float32, device=partition.device)
    return {"step": count, **{kind: torch.zeros_like(partition) for kind in _MOMENTS}}
