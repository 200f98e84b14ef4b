"""The native generation kernel: the eager model's numbers for every family and format of weights."""

import copy
import json
from pathlib import Path

import pytest
import torch

import penstock
from penstock.compiler.build import build_kernels
from penstock.compiler.executable import Executable
from penstock.compiler.kernels import load_built
from penstock.compiler.native import Native
from penstock.compiler.planner import make_generation_plan
from penstock.errors import ConfigError, ExecutableError
from penstock.hardware.target import load_target
from penstock.inference.decoding import EagerDecoder
from penstock.inference.native import NativeDecoder
from penstock.models.architecture import Architecture
from penstock.models.initialization import initialize
from penstock.models.quantization import round_weights
from penstock.models.transformer import Transformer
from tests.numerics import assert_matches

pytestmark = pytest.mark.skipif(
    Native().problem() is not None, reason=f"no native kernel here: {Native().problem()}"
)

SIZES = {
    "layers": 2, "hidden_size": 84, "heads": 6, "mlp_size": 151, "max_positions": 300,
    "vocab_size": 97,
}  # fmt: skip
ALIGNED = SIZES | {"hidden_size": 96, "mlp_size": 160}
"""Sizes that a processor's matrix unit takes, where it has one."""
FAMILIES = {
    "gpt2": {},
    "gpt_neox": {
        "positions": "rotary", "rotary_fraction": 0.43, "residual": "parallel",
        "activation": "gelu", "tie_embeddings": False,
    },
    "gptj": {
        "positions": "rotary", "rotary_fraction": 0.43, "rotary_pairs": "neighbours",
        "residual": "parallel_one_norm", "attention_bias": False, "head_bias": True,
        "tie_embeddings": False,
    },
    "llama": {
        "positions": "rotary", "kv_heads": 2, "norm": "rms", "gated_mlp": True,
        "activation": "silu", "attention_bias": False, "mlp_bias": False, "tie_embeddings": False,
    },
}  # fmt: skip


def native_and_model(
    family: str, compute: str, weights: str | None, sizes: dict[str, int] = SIZES
) -> tuple[NativeDecoder, Transformer]:
    """For three texts of up to 300 tokens; weights far from zero, biases and norms included."""
    plan = make_generation_plan(
        Architecture(family=family, **sizes, **FAMILIES[family]),
        batch=3, compute=compute, weights=weights, capacity=300, target=load_target("zen5-2core"),
    )  # fmt: skip
    kernels = load_built(build_kernels(plan, toolchain="native"), "native")
    model = Transformer(plan.architecture)
    initialize(model, 4)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.mul_(3).add_(0.05 * noise)
    model.to(torch.bfloat16 if compute == "bf16" else torch.float32).requires_grad_(False)
    return NativeDecoder(copy.deepcopy(model), kernels, plan, release=True), model


CASES = [
    ("gpt2", "fp32", None),
    ("llama", "bf16", None),
    ("gptj", "fp32", "int8"),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (
            ("gpt2", "bf16", None), ("gpt2", "bf16", "int8"), ("gpt_neox", "fp32", None),
            ("gpt_neox", "bf16", None), ("gpt_neox", "fp32", "int8"), ("gptj", "fp32", None),
            ("gptj", "bf16", None), ("llama", "fp32", None), ("llama", "fp32", "int8"),
        )
    ),
]  # fmt: skip
TEXTS = (
    ([0], [1, 1, 5, 1]),
    ([0, 3, 30], [31, 1, 40, 1]),
    ([7, 0], [270, 1, 1]),  # more tokens than one call takes
    ([0, 299, 100], [300]),  # to the last place, and a text of one token
)


def logits(decoder: EagerDecoder | NativeDecoder) -> torch.Tensor:
    """Of all `TEXTS`, after every piece of them."""
    generator = torch.Generator().manual_seed(1)
    found: list[torch.Tensor] = []
    for padding, pieces in TEXTS:
        decoder.begin(torch.tensor(padding), 300)
        for size in pieces:
            tokens = torch.randint(0, 97, (len(padding), size), generator=generator)
            found.append(decoder.extend(tokens))
    return torch.cat(found)


