"""From text to values: YAML 1.2 scalars, texts left alone, mistakes with file and line."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.config.data import SourceSection
from penstock.config.load import as_config, dump_config, load_config
from penstock.config.schema import Config, ModelSection, TrainSection
from penstock.errors import ConfigError


def word(override: str) -> object:
    """The value of one command-line override."""
    section, _, leaf = override.partition("=")[0].partition(".")
    value = load_config(None, [override]).config
    part = getattr(value, section)
    return getattr(part, leaf) if leaf else part


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.steps=010", 10),
        ("train.steps=1e3", 1000),
        ("train.tokens=1_000", 1000),
        ("optimizer.lr=6e-4", 6e-4),
        ("optimizer.lr=.5", 0.5),
        ("optimizer.decay_all=true", True),
        ("optimizer.clip=null", None),
        ("optimizer.betas=[0.9, 0.99]", (0.9, 0.99)),
        ("compile.mode=off", "off"),
        ("run=5", "5"),
        ("run=2024-01-01", "2024-01-01"),
        ("run=", ""),
        ("data.split=1", "1"),
        ("source.path=[a, 'b c']", ["a", "b c"]),
        ("source.path=[odd", "[odd"),
        ("generate.prompt=[1, 2]", "[1, 2]"),
        ("generate.prompt=a\n  b\t", "a\n  b\t"),
        ('generate.prompt="quoted"', '"quoted"'),
        ("generate.stop=[6e-4, null, '']", None),
        ("trust=[00123, 1e5]", ["00123", "1e5"]),
    ],
)
def test_words_are_read_by_the_type_of_their_key(override: str, value: object) -> None:
    if value is None and "stop" in override:
        with pytest.raises(ConfigError, match="stop"):
            word(override)
    else:
        assert word(override) == value


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps=1:30", "train.steps=1:30 is wrong"),
        ("train.steps=true", "train.steps=true is wrong: not true or false"),
        ("train.steps=" + "9" * 5000, "exceeded maximum size"),
        ("train.steps=[1]", r"train.steps=\[1\] is wrong"),
        ("train.steps={a: 1}", r"train.steps=\{a: 1\} is wrong"),
        ("train.steps=" + "[" * 5000, "train.steps="),
        ("optimizer.lr=.nan", "finite"),
        ("model=gpt2", "model is a section, not a value .* set its keys, such as model.preset"),
        ("model.from_=x", "did you mean model.from?"),
        ("layers=3", "did you mean model.layers?"),
        ("zzzzqqqq=3", "there is no key zzzzqqqq .* see `penstock VERB --help`"),
        ("=3", "there is no key"),
        ("steps", "steps is not key=value"),
    ],
)
def test_wrong_words_are_one_short_line(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(None, [override])
    assert "\n" not in str(caught.value)
    assert "command line" in str(caught.value)
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n\ntrain:\n  setps: 4\n", r"no key train.setps \(FILE:4\): did you mean train.steps\?"),
        ("\ntrain:\n  steps: -4\n", r"train.steps=-4 is wrong: .* \(FILE:3\)"),
        (
            "train.steps: 5\ntrain: {steps: 6}",
            r"train.steps is given twice \(FILE:1 and FILE:2\): keep one",
        ),
        ("train: &a {steps: *a}", "FILE is nested too deeply"),
        ("[" * 5000, "FILE is nested too deeply"),
        ("model: gpt2", r"model is a section, not a value \(FILE:1\)"),
        ("? [a]\n: 2", r"a key must be a word \(FILE:1\)"),
        ("train: {steps: !!python/object/apply:os.getcwd []}", "FILE is not YAML"),
        ("seed: 1\n---\nseed: 2", "FILE is not YAML"),
        ("schema_version: 2", r"schema_version=2 is wrong"),
    ],
)
def test_wrong_files_name_the_line(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message.replace("FILE", str(file))):
        load_config(file)


def test_files_that_are_none_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_config(tmp_path)
    (tmp_path / "c.yaml").write_bytes(b"seed: \xff")
    with pytest.raises(ConfigError, match="is not YAML"):
        load_config(tmp_path / "c.yaml")


def test_files_may_be_empty_have_empty_sections_and_dotted_keys(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    for text in ("", "# nothing\n", "model:\ntrain: {}\n"):
        file.write_text(text)
        assert load_config(file).config == Config()
    file.write_text("model:\n  # layers: 3\ntrain.steps: 4\nrun: 2024-01-01\n")
    config = load_config(file).config
    assert (config.train.steps, config.run) == (4, "2024-01-01")


def test_the_python_api_takes_paths_and_sections(tmp_path: Path) -> None:
    config = as_config(run=tmp_path, source={"path": [Path("a"), "b"]})
    assert config.run == str(tmp_path)
    assert config.source.path == ["a", "b"]
    config = as_config(config, train=TrainSection(steps=3), model=ModelSection(from_="folder"))
    assert (config.train.steps, config.model.from_, config.run) == (3, "folder", str(tmp_path))
    assert config.source == SourceSection(path=["a", "b"])
    with pytest.raises(ConfigError, match="5 is no config"):
        as_config(5)  # type: ignore[arg-type]


def test_a_files_values_keep_their_line_in_the_api(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("seed: 1\ntrain:\n  steps: 0\n")
    with pytest.raises(ConfigError, match=r"c\.yaml:3"):
        as_config(file)
    with pytest.raises(ConfigError, match=r"train\.steps=0 is wrong: .* \(train\.steps\)"):
        as_config(file, train={"steps": 0})
    assert as_config(file, train={"steps": 2}).train.steps == 2


TEXT = st.text(max_size=20)


@given(TEXT, st.lists(TEXT, max_size=3), st.floats(0, 1e6), st.none() | st.integers(1, 2**70))
def test_what_is_dumped_loads_back_equal(
    tmp_path_factory: pytest.TempPathFactory,
    prompt: str,
    stop: list[str],
    lr: float,
    tokens: int | None,
) -> None:
    config = as_config(
        {"generate.prompt": prompt, "generate.stop": stop, "optimizer.lr": lr},
        train={"tokens": tokens},
        run="6e-4",
        trust=["0123", "1e5", "null", "~"],
    )
    file = tmp_path_factory.getbasetemp() / "dumped.yaml"
    file.write_text(dump_config(config), encoding="utf-8")
    assert load_config(file).config == config


def test_origins_say_file_line_and_command_line(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("seed: 1\nmodel:\n  layers: 3\n")
    loaded = load_config(file, ["seed=2", "data.path=D"])
    text = dump_config(loaded.config, loaded.origins)
    assert "seed: 2  # command line\n" in text
    assert f"  layers: 3  # {file}:3\n" in text
    assert "  path: D  # command line\n" in text
    assert "  heads: null  # default\n" in text
    assert "schema_version: 1  # default\n" in text
