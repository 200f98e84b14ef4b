"""How `transformers` stores a parameter of ours: under which names, in which order.

Families describe their weights with it, `models/huggingface.py` reads and writes by it. It must
never import torch.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Stored:
    """One of our parameters in a checkpoint of `transformers`."""

    names: tuple[str, ...]
    """Its name there; several where our rows are theirs one after the other."""
    rows: tuple[int, ...] = ()
    """Of each, where there are several."""
    transposed: bool = False
    """Whether a matrix is kept as (in, out)."""
    heads: int | None = None
    """Not None: rows lie by head, each with its query, key and value; ours lie all queries, all
    keys, all values."""

    @staticmethod
    def as_is(name: str) -> "Stored":
        """The same tensor under another name."""
        return Stored((name,))