@pytest.mark.parametrize(("family", "compute", "weights"), CASES)
def test_logits_are_those_of_the_model(family: str, compute: str, weights: str | None) -> None:
    native, model = native_and_model(family, compute, weights)
    if weights == "int8":
        round_weights(model)
    in_float32 = logits(EagerDecoder(copy.deepcopy(model).float()))
    actual = logits(native)
    if compute == "fp32":
        # Rows of int8 products are rounded to 16 bits.
        assert_matches(actual, in_float32, 1e-5 if weights is None else 1e-3)
    else:
        eager_error = (logits(EagerDecoder(model)) - in_float32).abs().max()
        assert (actual - in_float32).abs().max() <= eager_error
        assert_matches(actual, in_float32, 5e-2)


def test_bf16_products_of_sizes_in_whole_tiles_are_those_of_the_model() -> None:
    native, model = native_and_model("llama", "bf16", None, ALIGNED)
    in_float32 = logits(EagerDecoder(copy.deepcopy(model).float()))
    actual = logits(native)
    eager_error = (logits(EagerDecoder(model)) - in_float32).abs().max()
    assert (actual - in_float32).abs().max() <= eager_error
    # Alone, three at once, or a prompt in two pieces: the same sums.
    tokens = torch.randint(0, 97, (3, 40), generator=torch.Generator().manual_seed(3))
    native.begin(torch.zeros(3, dtype=torch.int64), 300)
    together = native.extend(tokens)
    native.begin(torch.zeros(1, dtype=torch.int64), 300)
    native.extend(tokens[1:2, :39])
    assert torch.equal(native.extend(tokens[1:2, 39:])[0], together[1])


def test_texts_do_not_depend_on_each_other_and_the_verb_uses_the_kernel(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.penstock"
    prompts = tmp_path / "prompts.jsonl"
    lines = ["def read(", "import os\nimport sys\n\nclass Reader:\n    def", "x", "return", ""]
    prompts.write_text("".join(json.dumps({"prompt": line}) + "\n" for line in lines))
    for weights in (None, "int8"):
        precision = {"compute": "fp32", "weights": weights}
        made = penstock.compile(
            mode="generate", run=trained_run, executable=path, precision=precision,
            generate={"batch": 4}, data={"sequence_length": 60},
        )  # fmt: skip
        assert made.toolchain == "native"
        assert [*Executable.open(path).kernels()] == ["transformer_step"]
        texts: list[list[str]] = []
        with monkeypatch.context() as patch:
            patch.setenv("PATH", "")
            for batch, file in ((1, path), (3, path), (4, path), (4, None)):
                settings = {"input": str(prompts), "tokens": 12, "batch": batch}
                done = penstock.generate(
                    run=trained_run, executable=file, generate=settings,
                    precision=precision, out=tmp_path / "out.jsonl",
                )  # fmt: skip
                texts.append([completion.text for completion in done.completions])
        assert all(text == texts[0] for text in texts)


def test_it_is_refused_where_it_does_not_apply(tmp_path: Path) -> None:
    settings = {"model": {"preset": "gpt2-tiny"}, "executable": tmp_path / "x.penstock"}
    with pytest.raises(ConfigError, match="native toolchain makes executables for generating"):
        penstock.compile(compile={"toolchain": "native"}, **settings)
    with pytest.raises(ConfigError, match="eager toolchain has no kernels for int8 weights"):
        penstock.compile(
            mode="generate", compile={"toolchain": "eager"}, precision={"weights": "int8"},
            **settings,
        )  # fmt: skip


def test_a_text_outside_the_cache_is_refused() -> None:
    native, _ = native_and_model("gpt2", "fp32", None)
    native.begin(torch.zeros(4, dtype=torch.int64), 300)
    with pytest.raises(ExecutableError, match="outside the generation kernel's cache"):
        native.extend(torch.zeros(4, 1, dtype=torch.int64))
