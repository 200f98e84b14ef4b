"""TFRecord: bytes by hand, protobuf's own messages, TensorBoard's own framing, damage."""

import struct
from pathlib import Path

import numpy as np
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.data.formats.crc32c import crc32c, masked_crc32c
from penstock.data.formats.example import (
    decode_varints,
    encode_varints,
    make_example,
    parse_example,
)
from penstock.data.formats.recognize import recognize
from penstock.data.formats.sequence import Layout, TokenSequence
from penstock.data.formats.tfrecord import Reader, Writer
from penstock.errors import DataError


def example_class():
    """tf.train.Example, built from its description by protobuf itself."""
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="t", syntax="proto3")

    def message(name, *fields, parent=file.message_type):
        made = parent.add(name=name)
        for number, (label, kind, type_name, key) in enumerate(fields, 1):
            made.field.add(name=key, number=number, label=label, type=kind, type_name=type_name)
        return made

    one, many = field.LABEL_OPTIONAL, field.LABEL_REPEATED
    message("BytesList", (many, field.TYPE_BYTES, None, "value"))
    message("FloatList", (many, field.TYPE_FLOAT, None, "value"))
    message("Int64List", (many, field.TYPE_INT64, None, "value"))
    kinds = ["BytesList", "FloatList", "Int64List"]
    message("Feature", *[(one, field.TYPE_MESSAGE, f".t.{k}", k.lower()) for k in kinds])
    features = message(
        "Features", (many, field.TYPE_MESSAGE, ".t.Features.FeatureEntry", "feature")
    )
    entry = message(
        "FeatureEntry",
        (one, field.TYPE_STRING, None, "key"),
        (one, field.TYPE_MESSAGE, ".t.Feature", "value"),
        parent=features.nested_type,
    )
    entry.options.map_entry = True
    message("Example", (one, field.TYPE_MESSAGE, ".t.Features", "features"))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Example"))


Example = example_class()
ids = st.lists(st.integers(0, 2**31 - 1), max_size=40)


@pytest.mark.parametrize(
    ("data", "checksum"),
    [
        (b"", 0),
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (b"a", 0xC1D04330),
    ],
)
def test_checksums_are_those_of_the_rfc(data: bytes, checksum: int) -> None:
    assert crc32c(data) == checksum


@settings(max_examples=50)
@given(st.integers(0, 9000), st.integers(0, 2**32 - 1))
def test_checksums_are_tensorboards_for_any_length(length: int, seed: int) -> None:
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c as theirs

    data = np.random.default_rng(seed).bytes(length)
    assert masked_crc32c(data) == theirs(data)


@given(ids, st.lists(st.floats(0, 100, width=32), max_size=9))
def test_messages_are_protobufs(tokens: list[int], weights: list[float]) -> None:
    made = make_example(
        {"input_ids": np.array(tokens, np.int64), "w": np.array(weights, np.float32)}
    )
    theirs = Example.FromString(made)
    assert list(theirs.features.feature["input_ids"].int64list.value) == tokens
    assert list(theirs.features.feature["w"].floatlist.value) == weights
    again = parse_example(theirs.SerializeToString())
    assert again["input_ids"].tolist() == tokens
    assert again["w"].tolist() == weights
    assert again["input_ids"].dtype == np.int64


def test_bytes_of_a_message_by_hand() -> None:
    expected = bytes.fromhex("0a160a140a09") + b"input_ids" + bytes.fromhex("12071a050a0301ac02")
    assert make_example({"input_ids": np.array([1, 300])}) == expected


def test_integers_not_packed_and_negative_are_understood() -> None:
    loose = bytes.fromhex("080108ac02")
    content = b"\x1a" + bytes([len(loose)]) + loose
    entry = b"\x0a\x01x\x12" + bytes([len(content)]) + content
    data = b"\x0a" + bytes([len(entry) + 2]) + b"\x0a" + bytes([len(entry)]) + entry
    assert parse_example(data)["x"].tolist() == list(
        Example.FromString(data).features.feature["x"].int64list.value
    )
    minus = Example()
    minus.features.feature["x"].int64list.value.append(-1)
    assert parse_example(minus.SerializeToString())["x"].tolist() == [-1]


@given(ids)
def test_varints_come_back(values: list[int]) -> None:
    assert decode_varints(memoryview(encode_varints(np.array(values, np.int64)))).tolist() == values


SEQUENCES = [
    TokenSequence(np.array([1, 2, 300])),
    TokenSequence(np.array([70000, 0]), np.array([0, 0.5], np.float32)),
    TokenSequence(np.arange(3000) * 17 % 50257),
]


