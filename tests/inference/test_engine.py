"""Generation: caches, batches, sampling and stopping against plain definitions."""

import json
from pathlib import Path

import pytest
import torch
import transformers

from penstock.config.schema import GenerateSection, ModelSection
from penstock.data.dataset import Dataset
from penstock.errors import DataError, UserError
from penstock.inference.engine import Engine
from penstock.inference.prompts import converse, read_prompts
from penstock.inference.sampling import keep_likely, next_token, penalize, row_generator
from penstock.models.initialization import initialize
from penstock.models.resolve import resolve_architecture
from penstock.models.transformer import Transformer


@pytest.fixture(scope="module")
def engine(dataset_folder: Path) -> Engine:
    tokenizer = Dataset.open(dataset_folder).tokenizer()
    section = ModelSection(preset="gpt2-tiny", max_positions=128)
    model = Transformer(resolve_architecture(section, tokenizer.vocab_size))
    initialize(model, 4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return Engine(model.requires_grad_(False), tokenizer)


PROMPTS = [
    "def read(",
    "",
    "import os\nimport sys\n\nclass Reader:\n    def",
    "x",
    "return self.value",
]


def greedy_without_cache(engine: Engine, prompt: str, count: int) -> list[int]:
    ids = engine._tokenizer.encode(prompt) or [engine._tokenizer.end_of_text]
    start = len(ids)
    for _ in range(count):
        ids.append(int(engine._model(torch.tensor([ids]))[0, -1].argmax()))
        if ids[-1] == engine._tokenizer.end_of_text:
            return ids[start:-1]
    return ids[start:]


def test_cached_greedy_text_equals_recomputation(engine: Engine) -> None:
    section = GenerateSection(tokens=20)
    for prompt in PROMPTS:
        [completion] = engine.generate([prompt], section, 0)
        ids = greedy_without_cache(engine, prompt, 20)
        assert completion.text == engine._tokenizer.decode(ids)


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.9, "top_k": 40, "top_p": 0.95}])
def test_a_batch_gives_the_text_of_one_by_one(engine: Engine, settings: dict) -> None:
    together = engine.generate(PROMPTS, GenerateSection(tokens=24, batch=5, **settings), 7)
    alone = engine.generate(PROMPTS, GenerateSection(tokens=24, batch=1, **settings), 7)
    assert [c.text for c in together] == [c.text for c in alone]


def test_seeds_choose_the_text(engine: Engine) -> None:
    section = GenerateSection(tokens=24, temperature=1.0)
    texts = [engine.generate(["def"], section, seed)[0].text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_a_stop_string_ends_the_text_before_it(engine: Engine) -> None:
    full = engine.generate(["def read("], GenerateSection(tokens=30), 0)[0].text
    stop = full[8:11]
    pieces: list[str] = []
    section = GenerateSection(tokens=30, stop=[stop])
    [completion] = engine.generate(["def read("], section, 0, pieces.append)
    assert completion.text == full[: full.index(stop)]
    assert completion.stopped == "stop string"
    assert "".join(pieces) == completion.text


def test_streamed_text_is_the_text(engine: Engine) -> None:
    pieces: list[str] = []
    section = GenerateSection(tokens=40, temperature=2.0)
    [completion] = engine.generate(["x"], section, 3, pieces.append)
    assert "".join(pieces) == completion.text
    assert len(pieces) > 3


def test_too_long_requests_are_refused(engine: Engine) -> None:
    with pytest.raises(UserError, match="more than the model's 128 positions"):
        engine.generate(["x"], GenerateSection(tokens=128), 0)


def test_penalty_and_filters_equal_transformers() -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0)) * 3
    seen = torch.tensor([3, 7, 7, 9])
    reference = transformers.RepetitionPenaltyLogitsProcessor(1.3)(seen[None], logits[None].clone())
    assert torch.equal(penalize(logits, seen, 1.3), reference[0])
    reference = transformers.TopKLogitsWarper(5)(seen[None], logits[None].clone())[0]
    assert torch.equal(keep_likely(logits, 5, None), reference)
    reference = transformers.TopPLogitsWarper(0.7)(seen[None], logits[None].clone())[0]
    assert torch.equal(keep_likely(logits, None, 0.7), reference)


def test_sampling_follows_the_softmax() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0])
    generator = row_generator(0, 0)
    section = GenerateSection(temperature=0.5)
    counts = torch.zeros(3)
    for _ in range(4000):
        counts[next_token(logits, torch.tensor([0]), section, generator)] += 1
    assert torch.allclose(counts / 4000, torch.softmax(logits / 0.5, 0), atol=0.025)


def test_bad_lines_of_a_prompts_file_are_named(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "a"}) + "\n\nnot json\n")
    with pytest.raises(DataError, match="line 3"):
        read_prompts(path)
    path.write_text(json.dumps({"prompt": "a"}) + "\n\n" + json.dumps({"prompt": "b"}))
    assert read_prompts(path) == ["a", "b"]


def test_a_conversation_ends_with_the_input(
    engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    from penstock.console import Console

    lines = iter(["def", "x"])

    def read_line(prompt: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    section = GenerateSection(tokens=5)
    converse(
        Console(), lambda text, write: engine.generate([text], section, 0, write)[0], read_line
    )
    expected = engine.generate(["def"], section, 0)[0].text
    assert f"def{expected}" in capsys.readouterr().out
