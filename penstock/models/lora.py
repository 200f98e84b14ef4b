"""From the user's `lora` section, or a folder in PEFT's format, to an `Adapter`. No torch.

Planning calls `adapted`, `models/peft_format.py` reads and writes the tensors. It must never know
about training.
"""

import dataclasses
import difflib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors

from penstock.config.lora import LoraSection
from penstock.errors import CheckpointError, ConfigError
from penstock.models.adapter import Adapter, Site
from penstock.models.architecture import Architecture
from penstock.models.families import FAMILIES

PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_BLOCK = "blocks.0."
_WEIGHT = ".weight"
_QUERY_KEY_VALUE = "attention.query_key_value"
_ALL = "all-linear"
_ALPHA = 16.0

_PLAIN = {
    "alora_invocation_tokens", "arrow_config", "bias", "exclude_modules", "kasa_config",
    "layer_replication", "layers_to_transform", "lora_bias", "monteclora_config", "modules_to_save",
    "target_parameters", "trainable_token_indices", "use_bdlora", "use_dora", "use_qalora",
    "velora_config", "rank_pattern", "alpha_pattern",
}  # fmt: skip
"""Settings of PEFT (0.21, `LoraConfig`) that change what is computed; each must be off."""


def adapted(architecture: Architecture, section: LoraSection) -> Architecture:
    """The architecture with the adapters `section` asks for, if it asks for any.

    Raises:
        ConfigError: no layer of a target's name, or settings that contradict each other.
        CheckpointError: `lora.from` is no adapter, or not one for this architecture.
    """
    given = [name for name in ("rank", "alpha", "targets") if getattr(section, name)]
    if architecture.generic is not None and (given or section.from_ is not None):
        raise ConfigError(
            f"{architecture.family} is not one of Penstock's families: it takes no adapters",
            where="lora",
            do="leave lora out",
        )
    if section.from_ is not None:
        if given:
            raise ConfigError(
                f"lora.{given[0]} and lora.from are both given",
                where=f"lora.{given[0]}",
                do="leave it out: it is the adapter's own",
            )
        adapter = _read_adapter(Path(section.from_), architecture, section.dropout)
    elif section.rank is not None:
        sites = _chosen(section.targets, architecture)
        adapter = Adapter(section.rank, section.alpha or _ALPHA, section.dropout, sites)
    elif given or section.base is not None:
        given = [*given, "base"]
        raise ConfigError(
            f"lora.{given[0]} is set, but there are no adapters",
            where="lora.rank",
            do="set lora.rank, or lora.from",
        )
    else:
        return architecture
    adapter = dataclasses.replace(adapter, base=section.base)
    return dataclasses.replace(architecture, adapter=adapter)


def sites_of(architecture: Architecture) -> list[tuple[Site, str]]:
    """Every layer of a block that can have an adapter, and its full path in `transformers`'
    first block.
    """
    found: list[tuple[Site, str]] = []
    for ours, place in FAMILIES[architecture.family].hf_names(architecture).items():
        linear = ours.removeprefix(_BLOCK).removesuffix(_WEIGHT)
        if linear not in _shapes(architecture) or not ours.startswith(_BLOCK):
            continue
        if not ours.endswith(_WEIGHT):
            continue
        rows, columns = _shapes(architecture)[linear]
        start = 0
        for name, count in zip(place.names, place.rows or (rows,), strict=True):
            path = name.removesuffix(_WEIGHT)
            site = Site(linear, path.partition(".0.")[2], start, count, columns)
            found.append((site, path))
            start += count
    return found


def peft_paths(architecture: Architecture) -> Iterator[tuple[int, Site, str]]:
    """Of every adapter: its layer, its site, and the path of its module in `transformers`."""
    names = FAMILIES[architecture.family].hf_names(architecture)
    adapter = architecture.adapter
    for layer in range(architecture.layers):
        for site in () if adapter is None else adapter.sites:
            place = names.get(f"blocks.{layer}.{site.linear}{_WEIGHT}")
            for name in () if place is None else place.names:
                path = name.removesuffix(_WEIGHT)
                if path.endswith(f".{site.name}"):
                    yield layer, site, path


def peft_config(architecture: Architecture, base: str | None) -> dict[str, Any]:
    """The adapter_config.json PEFT reads for an architecture with adapters."""
    adapter, family = architecture.adapter, FAMILIES[architecture.family]
    assert adapter is not None  # noqa: S101 - only runs with adapters are written
    names = family.hf_names(architecture)
    paths = {path for _, _, path in peft_paths(architecture)}
    everywhere = [n.removesuffix(_WEIGHT) for place in names.values() for n in place.names]
    short = sorted({site.name for site in adapter.sites})
    for words in (1, 2):
        endings = {".".join(path.split(".")[-words:]) for path in paths}
        if {p for p in everywhere if p.endswith(tuple(f".{e}" for e in endings))} == paths:
            short = sorted(endings)
            break
    else:
        short = sorted(paths)
    return {
        "peft_type": "LORA",
        # PEFT has no task of its own for masked models: without one it wraps any model as it is.
        "task_type": "CAUSAL_LM" if architecture.is_causal else None,
        "base_model_name_or_path": base,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": adapter.dropout,
        "target_modules": short,
        "fan_in_fan_out": any(place.transposed for place in names.values()),
        "bias": "none",
        "inference_mode": True,
    }


