"""Names of activations in `config.json` and ours. Families read and write theirs with it.

It must never import torch.
"""

from penstock.errors import ConfigError

_OURS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
_THEIRS = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu", "silu": "silu"}


def read_activation(key: str, name: object) -> str:
    """Our name of what `transformers` calls `name`.

    Raises:
        ConfigError: an activation that is not computed here.
    """
    if name not in _OURS:
        raise ConfigError(
            f"{key}={name} is not supported",
            where="config.json",
            do=f"use a model with {', '.join(_OURS)}",
        )
    return _OURS[str(name)]


def write_activation(ours: str) -> str:
    """The name `transformers` knows it by."""
    return _THEIRS[ours]
