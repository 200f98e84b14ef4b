"""Worker processes that run this package's functions and nothing of the user's script.

`data/tokenize.py` and `compiler/build.py` use it. It must never know what the work is.
"""

import concurrent.futures
import contextlib
import multiprocessing.context
import multiprocessing.process
import sys
from collections.abc import Callable, Generator
from typing import Any


@contextlib.contextmanager
def worker_pool(
    count: int, initializer: Callable[..., None] | None = None, arguments: tuple[Any, ...] = ()
) -> Generator[concurrent.futures.ProcessPoolExecutor, None, None]:
    """At most `count` fresh processes, each prepared by `initializer(*arguments)`.

    An error in the block cancels what has not begun.
    """
    pool = concurrent.futures.ProcessPoolExecutor(
        count, mp_context=_Context(), initializer=initializer, initargs=arguments
    )
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=True, cancel_futures=True)
        raise
    pool.shutdown()


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
