"""From the `model` section to an architecture, and everything that must be refused."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from penstock.config.schema import ModelSection
from penstock.errors import CheckpointError, ConfigError
from penstock.models.families import PRESETS
from penstock.models.families.gpt2 import to_hf_config
from penstock.models.resolve import resolve_architecture


def section(**keys: object) -> ModelSection:
    return ModelSection.model_validate(keys)


# The counts of the published checkpoints, a tied head counted once.
@pytest.mark.parametrize(
    ("preset", "parameters"),
    [
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
        ("pythia-70m", 70_426_624),
        ("pythia-160m", 162_322_944),
        ("pythia-410m", 405_334_016),
        ("pythia-1.4b", 1_414_647_808),
        ("pythia-12b", 11_846_072_320),
        ("gpt-neox-20b", 20_554_567_680),
        ("gpt-j-6b", 6_050_882_784),
        ("llama-2-7b", 6_738_415_616),
        ("llama-3-8b", 8_030_261_248),
        ("llama-3.2-1b", 1_235_814_400),
    ],
)
def test_presets_have_the_published_parameter_counts(preset: str, parameters: int) -> None:
    architecture = resolve_architecture(section(preset=preset))
    assert architecture.parameter_count() == parameters
    assert architecture.head_size == 64 or not preset.startswith("gpt2")


def test_the_help_names_every_preset() -> None:
    text = " ".join((ModelSection.model_fields["preset"].description or "").split())
    assert set(text.removesuffix(".").split(": ")[1].split(", ")) == set(PRESETS)


def test_the_documentation_has_every_presets_sizes() -> None:
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| `")]
    listed = {row[0].strip("`"): row[1:] for row in rows if len(row) == 9}
    assert set(listed) == set(PRESETS)
    for preset, row in listed.items():
        a = resolve_architecture(section(preset=preset))
        sizes = [a.layers, a.hidden_size, f"{a.heads} / {a.heads // a.group_size}", a.mlp_size]
        sizes += [a.max_positions, a.vocab_size, f"{a.parameter_count():,}"]
        assert row == [f"`{a.family}`", *map(str, sizes)]


def test_any_field_overrides_the_preset() -> None:
    architecture = resolve_architecture(
        section(preset="gpt2-tiny", layers=5, hidden_size=96, dropout=0.25, norm_epsilon=1e-6)
    )
    assert (architecture.layers, architecture.hidden_size) == (5, 96)
    assert (architecture.dropout, architecture.norm_epsilon) == (0.25, 1e-6)
    assert architecture.mlp_size == 4 * 96
    assert resolve_architecture(section(preset="gpt2-tiny", mlp_size=100)).mlp_size == 100


def test_the_tokenizers_vocabulary_replaces_the_presets_but_not_the_users() -> None:
    assert resolve_architecture(section(preset="gpt2"), 8192).vocab_size == 8192
    assert resolve_architecture(section(preset="gpt2", vocab_size=9000), 8192).vocab_size == 9000


def test_heads_follow_a_width_that_they_do_not_divide() -> None:
    def heads(**keys: object) -> tuple[int, int | None]:
        found = resolve_architecture(section(**keys), 500)
        return found.heads, found.kv_heads

    assert heads(family="gpt2", layers=48, hidden_size=1024) == (16, None)
    assert heads(family="gpt2", hidden_size=96) == (12, None)
    assert heads(family="gpt2", hidden_size=1024, heads=8) == (8, None)
    with pytest.raises(ConfigError, match="heads=12 does not divide model.hidden_size=1000"):
        heads(family="gpt2", hidden_size=1000)


@pytest.mark.parametrize(
    ("keys", "vocab_size", "message"),
    [
        ({"preset": "gpt2-medum"}, None, r"no preset gpt2-medum .*did you mean gpt2-medium\?"),
        ({"preset": "zzz"}, None, "choose gpt2, gpt2-medium"),
        ({"family": "lama"}, None, "no family lama .*choose gpt2"),
        ({"preset": "gpt2", "heads": 5}, None, "heads=5 does not divide model.hidden_size=768"),
        (
            {"preset": "gpt2", "vocab_size": 100},
            200,
            "tokenizer has 200 tokens, the model only 100",
        ),
    ],
)
def test_contradictions_are_one_clear_line(
    keys: dict[str, object], vocab_size: int | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        resolve_architecture(section(**keys), vocab_size)
    assert "\n" not in str(caught.value)


def folder_with(path: Path, **changes: object) -> Path:
    base = to_hf_config(resolve_architecture(section(preset="gpt2-tiny")), end_of_text=0)
    (path / "config.json").write_text(json.dumps({**base, **changes}))
    return path


def test_a_folders_sizes_are_taken_and_its_vocabulary_is_fixed(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, n_layer=3, n_inner=None, layer_norm_epsilon=1e-6)
    architecture = resolve_architecture(section(**{"from": str(folder)}), 300)
    assert (architecture.layers, architecture.mlp_size) == (3, 256)
    assert (architecture.vocab_size, architecture.norm_epsilon) == (512, 1e-6)
    with pytest.raises(
        ConfigError, match="tokenizer has 513 tokens.*prepare the data with tokenizer.from="
    ):
        resolve_architecture(section(**{"from": str(folder)}), 513)


@pytest.mark.parametrize(
    "changes",
    [
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"add_cross_attention": True},
        {"activation_function": "relu"},
    ],
)
def test_settings_that_would_change_the_result_are_refused(
    changes: dict[str, object], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=next(iter(changes))):
        resolve_architecture(section(**{"from": str(folder_with(tmp_path, **changes))}))


@pytest.mark.parametrize(
    "changes",
    [{"model_type": "bert"}, {"model_type": ["gpt2"]}, {"n_layer": "two"}, {"n_layer": math.inf}],
)
def test_a_config_of_something_else_is_refused(changes: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not describe a model Penstock knows"):
        resolve_architecture(section(**{"from": str(folder_with(tmp_path, **changes))}))


@pytest.mark.parametrize("content", [b"", b"[1]", b"\xff\xfe", b"[" * 100_000, b"null"])
def test_damaged_configs_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json does not describe"):
        resolve_architecture(section(**{"from": str(tmp_path)}))


def test_folders_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"not a folder with a config\.json"):
        resolve_architecture(section(**{"from": str(tmp_path / "absent")}))
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError):
        resolve_architecture(section(**{"from": str(tmp_path / "file")}))


def test_resolving_does_not_import_torch() -> None:
    code = "import penstock.models.resolve, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
