"""Initial weights of every family, each tensor from its own stream of the one seed.

`api` calls `initialize` on a fresh model. It must never use a global generator.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from penstock.models.architecture import Architecture
from penstock.models.families import FAMILIES
from penstock.models.transformer import Transformer

_STANDARD_DEVIATION = 0.02
_RESIDUAL = ("attention.output.weight", "mlp.down.weight")


def every(_name: str) -> bool:
    """That a process holds all parameters of its model."""
    return True


def unfilled(
    architecture: Architecture,
    device: str,
    dtype: torch.dtype,
    holds: Callable[[str], bool] = every,
) -> Transformer:
    """A model whose parameters are memory not yet written to: torch's own default values would
    take a second to draw (GPT-2 124M). Those it does not hold, by name, stay without memory, on
    the device "meta".
    """
    with torch.device("meta"):
        model = Transformer(architecture)
    for path, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not holds(f"{path}.{name}"):
                continue
            # Not `to_empty`: it loads 480 modules (23 MiB, torch 2.13).
            place = torch.empty(parameter.shape, dtype=dtype, device=device)
            setattr(module, name, Parameter(place))
    if architecture.tie_embeddings:
        model.head.projection.weight = model.embed.tokens.weight
    return model


def held_parameters(model: nn.Module) -> Iterator[tuple[str, Parameter]]:
    """The parameters that have memory, by name."""
    return ((name, p) for name, p in model.named_parameters() if not p.is_meta)


@torch.no_grad()
def initialize(model: Transformer, seed: int) -> None:
    """Draw every weight of `model` in place, the same whatever its dtype, the order of modules
    and what else it holds.

    Matrices and embeddings ~ N(0, 0.02); in families that ask for it, the two projections that
    write to the residual stream are scaled by 1/sqrt(2·layers); biases 0, norms 1; padded
    vocabulary rows 0. Sources: `transformers`' initialization of each family; Radford et al.,
    "Language Models are Unsupervised Multitask Learners" (2019), §2.3, and its code.
    """
    architecture = model.architecture
    scales_residual = FAMILIES[architecture.family].SCALES_RESIDUAL
    drawn: list[tuple[Parameter, float, int]] = []
    for name, parameter in held_parameters(model):
        if ".adapters." in name:
            parameter.copy_(initial_adapter(name, parameter.shape, seed))
        elif name.endswith("bias"):
            parameter.zero_()
        elif "norm" in name:
            parameter.fill_(1.0)
        else:
            scale = _STANDARD_DEVIATION
            if scales_residual and name.endswith(_RESIDUAL):
                scale /= math.sqrt(2 * architecture.layers)
            drawn.append((parameter, scale, _stream_seed(seed, name)))
    # Torch draws on one core.
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(lambda draw: _draw_normal(*draw), drawn))
    model.embed.tokens.weight[architecture.vocab_size :] = 0
    model.head.projection.weight[architecture.vocab_size :] = 0


@torch.no_grad()
def _draw_normal(parameter: Parameter, scale: float, seed: int) -> None:
    """Fill a parameter from N(0, scale), drawn in float32."""
    generator = torch.Generator().manual_seed(seed)
    if parameter.dtype == torch.float32:
        parameter.normal_(0, scale, generator=generator)
    else:
        parameter.copy_(torch.empty(parameter.shape).normal_(0, scale, generator=generator))


def initial_adapter(name: str, shape: torch.Size, seed: int) -> Tensor:
    """A low-rank adapter's start, float32: B is 0, A uniform within 1/sqrt(columns) of 0, so that
    training starts from the model as it is (LoRA's published code, and PEFT).
    """
    if name.endswith(".up"):
        return torch.zeros(shape)
    generator = torch.Generator().manual_seed(_stream_seed(seed, name))
    return (torch.rand(shape, generator=generator) * 2 - 1) / math.sqrt(shape[1])


def _stream_seed(seed: int, name: str) -> int:
    """A 63-bit seed of the stream `name`."""
    digest = hashlib.sha256(f"initialize/{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
