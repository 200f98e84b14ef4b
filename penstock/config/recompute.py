"""Which of a block's values are kept for the backward pass, and which blocks are computed again.

The policies of `plan.recompute`. Schema, plans, kernels and modules all ask here. It must never
import torch.

- none: also what goes into the matrix products (the results of norms and activations, scaled and
  turned queries and keys), with the norms' statistics: nothing is computed twice but element-wise
  ends;
- selective: the outputs of the matrix products and of attention; everything between them is
  computed again inside the backward kernels, where it costs registers and not memory;
- blocks: each block's input; the block runs forward once more (Chen et al., arXiv 1604.06174);
- every-N: every N-th block as under blocks, the others as under selective.

Attention's scores are kept under no policy, unless dropout needs them (`models/blockwise.py`).
"""

import re
from typing import Literal

POLICIES = ("none", "selective", "blocks")
"""By name; `every-N` besides."""
_EVERY = re.compile(r"every-([1-9][0-9]{0,3})")

Kept = Literal["everything", "products"]
"""What one block's kernels keep."""


def check_policy(policy: str) -> str:
    """The policy itself.

    Raises:
        ValueError: there is none of that name.
    """
    if policy not in POLICIES and not _EVERY.fullmatch(policy):
        raise ValueError("none, selective, blocks or every-N, such as every-2, is expected")
    return policy


def default_policy(compiled: bool) -> str:
    """What is fastest: kernels compute what lies between products faster than they would read it;
    without kernels it would be one more pass through memory.
    """
    return "selective" if compiled else "none"


def kept_values(policy: str) -> Kept:
    """What a block's forward kernel hands to its backward kernel under a policy."""
    return "everything" if policy == "none" else "products"


def is_recomputed(policy: str, block: int) -> bool:
    """Whether the block of this number, from 0, keeps its input only."""
    found = _EVERY.fullmatch(policy)
    return policy == "blocks" or (found is not None and (block + 1) % int(found[1]) == 0)


def count_recomputed(policy: str, blocks: int) -> int:
    """How many of so many blocks keep their input only."""
    found = _EVERY.fullmatch(policy)
    return blocks // int(found[1]) if found else blocks * (policy == "blocks")


def recomputed_share(policy: str) -> float:
    """Share of a deep model's blocks that run forward twice."""
    found = _EVERY.fullmatch(policy)
    return 1 / int(found[1]) if found else float(policy == "blocks")
