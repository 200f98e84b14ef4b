"""The compilers there are: each makes bytes of a region, and makes such bytes callable again.

`compiler/build.py` builds through here, `compiler/executable.py` loads. Any installed package adds
one by an entry point in the group `penstock.toolchains` (docs/toolchains.md). It must never import
a compiler itself.
"""

import dataclasses
import difflib
import importlib
import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from penstock.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, fx

GROUP = "penstock.toolchains"
PORTABLE = "none"
"""Stands in the place of a toolchain's name where there are graphs only."""
_OURS = {
    "inductor": "penstock.compiler.inductor:Inductor",
    "eager": "penstock.compiler.eager:Eager",
    "native": "penstock.compiler.native:Native",
}


@dataclasses.dataclass(frozen=True)
class Region:
    """What is to be built: a straight-line program of ATen operators with fixed shapes."""

    name: str
    """Such as block_backward."""
    module: "fx.GraphModule"
    """From the inputs, in order, to a tuple of outputs."""
    inputs: "tuple[Tensor, ...]"
    """Fake tensors: dtype, shape, strides and device of each input."""
    outputs: "tuple[Tensor, ...]"
    """The same of each output, which a loaded region must give exactly."""


Run = Callable[["Sequence[Tensor]"], "Sequence[Tensor]"]
"""A loaded region: called with tensors of exactly the shapes it was built for."""


@runtime_checkable
class Toolchain(Protocol):
    """One compiler. Made without arguments, once per process."""

    def problem(self) -> str | None:
        """Why it cannot build on this machine, with what to do; None where it can."""
        ...

    def settings(self) -> dict[str, Any]:
        """Everything its output depends on besides the region, as plain JSON: versions, flags."""
        ...

    def build(self, region: Region, options: Mapping[str, Any]) -> bytes:
        """Lower one region, in a worker process. options["workspace"]: a private folder that
        later builds see again.
        """
        ...

    def load(self, name: str, code: bytes) -> Run:
        """Make what `build` returned callable; compiles nothing. Its origin has been verified."""
        ...


def toolchain_names() -> list[str]:
    """Every toolchain installed here."""
    return sorted({*_OURS, *importlib.metadata.entry_points(group=GROUP).names})


def toolchain_for(mode: str, chosen: str | None) -> str:
    """The toolchain a config names, or the fastest that can build here for a mode of `compile`."""
    if chosen is not None:
        return chosen
    can = mode == "generate" and find_toolchain("native").problem() is None
    return "native" if can else "inductor"


def find_toolchain(name: str) -> Toolchain:
    """The toolchain of that name.

    Raises:
        ConfigError: none is installed under it, or it does not load.
    """
    if name in _OURS:
        module, _, attribute = _OURS[name].partition(":")
        return getattr(importlib.import_module(module), attribute)()
    found = [*importlib.metadata.entry_points(group=GROUP, name=name)]
    if not found:
        near = difflib.get_close_matches(name, toolchain_names(), 1)
        do = f"did you mean {near[0]}?" if near else "install the package that provides it"
        raise ConfigError(f"there is no toolchain {name}", where="compile.toolchain", do=do)
    try:
        made = found[0].load()()
    except Exception as error:  # another package's code
        raise ConfigError(
            f"toolchain {name} does not load: {error!r}",
            where=found[0].value,
            do="mend or remove the package that provides it",
        ) from error
    if not isinstance(made, Toolchain):
        raise ConfigError(
            f"{found[0].value} is not a toolchain: it lacks methods",
            where=f"entry point {name}",
            do="see docs/toolchains.md",
        )
    return made
