"""Which samples a run has taken, step by step: one file for each process.

The loader writes a line when a step takes its samples; tests and people read them back. It must
never know why one process has these samples and another those.
"""

import json
import zlib
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from penstock.console import get_console
from penstock.errors import DataError
from penstock.files import LineLog, atomic_write, whole_records


class SampleLog:
    """Appends to FOLDER/rank-00000.jsonl: {"position": …, "samples": […], "crc32": […]}.

    `position` is the first sample of the step's global batch, counted over all epochs; `samples`
    are those this process took of it, counted likewise, and `crc32` the checksum of each one's
    tokens, by which equal samples are known.
    """

    def __init__(self, folder: Path, position: int, share: tuple[int, int] = (0, 1)) -> None:
        """Forget what was logged from `position` on: it will be done again.

        Args:
            folder: with the files of all processes, and of more where there were more before.
            position: where this start of the run begins.
            share: which of how many processes this one is.

        Raises:
            DataError: the folder cannot be written.
        """
        rank, size = share
        self._path = folder / f"rank-{rank:05}.jsonl"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for path in folder.glob("rank-*.jsonl"):
                if int(path.stem.partition("-")[2]) % size == rank:
                    _forget(path, position)
            self._lines = LineLog(self._path)
        except OSError as error:
            raise DataError(
                f"the samples cannot be logged: {error.strerror or error}",
                where=str(self._path),
                do="make room, or set train.log_samples=false",
            ) from error

    def write(self, position: int, places: Sequence[Tensor], tokens: Sequence[Tensor]) -> None:
        """One step's samples; the line is with the system when this returns, if there is room.

        Args:
            position: first sample of the global batch.
            places: (B,) of each micro-batch, places in the global batch.
            tokens: (B, T) of each micro-batch.
        """
        samples = [position + place for part in places for place in part.tolist()]
        checksums = [zlib.crc32(row.tobytes()) for part in tokens for row in part.numpy()]
        record = {"position": position, "samples": samples, "crc32": checksums}
        why = self._lines.append(json.dumps(record))
        if why is not None:
            get_console().warning(f"{self._path} waits for room: {why}; training goes on")

    def close(self) -> None:
        """Closing twice is fine."""
        self._lines.close()


def read_sample_log(folder: Path) -> list[tuple[int, int]]:
    """Number and checksum of every sample all processes took, in their global order.

    Lines that a killed process left half written are passed over.
    """
    paths = sorted(folder.glob("rank-*.jsonl"))
    records = [record for path in paths for record in whole_records(path, "position")]
    pairs = [zip(r["samples"], r["crc32"], strict=True) for r in records]
    return sorted(pair for step in pairs for pair in step)


def _forget(path: Path, position: int) -> None:
    kept = [record for record in whole_records(path, "position") if record["position"] < position]
    atomic_write(path, "".join(f"{json.dumps(record)}\n" for record in kept))
