"""From the user's `model` section to an `Architecture`: presets, folders, overrides. No torch."""

import dataclasses
import difflib
import json
from pathlib import Path
from typing import Any

from penstock.config.schema import ModelSection
from penstock.errors import CheckpointError, ConfigError
from penstock.models.architecture import Architecture
from penstock.models.families import FAMILIES, PRESETS
from penstock.models.hub import model_folder

_DEFAULT_FAMILY = "gpt2"


def resolve_architecture(section: ModelSection, vocab_size: int | None = None) -> Architecture:
    """The architecture `section` describes.

    Starts from `from`, `preset` or the family's smallest published shape, then applies every field
    the user has set. `vocab_size` is the tokenizer's, when it is known: it replaces a preset's.

    Raises:
        ConfigError: unknown preset or family, contradicting sizes, a vocabulary too small.
    """
    family, fields, fixed_vocabulary = _base(section)
    names = {field.name for field in dataclasses.fields(Architecture)}
    given = {k: v for k, v in section.model_dump().items() if k in names and v is not None}
    given.pop("family", None)
    if fields.get("generic") is not None:
        _require_its_own(family, given)
    if "dropout" in given:  # one rate for all places, but for those that have their own
        fields = {k: v for k, v in fields.items() if not k.endswith("_dropout")}
    fields = {**fields, **given}
    if not fixed_vocabulary and "vocab_size" not in given and vocab_size is not None:
        fields["vocab_size"] = vocab_size
    if vocab_size is not None and vocab_size > fields["vocab_size"]:
        raise ConfigError(
            f"the tokenizer has {vocab_size} tokens, the model only {fields['vocab_size']}",
            where="model.vocab_size",
            do=f"prepare the data with tokenizer.from={section.from_}"
            if fixed_vocabulary
            else f"set model.vocab_size={vocab_size} or use a smaller tokenizer",
        )
    _follow_width(fields, given)
    fields.setdefault("mlp_size", 4 * fields["hidden_size"])
    return Architecture(family=family, **fields)


def _follow_width(fields: dict[str, Any], given: dict[str, Any]) -> None:
    """Where only the width was changed and the heads no longer divide it, heads keep 64 elements,
    GPT-2's in all its sizes.
    """
    width, heads = fields["hidden_size"], fields["heads"]
    if "heads" not in given and "hidden_size" in given and width % heads and width % 64 == 0:
        fields["heads"] = width // 64
        if "kv_heads" not in given:
            fields.pop("kv_heads", None)


def _require_its_own(family: str, given: dict[str, Any]) -> None:
    """Refuse to change a generic model, but for its dropout: on as configured, or off."""
    for name, value in given.items():
        if (name, value) != ("dropout", 0.0):
            raise ConfigError(
                f"model.{name} cannot change {family}: it is not one of Penstock's families",
                where=f"model.{name}",
                do="change its config.json",
            )


def _base(section: ModelSection) -> tuple[str, dict[str, Any], bool]:
    """Family, fields to start from, and whether weights fix the vocabulary."""
    if section.from_ is not None:
        family, fields = read_hf_config(model_folder(section.from_))
        _require_family(section, family, section.from_)
        return family, fields, True
    if section.preset is not None:
        if section.preset not in PRESETS:
            near = difflib.get_close_matches(section.preset, PRESETS, 1)
            hint = f"did you mean {near[0]}?" if near else f"choose {', '.join(PRESETS)}"
            raise ConfigError(f"no preset {section.preset}", where="model.preset", do=hint)
        family, fields = PRESETS[section.preset]
        _require_family(section, family, section.preset)
        return family, dict(fields), False
    family = section.family or _DEFAULT_FAMILY
    if family not in FAMILIES:
        raise ConfigError(
            f"no family {family}", where="model.family", do=f"choose {', '.join(FAMILIES)}"
        )
    return family, dict(next(iter(FAMILIES[family].PRESETS.values()))), False


def _require_family(section: ModelSection, family: str, name: str) -> None:
    """Refuse a model of another family than the user asks for."""
    if section.family not in (None, family):
        raise ConfigError(
            f"{name} is a model of family {family}, not {section.family}",
            where="model.family",
            do=f"leave it out, or set model.family={family}",
        )


def read_hf_config(folder: Path) -> tuple[str, dict[str, Any]]:
    """Family and architecture fields from FOLDER/config.json in the Hugging Face layout.

    Raises:
        CheckpointError: no such file, or not a model of a known family.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_bytes())
        family = str(config["model_type"])
        if family in FAMILIES:
            fields = FAMILIES[family].from_hf_config(config)
        else:
            # Loaded for these models alone: it brings torch and transformers.
            from penstock.models.generic import generic_fields  # noqa: PLC0415

            fields = generic_fields(config)
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} is not a folder with a config.json",
            where="model.from",
            do="give a folder in the Hugging Face layout",
        ) from None
    except ImportError:
        raise CheckpointError(
            f"{path} is of none of our families, and transformers is not installed",
            where="model.from",
            do=f"pip install transformers, or use a model of {', '.join(FAMILIES)}",
        ) from None
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise CheckpointError(
            f"{path} does not describe a model Penstock knows ({error})",
            where="model.from",
            do=f"use a model of {', '.join(FAMILIES)}, or another language model of transformers",
        ) from None
    return family, fields
