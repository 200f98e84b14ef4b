"""Rotary positions in `config.json`, as `transformers` before and from version 5 writes them.

Families with rotary positions read and write theirs with it. It must never import torch.
"""

from typing import Any

from penstock.errors import ConfigError
from penstock.models.architecture import CHOICES, Architecture


def read_rotary(config: dict[str, Any], *, base: str, fraction: str) -> dict[str, Any]:
    """Architecture fields from "rope_parameters", or from "rope_scaling" and the keys named
    `base` and `fraction` that stood beside it.

    Raises:
        ConfigError: a kind of scaling that is not computed here.
    """
    given = dict(config.get("rope_parameters") or {})
    given = {**(config.get("rope_scaling") or {}), **given}
    kind = str(given.get("rope_type", given.get("type", "default")))
    scaling = "none" if kind == "default" else kind
    if scaling not in CHOICES["rotary_scaling"]:
        raise ConfigError(
            f"rope_type={kind} is not supported",
            where="config.json",
            do="use a model whose rope_type is default, linear or llama3",
        )
    fields = {
        "positions": "rotary",
        "rotary_base": float(given.get("rope_theta", config.get(base, 10000.0))),
        "rotary_scaling": scaling,
    }
    share = given.get("partial_rotary_factor", config.get(fraction))
    if share is not None:
        fields["rotary_fraction"] = float(share)
    if scaling != "none":
        fields["rotary_factor"] = float(given["factor"])
    if scaling == "llama3":
        fields["rotary_low"] = float(given["low_freq_factor"])
        fields["rotary_high"] = float(given["high_freq_factor"])
        trained = given.get("original_max_position_embeddings", config["max_position_embeddings"])
        fields["rotary_trained"] = int(trained)
    return fields


def rotary_scaling(architecture: Architecture) -> dict[str, Any] | None:
    """The value of "rope_scaling", which every version reads; None where there is none."""
    a = architecture
    if a.rotary_scaling == "none":
        return None
    scaling = {"rope_type": a.rotary_scaling, "factor": a.rotary_factor}
    if a.rotary_scaling == "linear":
        return scaling
    return {
        **scaling,
        "low_freq_factor": a.rotary_low,
        "high_freq_factor": a.rotary_high,
        "original_max_position_embeddings": a.rotary_trained,
    }
