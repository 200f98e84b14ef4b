"""AdamW whose moments take eight bits each, quantized by blocks, behind `AdamW`'s interface.

The update is bitsandbytes', an optional library. It must never know the model's structure: it sees
names and parameters, nothing else.
"""

import importlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from penstock.config.schema import OptimizerSection
from penstock.errors import ConfigError
from penstock.parallel.replicas import local
from penstock.training.masters import make_master
from penstock.training.optimizer import AdamW, parameter_groups

_BLOCK = 256
"""Elements that share one scale; the library's, fixed."""
_SMALLEST = 4096
"""Elements below which moments stay float32, as the library's own optimizers do it."""
_PIECE = 1 << 20
"""Elements updated at a time, so that the float32 copies of their moments stay small."""


class AdamW8bit(AdamW):
    """AdamW with float32 masters and moments in 8 bits: 6 bytes of state per parameter, not 12.

    Source: Dettmers et al., arXiv 2110.02861 (block-wise dynamic quantization), in bitsandbytes'
    implementation; otherwise as `optimizer.AdamW`.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Parameter]],
        section: OptimizerSection,
        *,
        masters: dict[str, Tensor] | None = None,
        layers: int | None = None,
    ) -> None:
        """Make the state; arguments as for `optimizer.AdamW`.

        Raises:
            ConfigError: bitsandbytes is not installed.
        """
        self._section = section
        self._maps = _quantization_maps()
        decayed, others = parameter_groups(named_parameters, section.decay_all)
        self._decayed = len(decayed)
        self._parameters = dict(decayed + others)
        self._masters: dict[str, Tensor] = {}
        self._moments: dict[str, Tensor] = {}
        self._weights = {name: local(p.detach()) for name, p in self._parameters.items()}
        for name, weight in self._weights.items():
            self._masters[name] = make_master(weight, (masters or {}).get(name))
            for moment, levels in zip(("exp_avg", "exp_avg_sq"), self._maps, strict=True):
                if not _is_quantized(weight):
                    zeros = torch.zeros_like(weight, dtype=torch.float32)
                    self._moments[f"{moment}.{name}"] = zeros
                    continue
                zero = int(levels.abs().argmin())
                codes = torch.full_like(weight, zero, dtype=torch.uint8)
                scales = torch.zeros(-(-weight.numel() // _BLOCK), device=weight.device)
                self._moments[f"{moment}.{name}"] = codes
                self._moments[f"{moment}_scale.{name}"] = scales
        self._count = 0
        self._set_weights()

    @property
    def steps(self) -> int:
        """Updates applied so far."""
        return self._count

    @steps.setter
    def steps(self, value: int) -> None:
        """Go on after `value` updates, as a resumed run does."""
        self._count = value

    @torch.no_grad()
    def step(
        self,
        lr: float | Tensor,
        *,
        grad_norm: Tensor | None = None,
        skip: Tensor | None = None,
        gradients: Sequence[Tensor] | None = None,
    ) -> None:
        """Update all parameters; arguments as for `optimizer.AdamW.step`. Waits for the device,
        since the library takes clipping and bias correction as numbers.
        """
        self.before_step()
        if skip is not None and bool(skip):
            return
        gradients = self.gradients() if gradients is None else gradients
        clip, scale = self._section.clip, 1.0
        if grad_norm is not None and clip is not None:
            scale = 1.0 / max(1.0, float(grad_norm) / clip)
        self._count += 1
        for index, (name, gradient) in enumerate(zip(self._parameters, gradients, strict=True)):
            decay = self._section.weight_decay if index < self._decayed else 0.0
            if _is_quantized(self._masters[name]):
                self._update(name, gradient, float(lr), decay, scale)
            else:
                self._update_small(name, gradient, float(lr), decay, scale)
        self._set_weights()

    def _update(
        self, name: str, gradient: Tensor, lr: float, weight_decay: float, scale: float
    ) -> None:
        """One parameter with quantized moments, piece by piece."""
        flat = gradient.reshape(-1)
        master = self._masters[name].view(-1)
        codes = [self._moments[f"{moment}.{name}"].view(-1) for moment in ("exp_avg", "exp_avg_sq")]
        scales = [self._moments[f"{m}_scale.{name}"] for m in ("exp_avg", "exp_avg_sq")]
        beta1, beta2 = self._section.betas
        for start in range(0, len(flat), _PIECE):
            place = slice(start, start + _PIECE)
            blocks = slice(start // _BLOCK, (start + _PIECE) // _BLOCK)
            torch.ops.bitsandbytes.optimizer_update_8bit_blockwise(
                "adam",
                flat[place].float(),
                master[place],
                codes[0][place],
                codes[1][place],
                beta1,
                beta2,
                0.0,
                0.0,
                self._section.eps,
                self._count,
                lr,
                *self._maps,
                scales[0][blocks],
                scales[1][blocks],
                weight_decay,
                scale,
                False,
            )

    def _update_small(
        self, name: str, gradient: Tensor, lr: float, weight_decay: float, scale: float
    ) -> None:
        """One parameter with float32 moments, by torch's fused kernel."""
        beta1, beta2 = self._section.betas
        count = torch.tensor(float(self._count), device=gradient.device)
        torch._fused_adamw_(
            [self._masters[name]],
            [gradient.float() * scale],
            [self._moments[f"exp_avg.{name}"]],
            [self._moments[f"exp_avg_sq.{name}"]],
            [],
            [count],
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            weight_decay=weight_decay,
            eps=self._section.eps,
            amsgrad=False,
            maximize=False,
        )

    def state_tensors(self) -> dict[str, Tensor]:
        """Return the state itself, not a copy: fp32 `master.NAME`; `exp_avg.NAME` and
        `exp_avg_sq.NAME` uint8 with a scale fp32 per block, or fp32 where they are small.
        """
        return {**{f"master.{name}": m for name, m in self._masters.items()}, **self._moments}

    def _take_up(self, tensors: Mapping[str, Tensor]) -> None:
        for name, own in self.state_tensors().items():
            own.copy_(tensors[name])
        self._set_weights()

    def _set_weights(self) -> None:
        """Set every parameter in the compute format from its master."""
        for name, weight in self._weights.items():
            if weight.dtype != torch.float32:
                weight.copy_(self._masters[name])


def _is_quantized(weight: Tensor) -> bool:
    return weight.numel() >= _SMALLEST


def _quantization_maps() -> tuple[Tensor, Tensor]:
    """The library's 256 levels of signed and of unsigned numbers; registers its operators."""
    # It tells of kernels for inference that are not installed; nothing here needs them.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        library: Any = importlib.import_module("bitsandbytes.functional")
    except ImportError:
        raise ConfigError(
            "optimizer.name=adamw_8bit needs bitsandbytes, which is not installed",
            where="optimizer.name",
            do="pip install 'penstock[8bit]'",
        ) from None
    return library.create_dynamic_map(signed=True), library.create_dynamic_map(signed=False)
