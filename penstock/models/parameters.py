"""How many elements each parameter of a model has, and which of them are frozen. No torch.

Planning counts with it, `jobs.py` freezes by the same names. It must never know about training.
"""

import dataclasses
import difflib
import fnmatch
from collections.abc import Collection, Sequence

from penstock.errors import ConfigError
from penstock.models.architecture import Architecture
from penstock.models.families import FAMILIES


@dataclasses.dataclass(frozen=True)
class Frozen:
    """Elements of parameters that training leaves as they are, by region."""

    embedding: int = 0
    blocks: int = 0
    """Of all layers."""
    head: int = 0
    """The projection counts with the embedding where it is tied to it."""

    @property
    def total(self) -> int:
        """All of them."""
        return self.embedding + self.blocks + self.head


def frozen_names(names: Collection[str], patterns: Sequence[str]) -> set[str]:
    """Names that a pattern matches: * stands for anything, ? for a character, [0-3] for one of
    several.

    Raises:
        ConfigError: a pattern matches none, or all are frozen.
    """
    found: set[str] = set()
    for pattern in patterns:
        matching = fnmatch.filter(names, pattern)
        if not matching:
            near = difflib.get_close_matches(pattern, names, 3, 0.3)
            raise ConfigError(
                f"no parameter is named {pattern}",
                where="train.freeze",
                do=f"name some, such as {', '.join(near or sorted(names)[:3])}",
            )
        found |= set(matching)
    if names and len(found) == len(names):
        raise ConfigError(
            "every parameter is frozen", where="train.freeze", do="leave some to be trained"
        )
    return found


def count_frozen(architecture: Architecture, patterns: Sequence[str]) -> Frozen:
    """Elements of what the patterns freeze, the padded vocabulary counted.

    Raises:
        ConfigError: as `frozen_names`.
    """
    if not patterns:
        return Frozen()
    sizes = parameter_sizes(architecture)
    counts: dict[str, int] = {"embed": 0, "blocks": 0, "head": 0}
    for name in frozen_names(sizes, patterns):
        counts[name.partition(".")[0]] += sizes[name]
    return Frozen(counts["embed"], counts["blocks"], counts["head"])


def parameter_sizes(architecture: Architecture) -> dict[str, int]:
    """Elements of every parameter by its name; a tied head and shared layers come once."""
    a, width = architecture, architecture.embedding_width
    table, rows = a.table_elements(padded=True), a.padded_vocab_size
    matrices = {
        "embed.tokens.weight": table,
        "embed.positions.weight": a.position_parameters(),
        "embed.token_types.weight": a.token_types * width,
        "embed.projection.weight": width * a.hidden_size,
        "head.projection.weight": table,
        "head.transform.weight": width * a.hidden_size,
        "attention.query_key_value.weight": a.hidden_size * (a.hidden_size + 2 * a.kv_size),
        "attention.output.weight": a.hidden_size**2,
        "mlp.up.weight": a.mlp_size * a.hidden_size,
        "mlp.gate.weight": a.mlp_size * a.hidden_size,
        "mlp.down.weight": a.mlp_size * a.hidden_size,
    }
    vectors = {
        "embed.norm": width,
        "embed.projection": a.hidden_size,
        "head.norm": width,
        "head.projection": rows,
        "head.transform": width,
        "attention_norm": a.hidden_size,
        "mlp_norm": a.hidden_size,
        "attention.query_key_value": a.hidden_size + 2 * a.kv_size,
        "attention.output": a.hidden_size,
        "mlp.up": a.mlp_size,
        "mlp.gate": a.mlp_size,
        "mlp.down": a.hidden_size,
    }
    sizes: dict[str, int] = {}
    for name in FAMILIES[a.family].hf_names(a):
        inside = name.split(".", 2)[2] if name.startswith("blocks.") else name
        sizes[name] = matrices.get(inside) or vectors[inside.rpartition(".")[0]]
    return sizes
