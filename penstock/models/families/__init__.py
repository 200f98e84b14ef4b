"""The families a model can belong to: a closed registry, looked up by name."""

from types import ModuleType

from penstock.models.families import gpt2

FAMILIES: dict[str, ModuleType] = {"gpt2": gpt2}
"""Family name → module with PRESETS, from_hf_config, to_hf_config, hf_names."""

PRESETS = {
    name: (family, fields) for family, m in FAMILIES.items() for name, fields in m.PRESETS.items()
}
"""Preset name → (family, architecture fields)."""
