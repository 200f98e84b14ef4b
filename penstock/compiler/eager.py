"""The toolchain that compiles nothing: a region's graph, run operator by operator.

`compiler/toolchains.py` finds it. It works wherever torch does, and shows what a region computes
without a compiler in between; it is no faster than the model itself.
"""

from collections.abc import Mapping
from typing import Any

from penstock.compiler.portable import read_graph, write_graph
from penstock.compiler.toolchains import Region, Run


class Eager:
    """See `toolchains.Toolchain`."""

    def problem(self) -> str | None:
        """None: it needs nothing."""
        return None

    def settings(self) -> dict[str, Any]:
        """Nothing but the region matters."""
        return {}

    def build(self, region: Region, options: Mapping[str, Any]) -> bytes:
        """The graph as JSON."""
        return write_graph(region.module).encode()

    def load(self, name: str, code: bytes) -> Run:
        """The graph as a module; reading it can make nothing but ATen operators."""
        import torch  # noqa: PLC0415 - only what runs needs it

        module = read_graph(code)

        def run(inputs: Any) -> Any:  # noqa: ANN401 - sequences of tensors
            with torch.no_grad():
                return list(module(*inputs))

        return run
