"""How fast one process of this machine sends to another: what training in several of them has.

`probe.py` measures it when `penstock doctor` asks. Run as a program, it is the other process.
"""

import datetime
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed

_BYTES = 32 << 20
"""One message: the size of a bucket of gradients."""
_REPEATS = 5
_TIMEOUT = datetime.timedelta(seconds=60)


def link_bytes_per_second() -> float | None:
    """Bytes per second from one process to another by gloo, in one direction; the best of several
    messages. None where this process already is one of several, or the two did not meet.
    """
    if torch.distributed.is_initialized():
        return None
    with tempfile.TemporaryDirectory(prefix="penstock-") as folder:
        meeting = str(Path(folder, "meeting"))
        peer = subprocess.Popen([sys.executable, "-m", __name__, meeting])  # noqa: S603 - ourselves
        try:
            seconds = _exchange(meeting, rank=0)
        except RuntimeError:
            peer.kill()
            return None
        finally:
            peer.wait()
    return _BYTES / seconds


def _exchange(meeting: str, rank: int) -> float:
    """Send from rank 0 to rank 1, answered by one number; the shortest time of a message."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=2, timeout=_TIMEOUT
    )
    message, answer = torch.ones(_BYTES // 4), torch.ones(1)
    best = float("inf")
    try:
        for _ in range(_REPEATS):
            started = time.perf_counter()
            if rank == 0:
                torch.distributed.send(message, 1)
                torch.distributed.recv(answer, 1)
            else:
                torch.distributed.recv(message, 0)
                torch.distributed.send(answer, 0)
            best = min(best, time.perf_counter() - started)
    finally:
        torch.distributed.destroy_process_group()
    return best


if __name__ == "__main__":
    _exchange(sys.argv[1], rank=1)
