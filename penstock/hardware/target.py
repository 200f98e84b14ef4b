"""A machine to plan for: its memory, speed and formats, from a YAML file or detected.

`compiler/plan.py` and `api` use it. It must never import torch.
"""

import dataclasses
import difflib
from pathlib import Path
from typing import Any

import yaml

from penstock.errors import ConfigError

TARGETS_FOLDER = Path(__file__).parent / "targets"


@dataclasses.dataclass(frozen=True)
class Target:
    """One kind of machine. Figures are of one device."""

    name: str
    device: str
    """cpu or cuda."""
    memory_bytes: int
    peak_flops: dict[str, float]
    """FLOP/s of large matrix products, by compute format (bf16, fp32)."""
    bandwidth_bytes_per_second: float
    fast_bf16: bool
    """Whether bf16 matrix products are faster than fp32 ones."""
    devices: int = 1

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return dataclasses.asdict(self)


def load_target(name: str) -> Target:
    """Read a target by the name of a file in `targets/`, or by path.

    Raises:
        ConfigError: unknown name, or a file that is not a target.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = TARGETS_FOLDER / f"{name}.yaml"
    if not path.is_file():
        known = target_names()
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]}?" if near else f"choose detect, {', '.join(known)}"
        raise ConfigError(f"there is no target {name}", where="plan.target", do=hint)
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
        return Target(
            name=str(value["name"]),
            device=str(value["device"]),
            memory_bytes=int(float(value["memory_bytes"])),
            peak_flops={str(k): float(v) for k, v in dict(value["peak_flops"]).items()},
            bandwidth_bytes_per_second=float(value["bandwidth_bytes_per_second"]),
            fast_bf16=bool(value["fast_bf16"]),
            devices=int(value.get("devices", 1)),
        )
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{path} is not a target: {error}", where="plan.target", do="see docs/concepts.md"
        ) from None


def target_names() -> list[str]:
    """Names of the targets that come with Penstock."""
    return sorted(path.stem for path in TARGETS_FOLDER.glob("*.yaml"))