def _shapes(architecture: Architecture) -> dict[str, tuple[int, int]]:
    """Rows and columns of a block's linear layers, by our names."""
    a = architecture
    gate = {"mlp.gate": (a.mlp_size, a.hidden_size)} if a.gated_mlp else {}
    return {
        _QUERY_KEY_VALUE: (a.hidden_size + 2 * a.kv_size, a.hidden_size),
        "attention.output": (a.hidden_size, a.hidden_size),
        "mlp.up": (a.mlp_size, a.hidden_size),
        "mlp.down": (a.hidden_size, a.mlp_size),
        **gate,
    }


def _chosen(targets: list[str], architecture: Architecture) -> tuple[Site, ...]:
    """The sites the user names, in the blocks' order; PEFT's rule: a path or its last words."""
    sites = sites_of(architecture)
    if not targets:
        fused = [site for site, _ in sites if site.linear == _QUERY_KEY_VALUE]
        return tuple(fused[::2])  # the one fused layer, or queries and values
    if _ALL in targets:
        return tuple(site for site, _ in sites)
    chosen: set[Site] = set()
    for target in targets:
        matching = {
            site
            for site, path in sites
            if any(f".{name}".endswith(f".{target}") for name in (path, site.linear))
        }
        if not matching:
            raise _unknown(target, sites)
        chosen |= matching
    return tuple(site for site, _ in sites if site in chosen)


def _unknown(target: str, sites: list[tuple[Site, str]]) -> ConfigError:
    known = list(dict.fromkeys(n for site, _ in sites for n in (site.key, site.name, site.linear)))
    near = difflib.get_close_matches(target, known, 3, 0.5) or list(
        dict.fromkeys(site.key for site, _ in sites)
    )
    return ConfigError(
        f"no block has a linear layer {target}",
        where="lora.targets",
        do=f"use {', '.join(near)}, or {_ALL}",
    )


def _read_adapter(folder: Path, architecture: Architecture, dropout: float) -> Adapter:
    """What a folder in PEFT's format holds: settings from its config, sites from its tensors."""
    config = _read_config(folder)
    try:
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
    except (KeyError, TypeError, ValueError):
        raise _misfit(folder, "its r and lora_alpha are missing") from None
    if rank < 1 or not (math.isfinite(alpha) and alpha > 0):
        raise _misfit(folder, f"r={rank} and lora_alpha={alpha} are no adapter's")
    # Rank-stabilized (arXiv 2312.03732): alpha / sqrt(rank), the same as a larger alpha.
    alpha = alpha * math.sqrt(rank) if config.get("use_rslora") else alpha
    present = {name.partition(".lora_A.")[0] for name in tensor_names(folder) if ".lora_A." in name}
    sites = tuple(s for s, path in sites_of(architecture) if f"base_model.model.{path}" in present)
    if not sites:
        raise _misfit(folder, f"it has no adapters for a model of family {architecture.family}")
    return Adapter(rank, alpha, dropout, sites)


def _read_config(folder: Path) -> dict[str, Any]:
    """A folder's adapter_config.json, of a kind of adapter that is computed here."""
    try:
        config = json.loads((folder / PEFT_CONFIG).read_bytes())
        settings = {name: config.get(name) for name in _PLAIN}
        kind, start = config.get("peft_type"), config.get("init_lora_weights")
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} has no {PEFT_CONFIG}", where="lora.from", do="give a folder PEFT has written"
        ) from None
    except (OSError, ValueError, AttributeError, RecursionError):
        raise _misfit(folder, f"{PEFT_CONFIG} does not read") from None
    if kind != "LORA":
        raise _misfit(folder, f"its peft_type is {kind}, not LORA")
    for name, value in settings.items():
        if value and value != "none":
            raise _misfit(folder, f"{name}={value} is not supported")
    if isinstance(start, str) and start.startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        raise _misfit(folder, f"init_lora_weights={start} has changed the model's own weights")
    return config


def tensor_names(folder: Path) -> list[str]:
    """Names of an adapter's tensors.

    Raises:
        CheckpointError: no file, or a damaged one.
    """
    try:
        with safetensors.safe_open(folder / PEFT_WEIGHTS, "np") as file:
            return list(file.keys())
    except (OSError, safetensors.SafetensorError) as error:
        raise _misfit(folder, f"{PEFT_WEIGHTS} cannot be read ({error})") from None


def _misfit(folder: Path, how: str) -> CheckpointError:
    return CheckpointError(
        f"the adapter in {folder} cannot be used: {how}",
        where="lora.from",
        do="give the adapter and the model.from it was trained on",
    )
