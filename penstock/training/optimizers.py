"""The optimizers there are, by the names of `optimizer.name`.

`train_run.py` makes one, the trainer and the train step use it. It must never know a model.
"""

from collections.abc import Iterable, Mapping

from torch import Tensor
from torch.nn import Parameter

from penstock.config.schema import OptimizerSection
from penstock.training.muon import Muon
from penstock.training.optimizer import AdamW
from penstock.training.torch_optimizer import TorchOptimizer

Optimizer = AdamW | Muon | TorchOptimizer

_OWN = {"adamw": AdamW, "muon": Muon}


def make_optimizer(
    named_parameters: Iterable[tuple[str, Parameter]],
    section: OptimizerSection,
    *,
    masters: Mapping[str, Tensor] | None = None,
) -> Optimizer:
    """The optimizer `section` names, with its state; see `AdamW`."""
    make = _OWN.get(section.name, TorchOptimizer)
    return make(named_parameters, section, masters=masters)
