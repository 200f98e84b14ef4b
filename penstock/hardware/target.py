"""A machine to plan for: its memory, speed and formats, from a YAML file or detected.

`compiler/plan.py` and `api` use it. It must never import torch.
"""

import dataclasses
import difflib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from penstock.errors import ConfigError

TARGETS_FOLDER = Path(__file__).parent / "targets"
FORMATS = ("bf16", "fp32")
"""Compute formats a target may have a peak for; bf16 stands for the device's 16-bit format."""
STREAMED = ("optimizer", "weights")
"""Kinds of memory a target may keep in its streaming memory."""

_HELP = "see docs/plan.md for the keys of a target"


@dataclasses.dataclass(frozen=True)
class Target:
    """One kind of machine. Figures are of one device."""

    name: str
    device: str
    """cpu, cuda, or another kind that can be planned for: ipu, rdu, wse, hpu."""
    memory_bytes: int
    """Memory the device computes from."""
    peak_flops: dict[str, float]
    """FLOP/s of large matrix products, by compute format (bf16, fp32)."""
    bandwidth_bytes_per_second: float
    """Between that memory and the compute units."""
    fast_bf16: bool
    """Whether bf16 matrix products are faster than fp32 ones."""
    devices: int = 1
    link_bytes_per_second: float | None = None
    """From one device to another, in one direction; None where there is one device."""
    node_devices: int | None = None
    """Devices of one host, where there are several hosts; None where all are on one."""
    network_bytes_per_second: float | None = None
    """Between hosts, for each device, in one direction; None where there is one host."""
    streaming_memory_bytes: int = 0
    """Slower memory beside the device that holds what `streams` names; 0: none."""
    streaming_bytes_per_second: float | None = None
    """Between device and streaming memory, in one direction."""
    streams: tuple[str, ...] = ()
    """What lives in the streaming memory: optimizer, weights."""
    sums: str = "fp32"
    """Format the target's programs sum gradients of micro-batches in."""
    measured: bool = False
    """Whether the speeds were measured; peaks of a data sheet are never reached, so times
    predicted from them are lower bounds."""
    reached: float | None = None
    """Share of `peak_flops` that the largest matrix products reach in whole programs; with it times
    are expected, and smaller products reach less (`compiler/cost.py`). None: not known."""
    products_flops: dict[str, float] = dataclasses.field(default_factory=dict[str, float])
    """FLOP/s of a model's own products, forward and backward, by compute format, where they were
    measured: they read weights and write gradients, and reach less than `peak_flops`."""
    loops_flops: float | None = None
    """FLOP/s in whose place arithmetic between products runs, as `compiler/loops.py` counts it;
    None: not measured, as fast as fp32 products, which are made of the same instructions."""
    own_operators: bool = False
    """Whether kernels for it call operators of our own (`compiler/operators.py`)."""
    own_products: bool = False
    """Whether these multiply matrices, too."""
    sources: dict[str, str] = dataclasses.field(default_factory=dict[str, str])
    """Where each figure is from, by key."""

    @property
    def is_expected(self) -> bool:
        """Whether predicted times are what is expected, and not only lower bounds."""
        return self.measured or self.reached is not None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return dataclasses.asdict(self)

    def peak(self, compute: str) -> float:
        """FLOP/s in a compute format.

        Raises:
            ConfigError: the target has none for it.
        """
        if compute not in self.peak_flops:
            raise ConfigError(
                f"{self.name} has no figure for {compute}",
                where="precision.compute",
                do=f"use precision.compute={' or '.join(self.peak_flops)}",
            )
        return self.peak_flops[compute]

    def shared_by(self, count: int) -> "Target":
        """One of `count` equal parts of a single device, as processes on one CPU have them."""
        return dataclasses.replace(
            self,
            devices=count,
            memory_bytes=self.memory_bytes // count,
            peak_flops={name: peak / count for name, peak in self.peak_flops.items()},
            products_flops={n: speed / count for n, speed in self.products_flops.items()},
            loops_flops=self.loops_flops and self.loops_flops / count,
            bandwidth_bytes_per_second=self.bandwidth_bytes_per_second / count,
            # Measured by `doctor`; else what one part sends is written and read in the memory they
            # share.
            link_bytes_per_second=self.link_bytes_per_second
            or self.bandwidth_bytes_per_second / (2 * count),
        )


