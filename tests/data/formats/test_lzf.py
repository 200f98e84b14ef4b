"""LZF against h5py's own: what it packs is unpacked, and nothing else comes out than an error."""

from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.data.formats import lzf
from penstock.data.formats.lzf import decompress


@pytest.mark.parametrize("kind", ["random", "constant", "steps", "repeats", "noise and runs"])
@pytest.mark.parametrize("shuffle", [False, True])
def test_what_h5py_packs_is_unpacked(kind: str, shuffle: bool, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values = {
        "random": rng.integers(0, 1 << 31, (16, 512)),
        "constant": np.full((16, 512), 7),
        "steps": np.arange(16 * 512).reshape(16, 512),
        "repeats": np.tile(rng.integers(0, 50_000, 37), 16 * 512 // 37 + 1)[: 16 * 512].reshape(16, 512),
        "noise and runs": np.where(rng.random((16, 512)) < 0.9, 50_256, rng.integers(0, 50_257, (16, 512))),
    }[kind].astype("<i4")  # fmt: skip
    with h5py.File(tmp_path / "x.hdf5", "w") as file:
        options = {"compression": "lzf", "shuffle": shuffle, "chunks": (16, 512)}
        data = file.create_dataset("x", data=values, **options)
        mask, packed = data.id.read_direct_chunk((0, 0))
        filters = data.id.get_create_plist()
        number = [filters.get_filter(i)[0] for i in range(filters.get_nfilters())].index(lzf.FILTER)
    plain = values.view(np.uint8).reshape(-1, 4).T.tobytes() if shuffle else values.tobytes()
    if not mask & (1 << number):
        packed = decompress(packed, len(plain))
    assert packed == plain


@given(st.binary(max_size=200), st.integers(0, 500))
def test_any_bytes_stay_bounded(data: bytes, expected: int) -> None:
    try:
        out = decompress(data, expected)
    except ValueError:
        return
    # At most the last run or copy goes beyond.
    assert len(out) <= expected + 264
