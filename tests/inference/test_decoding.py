"""Generation through an executable: the eager model's numbers and text, and refusals."""

from pathlib import Path

import pytest
import torch

import penstock
from penstock.compiler.executable import Executable
from penstock.config.schema import GenerateSection
from penstock.data.tokenizer import Tokenizer
from penstock.errors import UserError
from penstock.inference.decoding import CompiledDecoder, EagerDecoder
from penstock.inference.engine import Engine
from penstock.models.initialization import initialize
from penstock.models.transformer import Transformer
from tests.numerics import assert_matches


@pytest.fixture(scope="module")
def executable(tmp_path_factory: pytest.TempPathFactory) -> Executable:
    """gpt2-tiny for texts of up to 300 tokens, one or three at once, in fp32."""
    path = tmp_path_factory.mktemp("executable") / "generate.penstock"
    penstock.compile(
        mode="generate",
        model={"preset": "gpt2-tiny", "max_positions": 300, "vocab_size": 512},
        generate={"batch": 3},
        precision={"compute": "fp32"},
        compile={"toolchain": "inductor"},
        executable=path,
    )
    return Executable.open(path)


@pytest.fixture(scope="module")
def decoders(executable: Executable) -> tuple[EagerDecoder, CompiledDecoder]:
    model = Transformer(executable.plan.architecture)
    initialize(model, 4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    model.requires_grad_(False)
    shapes = executable.plan.generation_shapes()
    return EagerDecoder(model), CompiledDecoder(model, executable.kernels(), shapes)


@pytest.mark.parametrize(
    ("padding", "pieces", "capacity"),
    [
        ([0], [1, 1, 1], 10),  # token by token from the start
        ([0], [5, 1, 1], 20),  # a prompt shorter than a chunk
        ([0], [5, 1, 1], 300),  # the same with no room for padding
        ([0], [32, 1], 40),  # one chunk
        ([0, 3], [70, 1, 1], 80),  # chunks that overlap, two rows of three
        ([0, 3, 30], [31, 1, 40, 1], 120),  # a second long piece
        ([7], [255, 1, 1, 1, 1], 300),  # from the short cache to the long one
        ([0, 299, 100], [299, 1], 300),  # to the last place
    ],
)
def test_kernels_compute_what_the_model_computes(
    decoders: tuple[EagerDecoder, CompiledDecoder],
    padding: list[int],
    pieces: list[int],
    capacity: int,
) -> None:
    generator = torch.Generator().manual_seed(len(pieces))
    for decoder in decoders:
        decoder.begin(torch.tensor(padding), capacity)
    for size in pieces:
        tokens = torch.randint(0, 512, (len(padding), size), generator=generator)
        expected, actual = (decoder.extend(tokens) for decoder in decoders)
        assert actual.shape == (len(padding), 512)
        assert_matches(actual, expected, 1e-4)


def test_text_is_the_same_as_eagerly_and_in_any_batch(
    decoders: tuple[EagerDecoder, CompiledDecoder], dataset_folder: Path
) -> None:
    tokenizer = Tokenizer.load(dataset_folder / "tokenizer.json")
    prompts = ["def read(", "", "import os\nimport sys\n\nclass Reader:\n    def", "x", "return"]
    texts: list[list[str]] = []
    for decoder in decoders:
        engine = Engine(decoder._model, tokenizer, decoder)
        for batch in (1, 2, 5):
            section = GenerateSection(tokens=30, batch=batch)
            texts.append([completion.text for completion in engine.generate(prompts, section, 0)])
    assert all(text == texts[0] for text in texts)


def test_the_verb_uses_the_executable_and_compiles_nothing(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.penstock"
    made = penstock.compile(
        mode="generate",
        run=trained_run,
        executable=path,
        generate={"batch": 1},
        data={"sequence_length": 40},
        compile={"toolchain": "inductor"},
    )
    assert made.plan.compute == "fp32"
    monkeypatch.setenv("PATH", "")
    settings = {"prompt": "def ", "tokens": 20}
    compiled = penstock.generate(run=trained_run, executable=path, generate=settings)
    eager = penstock.generate(run=trained_run, generate=settings)
    assert compiled.completions[0].text == eager.completions[0].text
    with pytest.raises(UserError, match="more than the 40 there is room for"):
        penstock.generate(run=trained_run, executable=path, generate={"prompt": "x", "tokens": 40})


def test_an_executable_for_something_else_is_left_aside_or_refused(
    trained_run: Path,
    executable: Executable,
    tiny_executable: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = {"prompt": "x", "tokens": 2}
    with_it = penstock.generate(run=trained_run, executable=tiny_executable, generate=settings)
    assert with_it.completions[0].text == (
        penstock.generate(run=trained_run, generate=settings).completions[0].text
    )
    assert "is for mode=train: generate goes on without it" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"compiled for architecture\.\w+="):
        penstock.generate(
            run=trained_run, executable=executable.path, generate={"prompt": "x", "tokens": 2}
        )
