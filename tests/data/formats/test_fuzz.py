"""Damaged files of every format: only `DataError` comes out, nothing runs, nothing swells.

A few hundred inputs for each reader by default; `slow` brings all readers together above 100,000.
"""

import random
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from penstock.data.formats import isolation
from penstock.data.formats.recognize import recognize
from penstock.data.formats.registry import FORMATS
from penstock.data.formats.sequence import Layout, TokenSequence, check_sequence
from penstock.errors import DataError

_TOKENS_PER_BYTE = 4000
"""No damaged file may claim more tokens than this for each of its bytes."""


def sample_sequences() -> list[TokenSequence]:
    rng = np.random.default_rng(0)
    lengths = (7, 7, 7, 7, 7)
    return [
        TokenSequence(
            rng.integers(1, 50257, n),
            np.array([0, 0, *[1] * (n - 2)], np.float32),
            categories=np.arange(n, dtype=np.int32),
        )
        for n in lengths
    ]


def make_files(name: str, folder: Path) -> list[Path]:
    """A small file of each format, by its writer; the fuzzer damages these."""
    sequences = sample_sequences()
    layout = Layout(
        width=8,
        sequences=len(sequences),
        tokens=sum(len(s.tokens) for s in sequences),
        largest=50256,
        weights=True,
        categories=True,
        packed=name == "cerebras",
    )
    writer = FORMATS[name].write(folder, "train", layout)
    for sequence in sequences:
        writer.append(sequence)
    return writer.finish()


def mutations(data: bytes, rng: random.Random) -> Iterator[bytes]:
    """Endless variants: flipped bytes, lying numbers, cuts, repeats, and other beginnings."""
    numbers = [0, 1, 0x7F, 0x80, 0xFF, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1]
    while True:
        broken = bytearray(data)
        # Headers and footers are where the lengths are.
        place = rng.choice(
            [
                rng.randrange(len(data)),
                rng.randrange(min(256, len(data))),
                -1 - rng.randrange(min(256, len(data))),
            ]
        ) % len(data)
        kind = rng.randrange(8)
        if kind < 3:
            for _ in range(rng.choice((1, 1, 2, 5))):
                broken[rng.randrange(len(data)) if kind == 2 else place] = rng.randrange(256)
        elif kind == 3:
            size = rng.choice((1, 2, 4, 8))
            broken[place : place + size] = (rng.choice(numbers) % (1 << 8 * size)).to_bytes(
                size, "little"
            )
        elif kind == 4:
            del broken[place:]
        elif kind == 5:
            del broken[place : place + rng.randrange(1, 64)]
        elif kind == 6:
            broken[place:place] = broken[place : place + rng.randrange(1, 64)]
        else:
            broken[place : place + 16] = rng.randbytes(16)
        yield bytes(broken)


def read_all(paths: list[Path], name: str, limit: int) -> None:
    """Read by the format's own reader, and check what comes as conversion does."""
    tokens = 0
    for sequence in FORMATS[name].read(paths).sequences():
        check_sequence(sequence, "fuzz")
        tokens += len(sequence.tokens)
        assert tokens <= limit
    assert tokens <= limit


def fuzz(name: str, folder: Path, seed: int, inputs: int) -> dict[str, int]:
    """Damage files and read them; returns how many were read and how many refused."""
    rng = random.Random(seed)
    whole = make_files(name, folder / "whole")
    victims = [p for p in whole if p.suffix != ".index"]
    main = next(p for p in whole if p.suffix not in (".yaml", ".json", ".index"))
    counts = {"read": 0, "refused": 0}
    root = whole[0].parent if len(whole) == 1 else folder / "whole"
    broken = folder / "broken"
    shutil.copytree(root, broken)
    for number in range(inputs):
        victim = victims[number % len(victims)]
        data = victim.read_bytes()
        path = broken / victim.relative_to(root)
        damaged = next(mutations(data, rng))
        path.write_bytes(damaged)
        target = broken / main.relative_to(root)
        limit = max(1 << 20, len(damaged) * _TOKENS_PER_BYTE)
        try:
            if number % 4 == 0:
                found = recognize(broken if number % 8 == 0 else target)
                read_all(found.splits[next(iter(found.splits))], found.format, limit)
            else:
                read_all([target], name, limit)
            counts["read"] += 1
        except DataError:
            counts["refused"] += 1
        if len(victims) > 1:
            path.write_bytes(data)
    return counts


@pytest.fixture
def little_memory() -> Callable[[], int]:
    """Peak growth of this process since the test began, or the reading process's peak, in bytes."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pool = pa.default_memory_pool()
    return lambda: max(
        1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before),
        pool.max_memory() or 0,
        child_memory(),
    )


def child_memory() -> int:
    """Peak memory of the process that reads risky formats, in bytes; 0 where there is none."""
    process = isolation._child._process
    status = Path(f"/proc/{process.pid}/status") if process is not None else Path("/nothing")
    lines = status.read_text().splitlines() if status.is_file() else []
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


@pytest.mark.parametrize("name", FORMATS)
def test_damaged_files_are_refused_or_read(
    name: str, tmp_path: Path, little_memory: Callable[[], int]
) -> None:
    counts = fuzz(name, tmp_path, seed=1, inputs=100)
    assert counts["refused"] > (0 if name == "nanogpt" else 10)
    assert little_memory() < 256 << 20


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_ten_thousand_damaged_files_of_each_format(
    name: str, little_memory: Callable[[], int]
) -> None:
    # In memory where there is such a folder: ten thousand files a format are written.
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as folder:
        counts = fuzz(name, Path(folder), seed=2, inputs=10_000)
    assert sum(counts.values()) == 10_000
    assert little_memory() < 512 << 20


def test_random_bytes_of_any_beginning_are_refused_or_read(tmp_path: Path) -> None:
    rng = random.Random(3)
    starts = [b"", b"\x80\x04]", b"(lp0\n", b"\x89HDF\r\n\x1a\n", b"PAR1", b"ARROW1\0\0", b"\xff\xff\xff\xff",
              b"\x93NUMPY\x01\0", b"MMIDIDX\0\0", b"[1", b'{"input_ids": [', b"\x88\xd9\x34\x01\x01\0\0\0"]  # fmt: skip
    path = tmp_path / "x"
    for number in range(600):
        path.write_bytes(starts[number % len(starts)] + rng.randbytes(rng.randrange(200)))
        try:
            found = recognize(path)
            read_all([path], found.format, 1 << 20)
        except DataError:
            pass
