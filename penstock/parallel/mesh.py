"""The processes of a job as a mesh: replicas of the model, the stages each is cut into, and the
parts each stage's blocks are in.

`train_run.py` lays it out once the processes have met. It must never know about models.
"""

import dataclasses
import datetime
from typing import Any

import torch.distributed
from torch import Tensor

from penstock.parallel.environment import Place
from penstock.parallel.world import World


class Line:
    """Processes that differ in one dimension of the mesh alone."""

    def __init__(self, ranks: list[int], rank: int, group: Any = None) -> None:  # noqa: ANN401 - torch's group type is not public
        """Ranks in the job, in their order here; `rank` is this process's; None: all processes."""
        self.rank = ranks.index(rank) if rank in ranks else 0
        self.size = len(ranks)
        self.group = group

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of these processes' tensors, in place; the same bits in all of them."""
        if self.size > 1:
            torch.distributed.all_reduce(tensor, group=self.group)
        return tensor


Peers = World | Line
"""Some of the job's processes, or all."""


def coordinates(place: Place, stages: int, tensor: int = 1) -> tuple[int, int]:
    """A process's replica and stage: parts of the same blocks stand next to each other, then
    replicas, since what they tell each other is more than what goes from stage to stage.
    """
    stage, rest = divmod(place.rank, place.size // stages)
    return rest // tensor, stage


@dataclasses.dataclass(frozen=True)
class Mesh:
    """This process's lines."""

    replicas: Peers
    """Those with the same stage and part of other replicas."""
    stages: Line
    """The stages of this replica, the same part of each."""
    ends: Line | None
    """Its first and its last stage, in these two."""
    parts: Line
    """Those with the other parts of this stage's blocks."""

    @staticmethod
    def of(world: World, stages: int, timeout_seconds: float, tensor: int = 1) -> "Mesh":
        """Lay out the job's processes; all of them call it."""
        rank, count = world.rank, world.size // stages // tensor

        def line(every: list[list[int]]) -> Line:
            """This process's of these lines, which do not meet."""
            own = next((ranks for ranks in every if rank in ranks), [rank])
            if len(every[0]) in (1, world.size):
                return Line(own, rank)
            group, _ = torch.distributed.new_subgroups_by_enumeration(
                every, timeout=datetime.timedelta(seconds=timeout_seconds)
            )
            return Line(own, rank, group)

        # Ranks by stage, replica and part.
        rows = [
            [[(s * count + r) * tensor + p for p in range(tensor)] for r in range(count)]
            for s in range(stages)
        ]
        columns = [
            [rows[s][r][p] for s in range(stages)] for r in range(count) for p in range(tensor)
        ]
        along = line(columns)
        ends = along if stages <= 2 else line([[ranks[0], ranks[-1]] for ranks in columns])
        return Mesh(
            replicas=world
            if stages == tensor == 1
            else line([[row[p] for row in stage] for stage in rows for p in range(tensor)]),
            stages=along,
            ends=ends if ends.size > 1 else None,
            parts=line([ranks for stage in rows for ranks in stage]),
        )
