"""Worker processes that run this package's functions and nothing of the user's script.

`data/tokenize.py` and `compiler/build.py` use it. It must never know what the work is.
"""

import concurrent.futures
import contextlib
import ctypes
import multiprocessing.context
import multiprocessing.process
import os
import signal
import sys
from collections.abc import Callable, Generator
from typing import Any


@contextlib.contextmanager
def worker_pool(
    count: int, initializer: Callable[..., None] | None = None, arguments: tuple[Any, ...] = ()
) -> Generator[concurrent.futures.ProcessPoolExecutor, None, None]:
    """At most `count` fresh processes, each prepared by `initializer(*arguments)`.

    An error in the block cancels what has not begun; an interrupt, or the end of this process, ends
    them all.
    """
    pool = concurrent.futures.ProcessPoolExecutor(
        count,
        mp_context=_Context(),
        initializer=_begin,
        initargs=(os.getpid(), initializer, arguments),
    )
    try:
        yield pool
    except BaseException as error:
        if not isinstance(error, Exception):  # Interrupted: nobody waits for what they are at.
            for process in list(pool._processes.values()):
                process.kill()
        pool.shutdown(wait=True, cancel_futures=True)
        raise
    pool.shutdown()


def end_with(parent: int) -> None:
    """Have the kernel end this process when `parent`, which started it, ends, however that ends."""
    set_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)  # It had ended before we asked.


def _begin(
    parent: int, initializer: Callable[..., None] | None, arguments: tuple[Any, ...]
) -> None:
    """First thing in a worker: each holds both ends of the others' queue, and would wait on it for
    ever once nobody writes there.
    """
    end_with(parent)
    if initializer is not None:
        initializer(*arguments)


class _Process(multiprocessing.context.SpawnProcess):
    """A fresh process that does not import the user's script.

    A script without an `if __name__ == "__main__"` guard would start the whole job again there.
    """

    @staticmethod
    def _Popen(process_obj: multiprocessing.process.BaseProcess) -> Any:  # noqa: ANN401, N802 - the library's name and type
        main = vars(sys.modules["__main__"])
        hidden = {name: main[name] for name in ("__file__", "__spec__") if name in main}
        try:
            main["__spec__"] = None
            main.pop("__file__", None)
            return multiprocessing.context.SpawnProcess._Popen(process_obj)  # pyright: ignore[reportAttributeAccessIssue] - not in the stubs
        finally:
            main.update(hidden)


class _Context(multiprocessing.context.SpawnContext):
    """What the pool makes its processes with."""

    Process = _Process
