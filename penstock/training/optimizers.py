"""The optimizers there are, by the names of `optimizer.name`.

`train_run.py` makes one, the trainer and the train step use it. It must never know a model.
"""

from collections.abc import Iterable

from torch import Tensor
from torch.nn import Parameter

from penstock.config.schema import OptimizerSection
from penstock.errors import ConfigError
from penstock.training.adamw_8bit import AdamW8bit
from penstock.training.deepspeed_optimizer import DeepSpeedAdamW
from penstock.training.muon import Muon, Shares
from penstock.training.optimizer import AdamW
from penstock.training.torch_optimizer import TorchOptimizer

Optimizer = AdamW | DeepSpeedAdamW | Muon | TorchOptimizer

_OWN = {"adamw": AdamW, "adamw_8bit": AdamW8bit}


def make_optimizer(
    named_parameters: Iterable[tuple[str, Parameter]],
    section: OptimizerSection,
    *,
    masters: dict[str, Tensor] | None = None,
    layers: int | None = None,
    shares: Shares | None = None,
) -> Optimizer:
    """The optimizer `section` names, with its state; see `AdamW`, and for `shares` `Muon`.

    Raises:
        ConfigError: it needs a library that is not installed, or cannot do what is asked.
    """
    if section.name == "adamw_8bit" and section.layer_decay != 1.0:
        raise ConfigError(
            "optimizer.name=adamw_8bit has one learning rate for all layers",
            where="optimizer.layer_decay",
            do="leave it out, or use optimizer.name=adamw",
        )
    if section.name == "muon":
        return Muon(named_parameters, section, masters=masters, layers=layers, shares=shares)
    make = _OWN.get(section.name, TorchOptimizer)
    return make(named_parameters, section, masters=masters, layers=layers)
