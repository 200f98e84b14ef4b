"""Named columns of one record as a token sequence: what JSON lines and Arrow tables share.

`jsonl.py` and `arrow.py` call it. The names are those of Hugging Face's tokenized datasets, and
ours for what these lack. It must never know where the columns come from.
Source: transformers' data collators (labels are the inputs, -100 outside the loss; an attention
mask is 0 on padding).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.data.formats.sequence import SEPARATOR, TokenSequence, damaged, weights_or_none

IDS, WEIGHTS, ROLES = "input_ids", "loss_weights", "token_roles"
IDS_NAMES = (IDS, "tokens", "token_ids")
USED = frozenset((*IDS_NAMES, WEIGHTS, ROLES, "labels", "attention_mask"))
_IGNORED_LABEL = -100


def find_ids(names: object) -> str | None:
    """The name of the column with token ids among these, if there is one."""
    found = set(names) if isinstance(names, list | tuple | set | frozenset | dict) else set()
    return next((name for name in IDS_NAMES if name in found), None)


def to_sequence(columns: Mapping[str, NDArray[Any]], where: str) -> TokenSequence:
    """Ids, without padding, and their weights.

    Raises:
        DataError: lengths that differ, or values that are none of theirs.
    """
    name = find_ids(dict(columns))
    tokens = integers(columns[name], where, name) if name else np.empty(0, np.int64)
    for other, values in columns.items():
        if values.shape != tokens.shape:
            raise damaged(where, f"has {len(tokens)} tokens but {other} of {values.shape}")
    weights = columns.get(WEIGHTS)
    if weights is not None and weights.dtype.kind not in "fui":
        raise damaged(where, f"has {WEIGHTS} that are no numbers")
    if weights is None and "labels" in columns:
        weights = _weights_of(integers(columns["labels"], where, "labels"), tokens, where)
    roles = columns.get(ROLES)
    if roles is not None:
        roles = integers(roles, where, ROLES)
        if ((roles < 0) | (roles > SEPARATOR)).any():
            raise damaged(where, f"has {ROLES} that are not 0, 1, 2 or 3")
        roles = roles.astype(np.uint8)
    if "attention_mask" in columns:
        mask = integers(columns["attention_mask"], where, "attention_mask")
        if ((mask != 0) & (mask != 1)).any():
            raise damaged(where, "has an attention_mask that is not 0 or 1")
        kept = mask == 1
        tokens = tokens[kept]
        weights = None if weights is None else weights[kept]
        roles = None if roles is None else roles[kept]
    return TokenSequence(tokens, None if weights is None else weights_or_none(weights), roles)


def integers(values: NDArray[Any], where: str, name: str) -> NDArray[Any]:
    """The values, which must be integers; an empty array of any kind will do.

    Raises:
        DataError: they are not.
    """
    if values.ndim != 1 or (values.size and values.dtype.kind not in "ui"):
        raise damaged(where, f"has {name} that are no list of integers")
    return values if values.size else np.empty(0, np.int64)


def _weights_of(labels: NDArray[Any], tokens: NDArray[Any], where: str) -> NDArray[np.float32]:
    """Weights from labels, which repeat the ids where these are in the loss."""
    counted = labels != _IGNORED_LABEL
    if (labels[counted] != tokens[counted]).any():
        raise damaged(where, "has labels that are not its input_ids, nor -100")
    return counted.astype(np.float32)
