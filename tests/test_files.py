"""Writing files: whole or not at all, durable, and readable by anyone who checks."""

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import penstock.files
from penstock.errors import DataError
from penstock.files import atomic_write, canonical_json, read_json, replacing, sha256_file

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)  # fmt: skip


def test_text_and_bytes_replace_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file"
    atomic_write(path, "é\n")
    assert path.read_bytes() == b"\xc3\xa9\n"
    atomic_write(str(path), b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_a_failed_write_changes_nothing_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    atomic_write(path, "before")

    def fail_half_way() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            assert temporary.parent == path.parent
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail_half_way()
    assert path.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_the_content_is_durable_before_the_name_and_the_name_before_the_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def note_fsync(descriptor: int) -> None:
        done.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")
        fsync(descriptor)

    def note_replace(self: Path, target: Path) -> Path:
        done.append("rename")
        return replace(self, target)

    monkeypatch.setattr(penstock.files.os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "replace", note_replace)
    atomic_write(tmp_path / "file", "text")
    assert done == ["file", "rename", "folder"]


def test_kill_9_while_writing_leaves_the_old_or_the_new_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    texts = [letter * 200_000 for letter in "ab"]
    atomic_write(path, texts[0])
    code = f"""
from penstock.files import atomic_write
while True:
    for letter in "ab":
        atomic_write({str(path)!r}, letter * 200_000)
"""
    for pause in (0.15, 0.2, 0.25, 0.3):
        process = subprocess.Popen([sys.executable, "-c", code])
        time.sleep(pause)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert path.read_text() in texts


@given(st.binary(max_size=5000))
def test_the_sum_is_sha_256(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "summed"
    path.write_bytes(data)
    assert sha256_file(path) == hashlib.sha256(data).hexdigest()


def test_large_files_are_summed_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(penstock.files, "_HASH_CHUNK_BYTES", 7)
    (tmp_path / "file").write_bytes(bytes(range(100)))
    assert sha256_file(tmp_path / "file") == hashlib.sha256(bytes(range(100))).hexdigest()


@given(JSON)
def test_canonical_json_depends_on_the_value_alone(value: object) -> None:
    text = canonical_json(value)
    assert json.loads(text) == value
    assert canonical_json(json.loads(text)) == text
    if isinstance(value, dict):
        assert canonical_json(dict(reversed(value.items()))) == text


def test_canonical_json_refuses_what_json_lacks() -> None:
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="JSON compliant"):
            canonical_json({"x": value})


@pytest.mark.parametrize(
    "data", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a": 1} x', b"9" * 5000]
)
def test_damaged_json_is_one_line(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_bytes(data)
    with pytest.raises(DataError, match="is not valid JSON") as caught:
        read_json(path)
    assert "\n" not in str(caught.value)


def test_missing_json_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_json(tmp_path / "none.json")


def test_writing_where_one_may_not_raises_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with contextlib.suppress(NotADirectoryError, FileExistsError):
        atomic_write(tmp_path / "file" / "below", "x")
        raise AssertionError
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
