"""Two models on the same examples: how much one is better, and how sure that is.

`results.py` shows it. It must never know what the examples are.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class PairedDifference:
    """Mean difference of right answers over the same examples, and its standard error."""

    mean: float
    standard_error: float

    def json(self) -> dict[str, float]:
        """Plain JSON."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        """For a sentence: "1.20% ± 0.40% more accurate"."""
        word = "more" if self.mean >= 0 else "less"
        return f"{abs(self.mean):.2%} ± {self.standard_error:.2%} {word} accurate"


def paired_difference(
    first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]]
) -> PairedDifference | None:
    """How much more often `second` is right; None where examples are not right or wrong.

    The standard error is that of the mean of differences (Miller, arXiv 2411.00640, §4.2), smaller
    than that of two independent accuracies, since hard examples are hard for both.
    """
    if not first or len(first) != len(second) or "correct" not in first[0]:
        return None
    differences = np.array(
        [float(b["correct"]) - float(a["correct"]) for a, b in zip(first, second, strict=True)]
    )
    spread = float(differences.std(ddof=1)) if len(differences) > 1 else math.inf
    return PairedDifference(float(differences.mean()), spread / math.sqrt(len(differences)))
