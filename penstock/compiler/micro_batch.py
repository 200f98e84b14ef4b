"""One micro-batch on its way through a model: what its time and its memory both depend on.

`cost.py` and `memory.py` build on it. Pure arithmetic: it must never import torch.
"""

import dataclasses

from penstock.compiler.sizes import ELEMENT_BYTES
from penstock.models.architecture import Architecture


@dataclasses.dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Its shape, the model it goes through, and how that is computed and divided."""

    architecture: Architecture
    micro: int
    """Sequences per micro-batch."""
    sequence_length: int
    compute: str
    """Format of weights and activations: bf16 or fp32."""
    recompute: str
    replicas: int = 1
    shard: str = "none"
    tensor: int = 1
    """Devices that compute each block together, each with its part."""
    compiled: bool = True
    """Whether blocks run through region kernels; eagerly they keep norms' inputs in float32, and
    what is computed between the matrix products."""
    own: bool = False
    """Whether kernels call operators of our own (`compiler/operators.py`), which keep no scores."""

    @property
    def _rows(self) -> int:
        return self.micro * self.sequence_length

    @property
    def _element(self) -> int:
        return ELEMENT_BYTES[self.compute]
