"""The families a model can belong to: a closed registry, looked up by name."""

import json
from types import ModuleType
from typing import Any

from penstock.models.architecture import Architecture
from penstock.models.families import (
    albert,
    bert,
    distilbert,
    gpt2,
    gpt_neox,
    gptj,
    llama,
    roberta,
)

FAMILIES: dict[str, ModuleType] = {
    "gpt2": gpt2,
    "gpt_neox": gpt_neox,
    "gptj": gptj,
    "llama": llama,
    "bert": bert,
    "roberta": roberta,
    "distilbert": distilbert,
    "albert": albert,
}
"""Family name → module with PRESETS, SCALES_RESIDUAL, from_hf_config, to_hf_config, hf_names,
PREFIX, RENAMED and IGNORED_SUFFIXES."""


def hf_config(
    architecture: Architecture, end_of_text: int | None, begin: int | None = None
) -> dict[str, Any]:
    """The config.json `transformers` reads for an architecture, with the tokens that end and begin
    a text.
    """
    if architecture.generic is not None:
        return json.loads(architecture.generic)
    config = FAMILIES[architecture.family].to_hf_config(architecture, end_of_text)
    is_told = architecture.is_causal and begin is not None
    return {**config, "bos_token_id": begin} if is_told else config


PRESETS = {
    name: (family, fields) for family, m in FAMILIES.items() for name, fields in m.PRESETS.items()
}
"""Preset name → (family, architecture fields)."""
