"""Optimizers of `torch.optim`, with fp32 masters, behind AdamW's interface.

The train step uses it like `AdamW`. It must never know the model's structure: it sees names and
parameters, nothing else.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from penstock.config.schema import OptimizerSection
from penstock.errors import CheckpointError
from penstock.training.masters import make_master
from penstock.training.parameter_groups import Trained, learning_rate_shares, parameter_groups

_KINDS: dict[str, tuple[Callable[..., Optimizer], Callable[[OptimizerSection], dict[str, Any]]]] = {
    "sgd": (torch.optim.SGD, lambda s: {"momentum": s.momentum}),
    "rmsprop": (torch.optim.RMSprop, lambda s: {"alpha": s.betas[1], "eps": s.eps}),
    "adagrad": (torch.optim.Adagrad, lambda s: {"eps": s.eps}),
    "adadelta": (torch.optim.Adadelta, lambda s: {"rho": s.betas[1], "eps": s.eps}),
    "adamax": (torch.optim.Adamax, lambda s: {"betas": s.betas, "eps": s.eps}),
    "nadam": (torch.optim.NAdam, lambda s: {"betas": s.betas, "eps": s.eps}),
    "radam": (torch.optim.RAdam, lambda s: {"betas": s.betas, "eps": s.eps}),
    "adafactor": (torch.optim.Adafactor, lambda _: {}),
}
"""optimizer.name → class of torch.optim, and what of the section it takes."""


class TorchOptimizer(Trained):
    """One of `torch.optim`, a parameter at a time, so that beside its state no more than one
    parameter's fp32 gradient is needed. Weight decay is decoupled in all of them, as in AdamW.

    A step that is skipped is found out about on the host: on a GPU it waits for the device.

    Source: torch.optim, each class by the paper it names; decoupled decay: Loshchilov & Hutter,
    arXiv 1711.05101, equation 9.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Parameter]],
        section: OptimizerSection,
        *,
        masters: dict[str, Tensor] | None = None,
        layers: int | None = None,
    ) -> None:
        """Make the masters; torch makes the rest at the first step. Arguments as for `AdamW`."""
        named = list(named_parameters)
        self._section = section
        decayed, others = parameter_groups(named, section.decay_all)
        self._decays = {name for name, _ in decayed}
        names = (name for name, _ in named)
        self._shares = learning_rate_shares(names, section.layer_decay, layers)
        self._parameters = dict(decayed + others)
        self._masters: dict[str, Parameter] = {}
        self._optimizers: dict[str, Optimizer] = {}
        for name, parameter in self._parameters.items():
            master = make_master(parameter.detach(), (masters or {}).get(name))
            self._masters[name] = Parameter(master)
            self._optimizers[name] = _make(section, self._masters[name])
        self._round_masters()

    def step(
        self,
        lr: float | Tensor,
        *,
        grad_norm: Tensor | None = None,
        skip: Tensor | None = None,
        gradients: Sequence[Tensor] | None = None,
    ) -> None:
        """Update all parameters; see `AdamW.step`."""
        self.before_step()
        gradients = self.gradients() if gradients is None else gradients
        if skip is not None and bool(skip):
            return
        scale = None
        if grad_norm is not None and self._section.clip is not None:
            scale = (grad_norm / self._section.clip).clamp(min=1.0)
        for (name, master), gradient in zip(self._masters.items(), gradients, strict=True):
            wide = gradient.to(torch.float32)
            master.grad = wide if scale is None else wide / scale
            optimizer, rate = self._optimizers[name], float(lr) * self._shares[name]
            if name in self._decays:
                with torch.no_grad():
                    master.mul_(1 - rate * self._section.weight_decay)
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
            master.grad = None
        self._steps += 1
        self._round_masters()

    def state_tensors(self) -> dict[str, Tensor]:
        """The state itself: fp32 `master.NAME`, and torch's own by its names, `KIND.NAME`."""
        state = {f"master.{name}": master.detach() for name, master in self._masters.items()}
        for name, master in self._masters.items():
            kept = self._optimizers[name].state.get(master, {})
            state |= {f"{kind}.{name}": v for kind, v in kept.items() if isinstance(v, Tensor)}
        return state

    @torch.no_grad()
    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up the state of `state_tensors` and set the parameters from the masters.

        Raises:
            CheckpointError: a name is missing or left over, or a shape differs; nothing has
                changed then.
        """
        left = dict(tensors)
        found: dict[str, dict[str, Tensor]] = {}
        for name, master in self._masters.items():
            shapes = {"master": master.shape, **_state_shapes(self._section, master)}
            given = {kind: left.pop(f"{kind}.{name}", None) for kind in shapes}
            # A run whose every step was skipped has masters only.
            has_state = any(value is not None for kind, value in given.items() if kind != "master")
            for kind, shape in shapes.items():
                value = given[kind]
                if value is None and (has_state or kind == "master"):
                    raise _misfit(f"{kind}.{name}")
                if value is not None and value.shape != shape:
                    raise _misfit(f"{kind}.{name}")
            found[name] = {kind: value for kind, value in given.items() if value is not None}
        if left:
            raise _misfit(min(left))
        for name, values in found.items():
            master = self._masters[name]
            master.copy_(values.pop("master"))
            # torch counts steps on the CPU.
            self._optimizers[name].state[master] = {
                kind: value.clone() if value.ndim == 0 else value.to(master.device, copy=True)
                for kind, value in values.items()
            }
        self._round_masters()

    @torch.no_grad()
    def _round_masters(self) -> None:
        """Set every parameter in the compute format from its master."""
        for name, parameter in self._parameters.items():
            if parameter.dtype != torch.float32:
                parameter.copy_(self._masters[name])


def _make(section: OptimizerSection, parameter: Tensor) -> Optimizer:
    kind, settings = _KINDS[section.name]
    return kind([parameter], lr=section.lr, **settings(section))


def _state_shapes(section: OptimizerSection, parameter: Tensor) -> dict[str, torch.Size]:
    """What torch keeps for a parameter of this shape, from a step of one without memory."""
    # torch 2.13's Adafactor reads values, which a tensor without memory has not.
    device = "cpu" if section.name == "adafactor" else "meta"
    trial = Parameter(torch.zeros_like(parameter, device=device))
    optimizer = _make(section, trial)
    trial.grad = torch.zeros_like(trial)
    optimizer.step()
    kept = optimizer.state[trial]
    return {kind: value.shape for kind, value in kept.items() if isinstance(value, Tensor)}


def _misfit(name: str) -> CheckpointError:
    return CheckpointError(
        f"the optimizer state does not fit: {name}",
        do="resume with the model and the optimizer the checkpoint was made with",
    )
