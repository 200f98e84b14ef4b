"""The families a model can belong to: a closed registry, looked up by name."""

from types import ModuleType

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

PRESETS = {
    name: (family, fields) for family, m in FAMILIES.items() for name, fields in m.PRESETS.items()
}
"""Preset name → (family, architecture fields)."""
