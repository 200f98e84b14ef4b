"""Muon for the blocks' matrices, AdamW for everything else, behind AdamW's interface.

The train step uses it like `AdamW`. It must never know the model's structure beyond names.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import Parameter

from penstock.config.schema import OptimizerSection
from penstock.errors import CheckpointError
from penstock.tensors import OnDemand, in_pieces
from penstock.training.masters import make_master
from penstock.training.optimizer import AdamW
from penstock.training.parameter_groups import Kernel, Trained, learning_rate_shares

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Quintic Newton–Schulz iteration, chosen by Jordan for the steepest slope at zero."""
_ITERATIONS = 5
_RMS = 0.2
"""RMS of an AdamW update, which Muon's is scaled to (Liu et al., arXiv 2502.16982, §2.2), so that
one learning rate serves both."""


class Shares(Protocol):
    """What one process knows of matrices of which it holds a share; see `parallel/tensor.py`."""

    def whole(self, name: str, own: Tensor) -> Tensor:
        """The whole matrix of a name, from this process's and the others' shares of it."""
        ...

    def own(self, name: str, whole: Tensor) -> Tensor:
        """This process's share of a whole matrix."""
        ...


class Muon(Trained):
    """Momentum, orthogonalized by Newton–Schulz, for matrices; AdamW for the other parameters.

    Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024), with
    Nesterov momentum; scaling and decoupled decay as in Liu et al., arXiv 2502.16982, equation 4.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Parameter]],
        section: OptimizerSection,
        *,
        masters: dict[str, Tensor] | None = None,
        layers: int | None = None,
        shares: Shares | None = None,
    ) -> None:
        """Make the state; `masters` and `layers` as for `AdamW`; `shares`: where blocks are
        divided, so that whole matrices are orthogonalized.
        """
        self._divided = shares
        named = dict(named_parameters)
        self._section = section
        self._shares = learning_rate_shares(named, section.layer_decay, layers)
        self._matrices = {n: p for n, p in named.items() if _is_hidden_matrix(n, p)}
        others = [(n, p) for n, p in named.items() if n not in self._matrices]
        self._adamw = AdamW(others, section, masters=masters, layers=layers)
        self._masters: dict[str, Tensor] = {}
        self._momenta: dict[str, Tensor] = {}
        for name, parameter in self._matrices.items():
            weight = parameter.detach()
            self._masters[name] = make_master(weight, (masters or {}).get(name))
            parameter.detach().copy_(self._masters[name])
            self._momenta[name] = torch.zeros_like(weight, dtype=torch.float32)
        self._parameters = {name: p for name, p in named.items() if p.requires_grad}

    def use_kernels(self, adamw: Kernel, squares: Kernel) -> None:
        """See `Trained`: matrices are not AdamW's."""
        self.squares = squares
        self._adamw.use_kernels(adamw, squares)

    @property
    def steps(self) -> int:
        """Updates applied so far."""
        return self._adamw.steps

    @steps.setter
    def steps(self, value: int) -> None:
        """Go on after `value` updates."""
        self._adamw.steps = value

    @torch.no_grad()
    def step(
        self,
        lr: float | Tensor,
        *,
        grad_norm: Tensor | None = None,
        skip: Tensor | None = None,
        gradients: Sequence[Tensor] | None = None,
    ) -> None:
        """Update all parameters; see `AdamW.step`. Clipping leaves Muon's direction as it is."""
        self.before_step()
        gradients = self.gradients() if gradients is None else gradients
        by_name = dict(zip(self._parameters, gradients, strict=True))
        others = [by_name[name] for name in self._adamw.names]
        self._adamw.step(lr, grad_norm=grad_norm, skip=skip, gradients=others)
        keep = torch.ones(()) if skip is None else 1.0 - skip.float()
        for names in self._by_shape():
            self._update(names, [by_name[name] for name in names], lr, keep)

    def _update(
        self, names: Sequence[str], gradients: Sequence[Tensor], lr: float | Tensor, keep: Tensor
    ) -> None:
        """Update matrices of one shape together; where `keep` is 0 nothing changes."""
        beta = self._section.momentum
        stacked = torch.nan_to_num(torch.stack([g.float() for g in gradients]))
        momenta = torch.stack([self._momenta[name] for name in names])
        momenta = torch.lerp(momenta, momenta * beta + stacked * (1 - beta), keep)
        ahead = stacked * (1 - beta) + momenta * beta
        if self._divided is None:
            updates = orthogonalize(ahead)
            scale = _RMS * max(updates.shape[-2:]) ** 0.5
        else:
            pairs = zip(names, ahead, strict=True)
            whole = orthogonalize(torch.stack([self._divided.whole(*pair) for pair in pairs]))
            scale = _RMS * max(whole.shape[-2:]) ** 0.5
            pairs = zip(names, whole, strict=True)
            updates = torch.stack([self._divided.own(*pair) for pair in pairs])
        for name, momentum, change in zip(names, momenta, updates, strict=True):
            master, rate = self._masters[name], lr * self._shares[name]
            master.mul_(1 - keep * rate * self._section.weight_decay)
            master.sub_(change.float() * (keep * rate * scale))
            self._momenta[name].copy_(momentum)
            weight = self._parameters[name].detach()
            if weight.data_ptr() != master.data_ptr():
                weight.copy_(master)

    def state_tensors(self) -> Mapping[str, Tensor]:
        """The state itself: AdamW's, and `master.NAME` and `momentum.NAME` of the matrices."""
        adamw, own = self._adamw.state_tensors(), self._own()
        return OnDemand(
            [*adamw, *own],
            lambda name: own[name] if name in own else adamw[name],
            lambda name: in_pieces(own if name in own else adamw, name),
        )

    def _own(self) -> dict[str, Tensor]:
        """The state of the matrices."""
        own = {f"master.{name}": value for name, value in self._masters.items()}
        return own | {f"momentum.{name}": value for name, value in self._momenta.items()}

    @torch.no_grad()
    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up the state of `state_tensors`.

        Raises:
            CheckpointError: a name is missing or left over, or a shape differs.
        """
        own = self._own()
        for name, value in own.items():
            if name not in tensors or tensors[name].shape != value.shape:
                raise CheckpointError(
                    f"the optimizer state does not fit: {name}",
                    do="resume with the optimizer the checkpoint was made with",
                )
        self._adamw.load_state_tensors({k: v for k, v in tensors.items() if k not in own})
        for name, value in own.items():
            value.copy_(tensors[name])
        for name, parameter in self._matrices.items():
            parameter.copy_(self._masters[name])

    def _by_shape(self) -> list[list[str]]:
        """Names of the matrices, those of one shape together."""
        groups: dict[tuple[int | str, ...], list[str]] = {}
        for name, parameter in self._matrices.items():
            # Shares of one shape may be of matrices of several.
            place = name.split(".", 2)[2] if self._divided is not None else ""
            groups.setdefault((*parameter.shape, place), []).append(name)
        return list(groups.values())


def _is_hidden_matrix(name: str, parameter: Parameter) -> bool:
    """Whether a parameter is a matrix inside a block."""
    return parameter.requires_grad and parameter.ndim == 2 and name.startswith("blocks.")


def orthogonalize(matrices: Float[Tensor, "... rows columns"]) -> Float[Tensor, "... rows columns"]:
    """Replace the singular values of each (N, rows, columns) float32 by about 1, in bf16.

    Five Newton–Schulz steps bring them into 0.7…1.2, which is as good as exact for training.
    """
    a, b, c = _COEFFICIENTS
    x = matrices / (torch.linalg.matrix_norm(matrices, keepdim=True) + 1e-7)
    x = x.bfloat16()
    is_tall = x.shape[-2] > x.shape[-1]
    if is_tall:
        x = x.mT
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if is_tall else x
