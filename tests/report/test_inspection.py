"""What `inspect` says of datasets: figures against a count by hand, and what a person sees."""

import json
from pathlib import Path

import numpy as np
import pytest

import penstock
from penstock.cli import main
from penstock.config.data import TokenizerSection
from penstock.data import statistics
from penstock.data.formats.registry import FORMATS
from penstock.data.formats.sequence import Layout, TokenSequence
from penstock.data.tokenizer import Tokenizer
from penstock.report.inspection_data import inspect_data

TEXTS = ["def main():", "a <b>bold</b> \x1b[2J word", "import os\nimport sys", "def main():"]


@pytest.fixture(scope="module")
def tokenizer(dataset_folder: Path) -> Tokenizer:
    return Tokenizer.load(dataset_folder)


@pytest.fixture
def data(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    sequences = []
    for text in TEXTS:
        ids = [*tokenizer.encode(text), tokenizer.end_of_text]
        weights = np.ones(len(ids), np.float32)
        weights[:2] = 0
        sequences.append(TokenSequence(np.array(ids), weights))
    writer = FORMATS["jsonl"].write(tmp_path / "data", "train", Layout(64, weights=True))
    for sequence in sequences:
        writer.append(sequence)
    writer.finish()
    tokenizer.save(tmp_path / "data" / "tokenizer.json")
    return tmp_path / "data"


def test_figures_are_what_a_count_by_hand_gives(data: Path, tokenizer: Tokenizer) -> None:
    values = penstock.inspect(data).json()["splits"]["train"]
    encoded = [tokenizer.encode(text) for text in TEXTS]
    count = sum(map(len, encoded))
    assert values["sequences"] == values["examined_sequences"] == 4
    assert values["tokens"] == count + 4
    assert values["longest"] == max(map(len, encoded)) + 1
    assert values["duplicates"] == 1
    assert values["weight_share"] == pytest.approx((count + 4 - 8) / (count + 4))
    assert values["tokens_per_word"] == pytest.approx(count / sum(len(t.split()) for t in TEXTS))
    assert values["tokens_per_byte"] == pytest.approx(count / sum(len(t.encode()) for t in TEXTS))
    assert sum(sequences for _, sequences in values["lengths"]) == 4
    assert values["packing_efficiency"] is None


def test_efficiency_is_the_part_of_rows_that_is_no_padding(data: Path, tmp_path: Path) -> None:
    words = [f"from={data}", f"out={tmp_path / 's'}", "data.format=sambanova", "--quiet"]
    assert main(["convert", "dataset", *words, "data.sequence_length=64"]) == 0
    values = penstock.inspect(tmp_path / "s").json()["splits"]["train"]
    assert values["packing_efficiency"] == pytest.approx(values["tokens"] / (4 * 64))


def test_a_dataset_of_ours_keeps_its_manifest(dataset_folder: Path) -> None:
    values = penstock.inspect(dataset_folder).json()
    assert values["kind"] == "dataset"
    train = values["splits"]["train"]
    assert train["examined"] == "all"
    assert train["documents"] == train["examined_sequences"]
    assert 1 < train["tokens_per_word"] < 10
    # Fertility over the text that was tokenized, as `prepare` has counted it.
    share = (train["tokens"] - train["documents"]) / train["text_bytes"]
    assert train["tokens_per_byte"] == pytest.approx(share, rel=0.2)


@pytest.mark.parametrize("name", ["megatron", "jsonl", "npy"])
def test_large_data_is_sampled_and_says_so(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(statistics, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(statistics, "_SAMPLE_SEQUENCES", 50)
    layout = Layout(8, sequences=2000, tokens=16000, equal=True, largest=2000)
    writer = FORMATS[name].write(tmp_path / "d", "train", layout)
    for index in range(2000):
        writer.append(TokenSequence(np.full(8, index)))
    writer.finish()
    values = penstock.inspect(tmp_path / "d").json()["splits"]["train"]
    assert values["examined"] == "a sample"
    assert values["examined_sequences"] == 50
    assert values["longest"] == 8
    if name == "megatron":  # spread over the whole
        assert values["sequences"] == 2000
        assert values["largest_token"] == 1999
    assert main(["inspect", str(tmp_path / "d")]) == 0
    assert "figures with ≈ are of a sample" in capsys.readouterr().err


def test_the_terminal_shows_text_and_lets_nothing_control_it(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(data)]) == 0
    shown = capsys.readouterr().err
    assert "import os" in shown
    assert "█" in shown
    assert "\x1b[2J" not in shown
    assert "·[2J word" in shown


def test_the_page_stands_alone_and_shows_text_as_text(data: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert main(["inspect", str(data), f"out={page}", "--quiet"]) == 0
    html = page.read_text(encoding="utf-8")
    assert "&lt;b&gt;bold&lt;/b&gt;" in html
    assert "<b>bold" not in html
    assert "http" not in html
    assert "<script" not in html
    assert 'title="weight 0.0"' in html or 'title="weight 0"' in html
    assert main(["inspect", str(data), f"out={tmp_path}"]) == 2


def test_without_a_tokenizer_ids_are_shown(
    data: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    (data / "tokenizer.json").unlink()
    found = inspect_data(data, TokenizerSection())
    assert found.splits[0].statistics is not None
    first = "".join(text for text, _ in found.splits[0].statistics.passages[0].parts)
    assert first.split() == [str(i) for i in [*tokenizer.encode(TEXTS[0]), tokenizer.end_of_text]]
    assert "set tokenizer.from=FOLDER" in found.notes[-1]
    assert json.dumps(found.json())


def test_a_long_prompts_completion_is_shown(tmp_path: Path) -> None:
    """The beginning, and the place where the loss begins; dots for what lies between and behind."""
    weights = np.zeros(2000, np.float32)
    weights[1000:] = 1
    writer = FORMATS["jsonl"].write(tmp_path, "train", Layout(width=2000, weights=True))
    writer.append(TokenSequence(np.arange(2000), weights))
    writer.append(TokenSequence(np.arange(300)))
    writer.append(TokenSequence(np.arange(300), np.repeat(np.float32([0, 1]), 150)))
    writer.finish()
    found = inspect_data(tmp_path, TokenizerSection()).splits[0].statistics
    assert found is not None

    def numbers(first: int, last: int) -> str:
        return "".join(f"{number} " for number in range(first, last))

    assert [passage.parts for passage in found.passages] == [
        [(numbers(0, 96), 0.0), (" … ", 0.0), (numbers(936, 1000), 0.0),
         (numbers(1000, 1096), 1.0), (" … ", 0.0)],
        [(numbers(0, 256), 1.0), (" … ", 0.0)],
        [(numbers(0, 150), 0.0), (numbers(150, 256), 1.0), (" … ", 0.0)],
    ]  # fmt: skip