def load_target(name: str) -> Target:
    """Read a target by the name of a file in `targets/`, or by path.

    Raises:
        ConfigError: unknown name, or a file that is not a target; the wrong key is named.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = TARGETS_FOLDER / f"{name}.yaml"
    if not path.is_file():
        known = target_names()
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]}?" if near else f"choose detect, cpu, {', '.join(known)}"
        raise ConfigError(f"there is no target {name}", where="plan.target", do=hint)
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise _refusal(path, f"cannot be read as YAML: {error}") from None
    if not isinstance(value, dict):
        raise _refusal(path, "is not a mapping of keys")
    return _Reader(path, value).target()


def target_names() -> list[str]:
    """Names of the targets that come with Penstock."""
    return sorted(path.stem for path in TARGETS_FOLDER.glob("*.yaml"))


def _refusal(path: Path, what: str, do: str = _HELP) -> ConfigError:
    return ConfigError(f"target {path} {what}", where="plan.target", do=do)


class _Reader:
    """The keys of one target file, each checked, each mistake naming its key."""

    def __init__(self, path: Path, value: Mapping[Any, Any]) -> None:
        self.path = path
        self.value = value

    def target(self) -> Target:
        """The whole file."""
        self._refuse_unknown_keys()
        devices = self._figure("devices", 1)
        target = Target(
            name=self._text("name"),
            device=self._text("device"),
            memory_bytes=int(self._figure("memory_bytes")),
            peak_flops=self._peaks("peak_flops"),
            products_flops=self._peaks("products_flops") if "products_flops" in self.value else {},
            bandwidth_bytes_per_second=self._figure("bandwidth_bytes_per_second"),
            fast_bf16=self._flag("fast_bf16"),
            devices=int(devices),
            link_bytes_per_second=self._figure("link_bytes_per_second") if devices > 1 else None,
            sums=self._sums(),
            measured=self._flag("measured", default=False),
            own_operators=self._flag("own_operators", default=False),
            own_products=self._flag("own_products", default=False),
            sources={str(k): str(v) for k, v in self._mapping("sources", {}).items()},
            reached=self._share("reached"),
            loops_flops=self._figure("loops_flops") if "loops_flops" in self.value else None,
            **self._streaming(),
            **self._network(int(devices)),
        )
        if devices != target.devices:
            raise _refusal(self.path, f"has devices={devices}, not a whole number")
        return target

    def _network(self, devices: int) -> dict[str, Any]:
        """What joins hosts: both of its keys, or none."""
        if "node_devices" not in self.value and "network_bytes_per_second" not in self.value:
            return {}
        node = self._figure("node_devices")
        if devices % node:
            raise _refusal(self.path, f"has devices={devices}, not a multiple of node_devices")
        network = self._figure("network_bytes_per_second")
        return {"node_devices": int(node), "network_bytes_per_second": network}

    def _share(self, key: str) -> float | None:
        if key not in self.value:
            return None
        share = self._number(key, self.value[key])
        if share > 1:
            raise _refusal(self.path, f"has {key}={share}", "give a share, at most 1")
        return share

    def _streaming(self) -> dict[str, Any]:
        """The slower memory beside the device: all of its keys, or none."""
        if "streaming_memory_bytes" not in self.value and "streams" not in self.value:
            return {}
        streams = self.value.get("streams", ["optimizer"])
        if not isinstance(streams, list) or not set(streams) <= set(STREAMED) or not streams:
            raise _refusal(
                self.path, f"has streams={streams}", f"list some of {', '.join(STREAMED)}"
            )
        return {
            "streaming_memory_bytes": int(self._figure("streaming_memory_bytes")),
            "streaming_bytes_per_second": self._figure("streaming_bytes_per_second"),
            "streams": tuple(streams),
        }

    def _sums(self) -> str:
        value = self.value.get("sums", "fp32")
        if value not in FORMATS:
            raise _refusal(self.path, f"has sums={value}", f"use {' or '.join(FORMATS)}")
        return value

    def _peaks(self, key: str) -> dict[str, float]:
        peaks = self._mapping(key)
        unknown = sorted(str(key) for key in peaks if key not in FORMATS)
        if unknown or not peaks:
            raise _refusal(
                self.path,
                f"has {key} for {', '.join(unknown) or 'nothing'}",
                f"give FLOP/s for {' and '.join(FORMATS)}, or for one of them",
            )
        return {name: self._number(f"{key}.{name}", value) for name, value in peaks.items()}

    def _figure(self, key: str, default: float | None = None) -> float:
        if key not in self.value:
            if default is not None:
                return default
            raise _refusal(self.path, f"lacks {key}")
        return self._number(key, self.value[key])

    def _number(self, key: str, value: object) -> float:
        """A finite number above zero; YAML 1.1 reads 80e9 as a text, and so it is taken too."""
        try:
            if isinstance(value, bool) or not isinstance(value, int | float | str):
                raise ValueError
            number = float(value)
        except (ValueError, OverflowError):
            raise _refusal(self.path, f"has {key}={value}, not a number") from None
        if not math.isfinite(number) or number <= 0:
            raise _refusal(
                self.path, f"has {key}={value}", "give a finite figure greater than zero"
            )
        return number

    def _text(self, key: str) -> str:
        if not isinstance(self.value.get(key), str) or not self.value[key]:
            raise _refusal(
                self.path, f"has no text at {key}" if key in self.value else f"lacks {key}"
            )
        return self.value[key]

    def _flag(self, key: str, *, default: bool | None = None) -> bool:
        value = self.value.get(key, default)
        if not isinstance(value, bool):
            what = f"has {key}={value}" if key in self.value else f"lacks {key}"
            raise _refusal(self.path, what, "write true or false")
        return value

    def _mapping(self, key: str, default: dict[Any, Any] | None = None) -> dict[Any, Any]:
        value = self.value.get(key, default)
        if not isinstance(value, dict):
            what = f"has {key}={value}, not a mapping" if key in self.value else f"lacks {key}"
            raise _refusal(self.path, what)
        return value

    def _refuse_unknown_keys(self) -> None:
        known = [field.name for field in dataclasses.fields(Target)]
        for key in self.value:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, 1, 0.5)
                do = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(known)}"
                raise _refusal(self.path, f"has an unknown key {key}", do)
