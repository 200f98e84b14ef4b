"""Configs: files, overrides, origins, round trips, generated pages."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.config.keys import all_keys
from penstock.config.load import as_config, dump_config, load_config
from penstock.config.reference import VERBS, json_schema, markdown_reference, verb_help
from penstock.config.schema import Config
from penstock.errors import ConfigError

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_overrides_win_over_the_file_and_origins_are_kept(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("train:\n  steps: 5\nmodel: {layers: 3, from: folder}\n")
    loaded = load_config(file, ["train.steps=7", "optimizer.lr=1e-4", "generate.stop=[a, b]"])
    assert loaded.config.train.steps == 7
    assert loaded.config.model.layers == 3
    assert loaded.config.model.from_ == "folder"
    assert loaded.config.optimizer.lr == 1e-4
    assert loaded.config.generate.stop == ["a", "b"]
    text = dump_config(loaded.config, loaded.origins)
    assert "steps: 7  # command line" in text
    assert f"layers: 3  # {file}" in text
    (tmp_path / "again.yaml").write_text(text)
    assert load_config(tmp_path / "again.yaml").config == loaded.config


@given(st.text(alphabet=st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=40))
def test_any_prompt_survives_the_round_trip(prompt: str) -> None:
    import yaml

    config = as_config({"generate.prompt": prompt, "seed": 3})
    assert Config.model_validate(yaml.safe_load(dump_config(config))) == config


def test_prompts_on_the_command_line_stay_text() -> None:
    for prompt in ("def add(", "a: b", "# no comment", "{x}", "yes and no", "it's", "5", "true"):
        assert load_config(None, [f"generate.prompt={prompt}"]).config.generate.prompt == prompt


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {steps: 1, steps: 2}", "given twice"),
        ("- a\n- b", "not a mapping"),
        ("train: [", "not YAML"),
        ("optimzer:\n  lr: 1", "did you mean optimizer.lr"),
        ("train:\n  steps: -3", "train.steps=-3 is wrong"),
    ],
)
def test_bad_files_are_one_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(tmp_path / "c.yaml")


def test_the_python_api_takes_mappings_dotted_keys_and_sections() -> None:
    nested = as_config({"train": {"steps": 2}}, seed=4)
    assert (
        nested
        == as_config({"train.steps": 2, "seed": 4})
        == as_config(None, train={"steps": 2}, seed=4)
    )
    with pytest.raises(ConfigError, match=r"did you mean train\.steps"):
        as_config(train={"step": 2})


def test_every_key_has_a_meaning_and_belongs_to_a_verb() -> None:
    shown = "\n".join(verb_help(verb) for verb in VERBS)
    for key in all_keys():
        if key != "schema_version":
            assert f"\n  {key} = " in shown, key
    for line in markdown_reference().splitlines():
        if line.startswith("| `"):
            assert not line.endswith("|  |"), line


def test_types_are_told_in_words() -> None:
    text = verb_help("train")
    assert "optimizer.betas = [0.9, 0.95]   (list of number)" in text
    assert "train.steps = null   (integer | null)" in text
    assert "checkpoint.resume = auto   (auto | must | never)" in text
    assert "train.tensorboard = true   (true or false)" in text
    assert r"greedy::drop\|truncate_left" in markdown_reference()
    for word in ("typing.", "<class", "Annotated", "NoneType"):
        assert word not in text + markdown_reference()


def test_generated_pages_are_up_to_date() -> None:
    assert (DOCS / "configuration.md").read_text() == markdown_reference(), "run make docs"
    assert json.loads((DOCS / "schema.json").read_text()) == json_schema(), "run make docs"