def write(folder: Path) -> Path:
    writer = Writer(folder, "train", Layout(3000))
    for sequence in SEQUENCES:
        writer.append(sequence)
    writer.finish()
    return folder / "train_0.tfrecord"


def test_files_are_read_by_tensorboard_and_indexed(tmp_path: Path) -> None:
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import PyRecordReader_New

    path = write(tmp_path)
    reader = PyRecordReader_New(str(path))
    data = path.read_bytes()
    index = [
        tuple(map(int, line.split()))
        for line in (tmp_path / "train_0.index").read_text().splitlines()
    ]
    assert len(index) == len(SEQUENCES)
    for (offset, length), sequence in zip(index, SEQUENCES, strict=True):
        reader.GetNext()
        assert data[offset + 12 : offset + length - 4] == reader.record()
        found = Example.FromString(reader.record()).features.feature
        assert list(found["input_ids"].int64list.value) == sequence.tokens.tolist()
    assert index[-1][0] + index[-1][1] == len(data)


def test_files_come_back(tmp_path: Path) -> None:
    read = list(Reader(write(tmp_path)).sequences())
    for a, b in zip(read, SEQUENCES, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_array_equal(a.loss_weights(), b.loss_weights())


def test_damage_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path)
    data = path.read_bytes()
    for place, message in (
        (3, "length has not its checksum"),
        (20, "a record that has not its checksum"),
    ):
        broken = bytearray(data)
        broken[place] ^= 1
        path.write_bytes(broken)
        with pytest.raises(DataError, match=message):
            list(Reader(path).sequences())
    path.write_bytes(data[:-1])
    with pytest.raises(DataError, match="claims a record of"):
        list(Reader(path).sequences())
    length = struct.pack("<Q", 1 << 62)
    path.write_bytes(length + struct.pack("<I", masked_crc32c(length)) + data)
    with pytest.raises(DataError, match="claims a record of 4,611,686,018,427,387,904 bytes"):
        Reader(path)
    path.write_bytes(frame(make_example({"x": np.array([1])})))
    with pytest.raises(DataError, match="no list of integers named input_ids"):
        Reader(path)


@pytest.mark.parametrize("index", ["-8 16", "0 9999999999999\n0 40", "0 60\n10 60", "\0\xff"])
def test_a_lying_index_leads_nowhere(index: str, tmp_path: Path) -> None:
    """Records are found by their own lengths: the index is for readers that need one."""
    path = write(tmp_path)
    path.with_suffix(".index").write_bytes(index.encode("latin-1"))
    read = [sequence.tokens.tolist() for sequence in Reader(path).sequences()]
    assert read == [sequence.tokens.tolist() for sequence in SEQUENCES]
    assert recognize(tmp_path).splits == {"train": [path]}


def frame(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    return (
        length
        + struct.pack("<I", masked_crc32c(length))
        + data
        + struct.pack("<I", masked_crc32c(data))
    )


@pytest.mark.parametrize(
    "payload", [b"\x0a\xff", b"\x0b", b"\x0a\x02\x08\x01", b"\xff" * 11, b"\x02\x01a"]
)
def test_malformed_messages_with_right_checksums_are_refused(
    payload: bytes, tmp_path: Path
) -> None:
    (tmp_path / "x").write_bytes(frame(payload))
    with pytest.raises(DataError):
        Reader(tmp_path / "x")


def delimited(number: int, content: bytes) -> bytes:
    return bytes([number << 3 | 2]) + encode_varints(np.array([len(content)])) + content


@pytest.mark.parametrize(
    "entry",
    [
        delimited(1, b"x") + delimited(1, b"") * 20_000,
        delimited(1, b"x") + delimited(2, delimited(3, b"")) * 10_000,
        delimited(1, b"x") + delimited(2, delimited(3, b"\x08\x01" * 10_000)),
    ],
    ids=["keys", "lists", "loose integers"],
)
def test_many_tiny_fields_take_little_memory(entry: bytes) -> None:
    import tracemalloc

    data = delimited(1, delimited(1, entry))
    tracemalloc.start()
    parse_example(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12 * len(data) + (64 << 10)


def test_a_message_of_very_many_lists_is_refused(tmp_path: Path) -> None:
    lists = {f"x{n}": np.array([1]) for n in range(1100)}
    (tmp_path / "x").write_bytes(frame(make_example({**lists, "input_ids": np.array([1])})))
    with pytest.raises(DataError, match="more than 1,000 lists"):
        Reader(tmp_path / "x")
