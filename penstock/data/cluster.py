"""Shards tokenized on a cluster through Ray Data, each by the function that tokenizes it here.

`data/prepare.py` runs it for `prepare.engine=ray`. Only numbers of shards pass through Ray: tokens
go from the worker straight to the shard's own files, in the dataset's folder, which all machines
must see. It must never know what a shard's files hold.
"""

import contextlib
import importlib
import socket
import urllib.parse
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.console import get_console
from penstock.data.tokenize import Job, Shard, tokenize_shard
from penstock.errors import ConfigError, UserError

_REACH_SECONDS = 10


class _ShardWorker:
    """One process of the cluster: loads the tokenizer once, and works through shards."""

    def __init__(self, shards: Sequence[Shard], job: Job) -> None:
        self._shards, self._job = shards, job
        self._encoder = job.encoder()

    def __call__(self, batch: dict[str, NDArray[np.int64]]) -> dict[str, NDArray[np.int64]]:
        """Tokenize the shards of a batch; hands their numbers back."""
        for number in batch["item"].tolist():
            tokenize_shard(self._shards[number], self._job, self._encoder)
        return batch


def run_on_ray(
    shards: Sequence[Shard], job: Job, *, workers: int | None, address: str | None
) -> Iterator[Shard]:
    """Work through the shards and yield each when done.

    Raises:
        ConfigError: Ray is not installed, or there is no cluster at `address`.
        DataError: of the first shard that failed.
    """
    ray = _ray()
    with _cluster(ray, workers, address):
        data: Any = importlib.import_module("ray.data")
        data.DataContext.get_current().enable_progress_bars = False
        size = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
        numbers = data.from_items(list(range(len(shards))), override_num_blocks=len(shards))
        done = numbers.map_batches(
            _ShardWorker,
            fn_constructor_args=(list(shards), job),
            batch_size=1,
            concurrency=min(size, len(shards)),
            num_cpus=1,
        )
        try:
            for row in done.iter_rows():
                yield shards[int(row["item"])]
        except ray.exceptions.RayError as error:
            raise _cause(error) from None


@contextlib.contextmanager
def _cluster(ray: Any, workers: int | None, address: str | None) -> Generator[None]:  # noqa: ANN401 - a module
    """Connect to a cluster, or start one on this machine for as long as this lasts."""
    options: dict[str, Any] = {"address": address}
    if address is None:
        options = {"num_cpus": workers, "include_dashboard": False}
    # One thread each, as there is a process per core.
    options["runtime_env"] = {"env_vars": {"TOKENIZERS_PARALLELISM": "false"}}
    try:
        _reach(address)
        ray.init(log_to_driver=False, logging_level="error", **options)
    except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        raise ConfigError(
            f"there is no Ray cluster at {address or 'this machine'}: {error}",
            where="ray.address",
            do="start one with `ray start --head`, or leave ray.address out",
        ) from None
    count = int(ray.cluster_resources().get("CPU", 0))
    get_console().info(f"Ray: {len(ray.nodes())} machines, {count} processors")
    try:
        yield
    finally:
        ray.shutdown()


def _reach(address: str | None) -> None:
    """Connect to a cluster's head and leave again: Ray itself tries for minutes where nobody is.

    Raises:
        OSError: nobody is there.
        ValueError: no HOST:PORT.
    """
    if address in (None, "auto", "local"):
        return
    found = urllib.parse.urlsplit(address if "://" in address else f"ray://{address}")
    if found.hostname is None or found.port is None:
        raise ValueError("an address is HOST:PORT, ray://HOST:PORT or auto")
    socket.create_connection((found.hostname, found.port), _REACH_SECONDS).close()


def _cause(error: BaseException) -> BaseException:
    """The user's mistake behind an error of Ray's, if that is what it is."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserError):
            return cause
        cause = getattr(cause, "cause", None) or cause.__cause__
    return error


def _ray() -> Any:  # noqa: ANN401 - a module
    try:
        return importlib.import_module("ray")
    except ImportError:
        raise ConfigError(
            "Ray is not installed", where="prepare.engine=ray", do="pip install 'penstock[ray]'"
        ) from None
