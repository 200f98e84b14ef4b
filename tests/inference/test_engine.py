"""Generation: caches, batches, sampling and stopping against plain definitions."""

import copy
from pathlib import Path

import pytest
import torch
import transformers

from penstock.config.schema import GenerateSection, ModelSection
from penstock.data.dataset import Dataset
from penstock.errors import CheckpointError, UserError
from penstock.inference.cache import attention_mask
from penstock.inference.engine import Engine
from penstock.models.huggingface import save_weights
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
    with pytest.raises(UserError, match="more than the 128 there is room for"):
        engine.generate(["x"], GenerateSection(tokens=128), 0)


def test_greedy_tokens_equal_transformers(engine: Engine, tmp_path: Path) -> None:
    model, tokenizer = engine._model, engine._tokenizer
    save_weights(
        tmp_path, dict(model.named_parameters()), model.architecture, tokenizer=None,
        end_of_text=tokenizer.end_of_text,
    )  # fmt: skip
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    completions = engine.generate(PROMPTS, GenerateSection(tokens=20, repetition_penalty=1.2), 0)
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        ids = torch.tensor([tokenizer.encode(prompt) or [tokenizer.end_of_text]])
        out = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False,
            repetition_penalty=1.2, pad_token_id=tokenizer.end_of_text,
        )[0, ids.shape[1] :].tolist()  # fmt: skip
        out = out[: out.index(tokenizer.end_of_text)] if tokenizer.end_of_text in out else out
        assert completion.text == tokenizer.decode(out)


def test_groups_of_any_size_give_the_same_texts_in_order(engine: Engine) -> None:
    section = {"tokens": 12, "temperature": 1.0, "top_k": 20, "repetition_penalty": 1.3}
    texts = [
        [c.text for c in engine.generate(PROMPTS, GenerateSection(batch=batch, **section), 3)]
        for batch in (1, 2, 3, 8)
    ]
    assert texts[0] == texts[1] == texts[2] == texts[3]
    assert len(set(texts[0])) == len(PROMPTS)


def test_no_prompts_give_no_texts(engine: Engine) -> None:
    assert engine.generate([], GenerateSection(), 0) == []


def test_padding_is_never_looked_at_and_every_place_sees_itself() -> None:
    exact = attention_mask(3, 2, 3, torch.tensor([0, 2, 4]))[:, 0].int().tolist()
    assert exact == [
        [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]],
        [[0, 0, 1, 1, 0], [0, 0, 1, 1, 1]],
        [[0, 0, 0, 1, 0], [0, 0, 0, 0, 1]],
    ]
    roomy = attention_mask(3, 2, 5, torch.tensor([1]))[:, 0].int().tolist()
    assert roomy == [[[0, 1, 1, 0, 0, 1, 0], [0, 1, 1, 0, 0, 1, 1]]]


def reciter(engine: Engine, prompt: str, text: str, end: bool = False) -> Engine:
    """A model whose positions name the next token: after `prompt` it says `text`."""
    tokenizer = engine._tokenizer
    model = copy.deepcopy(engine._model)
    ids = tokenizer.encode(text) + [tokenizer.end_of_text] * end
    with torch.no_grad():
        for block in model.blocks:
            for parameter in block.parameters():
                parameter.zero_()
        rows = model.embed.tokens.weight
        rows.copy_(torch.randn(rows.shape, generator=torch.Generator().manual_seed(0)))
        first = len(tokenizer.encode(prompt)) - 1
        model.embed.positions.weight[first : first + len(ids)] = 100 * rows[torch.tensor(ids)]
    return Engine(model, tokenizer)


TEXT = "naïve ☃ 日本語 \N{PARTY POPPER}\N{FAMILY} done: e\u0301 \ufffd!"


def test_streamed_pieces_are_whole_characters(engine: Engine) -> None:
    tokens = len(engine._tokenizer.encode(TEXT))
    pieces: list[str] = []
    [completion] = reciter(engine, "x =", TEXT).generate(
        ["x ="], GenerateSection(tokens=tokens), 0, pieces.append
    )
    assert completion.text == "".join(pieces) == TEXT
    assert sum("\ufffd" in piece for piece in pieces) == 1
    assert len(pieces) > 8


def test_every_stop_string_ends_the_text_however_tokens_cut_it(engine: Engine) -> None:
    speaker = reciter(engine, "x =", TEXT)
    tokens = len(engine._tokenizer.encode(TEXT))
    for start in range(0, len(TEXT) - 1, 2):
        for length in (1, 2, 5):
            stop = TEXT[start : start + length]
            if "\ufffd" in stop:
                continue
            pieces: list[str] = []
            section = GenerateSection(tokens=tokens, stop=["never said", stop, ""])
            [completion] = speaker.generate(["x ="], section, 0, pieces.append)
            assert completion.text == "".join(pieces) == TEXT[: TEXT.index(stop)]
            assert completion.stopped == "stop string"
            assert completion.tokens <= tokens


def test_the_first_of_several_stop_strings_counts(engine: Engine) -> None:
    section = GenerateSection(tokens=40, stop=["done", "日本", "done:"])
    [completion] = reciter(engine, "x =", TEXT).generate(["x ="], section, 0)
    assert completion.text == TEXT[: TEXT.index("日本")]


def test_end_of_text_ends_the_text_and_is_not_part_of_it(engine: Engine) -> None:
    pieces: list[str] = []
    [completion] = reciter(engine, "x =", "done", end=True).generate(
        ["x ="], GenerateSection(tokens=30), 0, pieces.append
    )
    assert completion.text == "".join(pieces) == "done"
    assert completion.stopped == "end of text"
    assert completion.tokens == len(engine._tokenizer.encode("done"))


def test_a_row_that_has_stopped_leaves_the_others_alone(engine: Engine) -> None:
    section = GenerateSection(tokens=20, stop=["e"], batch=5)
    together = engine.generate(PROMPTS, section, 0)
    alone = [engine.generate([prompt], section, 0)[0] for prompt in PROMPTS]
    for both in zip(together, alone, strict=True):
        assert len({(c.text, c.tokens, c.stopped) for c in both}) == 1
    assert len({completion.tokens for completion in together}) > 1


def test_a_request_that_just_fits_is_served(engine: Engine) -> None:
    length = len(engine._tokenizer.encode("x = 1"))
    [completion] = engine.generate(["x = 1"], GenerateSection(tokens=128 - length), 0)
    assert completion.tokens == 128 - length or completion.stopped == "end of text"
    with pytest.raises(UserError, match=f"at most {128 - length} tokens"):
        engine.generate(["x = 1"], GenerateSection(tokens=129 - length), 0)
    with pytest.raises(UserError, match=r"shorten the prompt$") as caught:
        engine.generate(["x", "word " * 200], GenerateSection(tokens=1), 0)
    assert "prompt 2" in str(caught.value)
    assert "at most" not in str(caught.value)


def test_prompts_that_are_not_text_are_refused(engine: Engine) -> None:
    with pytest.raises(UserError, match="prompt 1 is not text"):
        engine.generate(["caf\udce9"], GenerateSection(), 0)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_of_no_numbers_is_refused(engine: Engine, temperature: float) -> None:
    model = copy.deepcopy(engine._model)
    with torch.no_grad():
        model.blocks[0].mlp.up.weight[0, 0] = torch.nan
    with pytest.raises(CheckpointError, match="not numbers"):
        Engine(model, engine._tokenizer).generate(
            ["x"], GenerateSection(temperature=temperature), 0
        )
