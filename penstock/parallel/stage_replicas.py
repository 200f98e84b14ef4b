"""What processes that hold stages tell each other in a step, beside what goes through the pipeline.

`train_parts.py` makes it where the plan has stages; the train step uses it like `Replicas`. It must
never know about optimizers.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

from penstock.parallel.mesh import Mesh
from penstock.parallel.replicas import Replicas
from penstock.parallel.stage import TABLE, Stage, named_parameters
from penstock.tensors import OnDemand


class StageReplicas(Replicas):
    """What one process does with the other replicas' copies of its stage, and with other stages."""

    def __init__(
        self, mesh: Mesh, stages: Sequence[Stage], shard: str = "none", *, is_tied: bool
    ) -> None:
        """`stages` are this process's, divided as `Replicas` does; `is_tied`: the table may also
        be another's.
        """
        super().__init__(stages, mesh.replicas, shard)
        self._mesh = mesh
        named = dict(named_parameters(stages))
        self._held = frozenset(named)
        is_here = TABLE in named and named[TABLE].requires_grad
        self._shares = is_tied and mesh.ends is not None and is_here
        # Two hold it: the first one counts it and saves it.
        self._counts_twice = self._shares and mesh.stages.rank > 0

    def reduce(self, gradients: Sequence[Tensor], names: Sequence[str]) -> None:
        """Sum gradients over the replicas, and those of the table over its two copies."""
        super().reduce(gradients, names)
        if self._shares and self._mesh.ends is not None:
            self._mesh.ends.sum(gradients[names.index(TABLE)])

    def norm(self, own: Tensor) -> Tensor:
        """The Euclidean norm over all stages, () float32, from that of this one's `counted`."""
        total = self._mesh.stages.sum(own.double().square())
        return (self.peers.sum(total) if self.is_divided else total).sqrt().float()

    def counted(self, gradients: Sequence[Tensor], names: Sequence[str]) -> list[Tensor]:
        """Those gradients whose norm no other stage counts."""
        pairs = zip(gradients, names, strict=True)
        return [g for g, name in pairs if name != TABLE or not self._counts_twice]

    def rows_of(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Its part of a whole model's tensors, named by a parameter or KIND.PARAMETER."""
        own = {name: tensor for name, tensor in tensors.items() if self._parameter(name)}
        return super().rows_of(own)

    def saved(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Those of this stage's tensors that are its to save."""
        left = TABLE if self._counts_twice else None
        kept = (name for name in tensors if self._parameter(name) != left)
        return OnDemand.chosen(kept, tensors)

    def _parameter(self, name: str) -> str | None:
        """The parameter a tensor belongs to; None: it is not this stage's."""
        found = name if name in self._held else name.partition(".")[2]
        return found if found in self._held else None
