"""Whether the mask row of a Cerebras file marks what is in the loss or what is outside it.

`cerebras.py` asks once for all files of a folder. It must never guess silently: every decision
comes with its reason.
"""

import dataclasses

import numpy as np
from numpy.typing import NDArray


@dataclasses.dataclass(frozen=True)
class Mask:
    """The meaning of a mask row."""

    inverted: bool
    """True: 1 marks positions outside the loss, as in early releases."""
    padding: int | None
    """Padding id; None: the rows seen have no padding."""
    reason: str
    """What was decided and from what, to be shown."""


def decide_mask(
    rows: NDArray[np.int32], padding: int | None = None, stated: int | None = None
) -> Mask:
    """Decide from rows (N, 3, length) of ids, mask and labels.

    `padding` and `stated` (whether the mask is inverted) are what a file beside the data says.
    Else: where all positions have one value, they are in the loss; padding never is, so its value
    tells; without padding most positions are in the loss.
    """
    ids, mask, labels = rows[:, 0], rows[:, 1], rows[:, 2]
    share = float(mask.mean()) if mask.size else 1.0
    tail = _tails(ids, labels) & (share not in (0.0, 1.0))
    if padding is None and tail.any():
        values, counts = np.unique(ids[tail], return_counts=True)
        padding = int(values[counts.argmax()])
    padded = tail & (ids == padding) if padding is not None else np.zeros_like(tail)
    ones, positions = int(mask[padded].sum()), int(padded.sum())
    if stated is not None:
        inverted, reason = bool(stated), "data_params.json says so"
    elif 2 * ones != positions:
        inverted = 2 * ones > positions
        reason = f"it is {int(inverted)} on padding (id {padding})"
    else:
        inverted, reason = share < 0.5, f"{share:.0%} of the positions have a 1"
    meaning = "outside" if inverted else "in"
    return Mask(inverted, padding, f"mask row: 1 marks positions {meaning} the loss, for {reason}")


def _tails(ids: NDArray[np.int32], labels: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Positions of each row's closing run of one id that is its own label, if longer than one."""
    if ids.shape[1] == 0:
        return np.zeros(ids.shape, np.bool_)
    same = (ids == ids[:, -1:]) & (labels == ids[:, -1:])
    run = np.logical_and.accumulate(same[:, ::-1], axis=1)[:, ::-1]
    run[run.sum(axis=1) < 2] = False
    return run
