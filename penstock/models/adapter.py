"""Low-rank adapters beside a block's linear layers: which, how large, how scaled.

An `Architecture` carries one where only adapters are trained; `models/projection.py` computes with
it, `models/lora.py` makes it from the user's section. It must never import torch.
"""

import dataclasses
from typing import Any

NF4_GROUP = 64
"""Weights that share a scale in 4 bits (QLoRA, arXiv 2305.14314, §3)."""
HELD_BYTES = {"int8": 1 + 4 / 128, "nf4": 0.5 + 4 / NF4_GROUP}
"""Bytes of one weight of a held matrix, its share of a float32 scale counted."""
SUMMED = ("attention.output", "mlp.down")
"""Layers of which parts of a block have columns each, and add up their products; of all others they
have rows each."""


@dataclasses.dataclass(frozen=True)
class Site:
    """A linear layer of every block, or the part of its rows that is a layer of its own in
    `transformers`, with an adapter beside it.
    """

    linear: str
    """Our name of the layer in a block, such as attention.query_key_value."""
    name: str
    """Its path in a block of `transformers`, such as self_attn.q_proj."""
    start: int
    """First of its rows in our layer."""
    rows: int
    columns: int

    @property
    def key(self) -> str:
        """A name for the adapter's parameters, without dots: what PEFT calls its target."""
        return self.name.rpartition(".")[2]


@dataclasses.dataclass(frozen=True)
class Adapter:
    """LoRA (Hu et al., arXiv 2106.09685, §4.1): W x + alpha / rank · B A x; A and B are trained."""

    rank: int
    alpha: float
    dropout: float
    """Probability of dropping an element of x on its way into A."""
    sites: tuple[Site, ...]
    base: str | None = None
    """How the blocks' own matrices are held: int8, nf4, or None: as they are computed with."""

    @property
    def scale(self) -> float:
        """Factor of B A x."""
        return self.alpha / self.rank

    def parameters(self) -> int:
        """Of one block's adapters."""
        return sum(self.rank * (site.rows + site.columns) for site in self.sites)

    def part(self, parts: int) -> "Adapter":
        """That of each of so many parts of a block: beside its rows or columns of every layer."""
        sites = [
            dataclasses.replace(site, columns=site.columns // parts)
            if site.linear in SUMMED
            else dataclasses.replace(site, start=site.start // parts, rows=site.rows // parts)
            for site in self.sites
        ]
        return dataclasses.replace(self, sites=tuple(sites))

    @staticmethod
    def from_json(value: dict[str, Any]) -> "Adapter":
        """Read what `dataclasses.asdict` made; TypeError or KeyError when it is no adapter."""
        fields = dict(value)
        fields["sites"] = tuple(Site(**site) for site in value["sites"])
        return Adapter(**fields)


def held_base(adapter: Adapter | None) -> str | None:
    """How the blocks' matrices are held under adapters, where they are in few bits."""
    return None if adapter is None else adapter.base
