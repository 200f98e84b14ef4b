"""Rows made of text as it is read: the same from anywhere, whatever the lanes, ranks and threads."""

import dataclasses
import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.config.cleaning import CleanSection
from penstock.config.data import DataSection, SourceSection, TokenizerSection
from penstock.data import streaming
from penstock.data.dataset import Dataset
from penstock.data.loader import Loader
from penstock.data.samples import Row
from penstock.data.stream_rows import Cursor, rows_from
from penstock.data.streaming import TextStream, open_stream
from penstock.errors import CheckpointError, ConfigError, DataError

LENGTH = 32


def section(corpus: Path, **more: object) -> SourceSection:
    return SourceSection.model_validate({"path": str(corpus), "documents": "blank_line", **more})


def stream(corpus: Path, dataset: Path, source: dict | None = None, **data: object) -> TextStream:
    tokenizer = TokenizerSection.model_validate({"from": str(dataset / "tokenizer.json")})
    chosen = {"shuffle_buffer": 24, "lanes": 3, **data}
    return open_stream(section(corpus, **(source or {})), tokenizer, DataSection(**chosen))


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a small corpus has many."""
    monkeypatch.setattr(streaming, "_SHARD_BYTES", 20_000)


def same(ours: list[Row], theirs: list[Row]) -> bool:
    return len(ours) == len(theirs) and all(
        np.array_equal(a, b)
        for one, other in zip(ours, theirs, strict=True)
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("packing", ["full", "greedy::truncate_right", "single::drop"])
def test_unshuffled_rows_are_those_of_a_prepared_dataset(
    packing: str, corpus: Path, dataset_folder: Path, tmp_path: Path
) -> None:
    import penstock

    penstock.prepare(
        source={"path": str(corpus), "documents": "blank_line"},
        tokenizer={"from": str(dataset_folder)},
        data={"path": str(tmp_path / "d"), "sequence_length": LENGTH, "packing": packing},
    )
    split = Dataset.open(tmp_path / "d").split("train")
    found = stream(corpus, dataset_folder, packing=packing)
    text = dataclasses.replace(found.training("train", LENGTH, 0)._text, shuffle=False)
    count = split.samples(LENGTH) - 2  # the last rows go on into the next epoch
    for index, row in enumerate(itertools.islice(rows_from(text, Cursor(0, 0, 0)), count)):
        tokens = row.sequence.tokens
        inputs, targets, weights = split.sample(index, LENGTH)
        real = int(weights.sum()) + 1
        assert tokens[:-1].tolist() == inputs[: real - 1].tolist()
        assert tokens[1:].tolist() == targets[: real - 1].tolist()


@pytest.mark.parametrize(
    ("documents", "packing"),
    [
        ("file", "full"),
        ("line", "full"),
        ("line", "greedy::truncate_left"),
        ("blank_line", "single::truncate_right"),
    ],
)
def test_any_cursor_goes_on_with_the_same_rows(
    packing: str, documents: str, corpus: Path, dataset_folder: Path
) -> None:
    found = stream(corpus, dataset_folder, {"documents": documents}, packing=packing)
    text = found.training("train", LENGTH, 7)._text
    rows = list(itertools.islice(rows_from(text, Cursor(1, 0, 0), 3), 700))
    assert len({row.after.shard for row in rows}) > 1
    for at in (0, 5, 333, 600):
        again = itertools.islice(rows_from(text, rows[at].after, 3), 60)
        for ours, theirs in zip(again, rows[at + 1 :], strict=False):
            np.testing.assert_array_equal(ours.sequence.tokens, theirs.sequence.tokens)
            assert ours.after == theirs.after


@settings(max_examples=8, deadline=None)
@given(stop=st.integers(1, 160), batch=st.integers(1, 7))
def test_a_resumed_stream_gives_the_rows_of_one_never_stopped(
    stop: int, batch: int, corpus: Path, dataset_folder: Path
) -> None:
    whole = stream(corpus, dataset_folder).training("train", LENGTH, 0)
    expected = whole.rows(0, 200)
    first = stream(corpus, dataset_folder).training("train", LENGTH, 0)
    position = 0
    while position < stop:
        first.rows(position, batch)
        position += batch
    second = stream(corpus, dataset_folder).training("train", LENGTH, 0)
    second.resume(first.state(), position)
    assert second.state() == first.state()
    count = min(40, 200 - position)
    assert same(second.rows(position, count), expected[position : position + count])
    for samples in (whole, first, second):
        samples.close()


@pytest.mark.parametrize("packing", ["full", "greedy::drop", "single::truncate_right"])
def test_prompts_weigh_what_they_should(packing: str, dataset_folder: Path, tmp_path: Path) -> None:
    lines = [{"prompt": f"What is {i}?", "completion": f"It is {i}."} for i in range(300)]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, lines)))
    source = {"kind": "jsonl", "documents": None, "prompt_weight": 0.25}
    found = stream(tmp_path / "x.jsonl", dataset_folder, source, packing=packing, splits=(1, 0, 0))
    samples, tokenizer = found.training("train", LENGTH, 0), found.tokenizer()
    weighed: dict[float, list[int]] = {0.0: [], 0.25: [], 1.0: []}
    for row in samples.rows(0, 60):
        for target, weight in zip(row.targets.tolist(), row.weights.tolist(), strict=True):
            weighed[weight].append(target)
    assert "hat is" in tokenizer.decode(weighed[0.25])
    assert "It is" not in tokenizer.decode(weighed[0.25])
    assert "It is" in tokenizer.decode(weighed[1.0])
    assert "hat" not in tokenizer.decode(weighed[1.0])
    assert set(weighed[0.0]) <= {found.end_of_text}
    samples.close()


@pytest.mark.parametrize(("lanes", "own"), [(8, 4), (6, 6)])  # 6 cannot be shared by 2 × 2
def test_replicas_share_the_rows_of_one(
    corpus: Path, dataset_folder: Path, lanes: int, own: int
) -> None:
    found = stream(corpus, dataset_folder, lanes=lanes)
    alone = found.training("train", LENGTH, 0)
    expected = alone.rows(0, 48)
    for which in range(2):
        samples = found.training("train", LENGTH, 0)
        loader = Loader(samples, sequence_length=LENGTH, batch_size=12, micro=2, share=(which, 2))
        for step in range(4):
            batches = loader.micro_batches(step * 12)
            given = np.concatenate([batch.tokens.numpy() for batch in batches])
            wanted = [
                r.tokens for i, r in enumerate(expected[step * 12 :][:12]) if i // 2 % 2 == which
            ]
            assert np.array_equal(given, wanted)
        assert len(samples.state()["stream"]["cursors"]) == own
        samples.close()
    alone.close()


def test_an_epoch_has_every_document_once(corpus: Path, dataset_folder: Path) -> None:
    found = stream(corpus, dataset_folder, packing="single::truncate_right", splits=(1, 0, 0))
    text = found.training("train", 4096, 3)._text
    shards, seen = len(text.shards), []
    for lane in range(3):
        for row in rows_from(text, Cursor(lane, 0, 0), 3):
            seen.append(row.sequence.tokens.tobytes())
            if row.after.shard >= shards:
                break
    in_order = dataclasses.replace(text, shuffle=False)
    expected = []
    for row in rows_from(in_order, Cursor(0, 0, 0)):
        expected.append(row.sequence.tokens.tobytes())
        if row.after.shard >= shards:
            break
    assert sorted(seen) == sorted(expected)
    assert seen != expected


def test_rows_of_a_window_are_shuffled(corpus: Path, dataset_folder: Path) -> None:
    found = stream(corpus, dataset_folder, lanes=1, shuffle_buffer=50)
    samples = found.training("train", LENGTH, 0)
    shuffled = [row.tokens.tobytes() for row in samples.rows(0, 50)]
    text = samples._text
    plain = [
        row.sequence.tokens[:-1].astype(np.int64).tobytes()
        for row in itertools.islice(rows_from(text, Cursor(0, 0, 0)), 50)
    ]
    assert shuffled != plain
    assert sorted(shuffled) == sorted(plain)
    samples.close()


def test_validation_is_the_start_of_its_own_split(corpus: Path, dataset_folder: Path) -> None:
    found = stream(corpus, dataset_folder)
    (part,) = found.validation("validation", LENGTH, 5)
    assert part.samples.count == 5
    with pytest.raises(ConfigError, match="no known end"):
        found.validation("validation", LENGTH, None)
    assert (
        stream(corpus, dataset_folder, splits=(1, 0, 0)).validation("validation", LENGTH, 5) == []
    )


def test_another_stream_is_not_gone_on_with(corpus: Path, dataset_folder: Path) -> None:
    state = stream(corpus, dataset_folder).training("train", LENGTH, 0).state()
    other = stream(corpus, dataset_folder, lanes=2).training("train", LENGTH, 0)
    with pytest.raises(CheckpointError, match="trained on another stream"):
        other.resume(state, 8)
    own = stream(corpus, dataset_folder).training("train", LENGTH, 0)
    state["stream"]["cursors"] = {"0": [1]}
    with pytest.raises(CheckpointError, match="place in the stream is damaged"):
        own.resume(state, 8)


def test_what_a_stream_leaves_out_is_counted_once_and_told(
    dataset_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [json.dumps({"text": f"document {i} has words"}) for i in range(400)]
    lines[7] = "{broken"
    lines[300] = '{"text": 5}'
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    source = {"kind": "jsonl", "documents": None, "on_error": "skip"}
    found = stream(tmp_path / "x.jsonl", dataset_folder, source, splits=(1, 0, 0))
    samples = found.training("train", LENGTH, 0)
    # Several epochs, some of them by a stream that is gone on with in the middle of a shard.
    samples.rows(0, 400)
    again = found.training("train", LENGTH, 0)
    again.resume(samples.state(), 400)
    again.rows(400, 400)
    for one in (samples, again):
        assert list(one.state()["stream"]["left_out"].values()) == [{"broken records left out": 2}]
        one.close()
    with_place = capsys.readouterr().err
    assert with_place.count("the stream has broken records left out, first") == 2
    assert ", line 8: is no JSON" in with_place or ", line 301: has a field" in with_place


@pytest.mark.parametrize("packing", ["full", "single::truncate_right"])
def test_a_stream_is_cleaned_as_prepared_text_is(
    packing: str, dataset_folder: Path, tmp_path: Path
) -> None:
    texts = [f"cafe\u0301 number {i} " + "12345 " * (i % 3) * 9 for i in range(300)]
    (tmp_path / "x.txt").write_text("\n\n".join(texts), encoding="utf-8")
    tokenizer = TokenizerSection.model_validate({"from": str(dataset_folder / "tokenizer.json")})
    data = DataSection(splits=(1, 0, 0), lanes=1, packing=packing)
    cleaning = CleanSection(unicode="nfc", max_digits=0.6)
    found = open_stream(section(tmp_path / "x.txt"), tokenizer, data, cleaning)
    text = dataclasses.replace(found.training("train", 8, 0)._text, shuffle=False)
    tokens: list[int] = []
    for row in rows_from(text, Cursor(0, 0, 0)):
        if row.after.shard >= len(text.shards):
            break
        tokens += row.sequence.tokens[: None if packing != "full" else -1].tolist()
    whole = found.tokenizer().decode(tokens)
    assert "caf\u00e9" in whole
    assert "e\u0301" not in whole
    if packing == "full":
        assert "number 3 " in whole
        assert "number 5 " not in whole
    left_out = sum(map(Counter, text.left_out.counts().values()), Counter[str]())
    assert left_out == {"documents left out: too many digits": 200}
    other = open_stream(section(tmp_path / "x.txt"), tokenizer, data)
    with pytest.raises(CheckpointError, match="trained on another stream"):
        other.training("train", 8, 0).resume(found.training("train", 8, 0).state(), 0)


@pytest.mark.parametrize("keys", [{"exact_duplicates": True}, {"near_duplicates": 0.8}])
def test_duplicates_cannot_be_told_in_a_stream(
    keys: dict, corpus: Path, dataset_folder: Path
) -> None:
    tokenizer = TokenizerSection.model_validate({"from": str(dataset_folder / "tokenizer.json")})
    with pytest.raises(
        ConfigError, match=rf"a stream has not read them.*clean\.{next(iter(keys))}"
    ):
        open_stream(section(corpus), tokenizer, DataSection(), CleanSection(**keys))


def test_a_source_without_text_is_told(dataset_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "x.txt").write_text("\n \n\n")
    samples = stream(tmp_path / "empty", dataset_folder).training("train", LENGTH, 0)
    with pytest.raises(DataError, match="no text for the split train"):
        samples.rows(0, 1)
    samples.close()
    with pytest.raises(ConfigError, match="needs a tokenizer that is there"):
        open_stream(section(tmp_path), TokenizerSection(), DataSection())
