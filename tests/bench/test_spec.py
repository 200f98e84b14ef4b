"""Specifications: what can be wrong in one is told in a line that names the place."""

from pathlib import Path

import pytest

from penstock.bench.jobs import read_spec
from penstock.cli import main

ROOT = Path(__file__).resolve().parents[2]
GOOD = """
benchmarks:
  one:
    command: penstock train data.path=x run={folder}/run
    metrics: [tokens_per_second]
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "spec.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("tokens_per_second", "tokens_per_secnd", "spec.yaml:5): did you mean tokens_per_second?"),
        ("tokens_per_second", "latency_seconds", "penstock train reports no latency_seconds"),
        ("penstock train", "python x.py", "another program reports no tokens_per_second"),
        ("command:", "values: {a: b}\n    # command:", "one.variants.default has no command"),
        ("penstock train data.path=x run={folder}/run", "' '", "has no command"),
        ("command", "comand", "spec.yaml:4): did you mean command?"),
        ("{folder}", "{foldr}", "nothing fills the placeholder {foldr}"),
        ("{folder}", "build", "trains into one folder again and again"),
        ("penstock train", "penstock trian", "did you mean train?"),
        ("data.path=x", "'", "cannot be cut into words"),
        ("metrics: [tokens_per_second]", "metrics: []", "benchmarks.one.metrics"),
        ("metrics: [tokens_per_second]", "rounds: 5", "benchmarks.one.metrics is missing"),
        ("metrics:", "rounds: 0\n    metrics:", "benchmarks.one.rounds=0 is wrong"),
        ("metrics:", "baseline: b\n    metrics:", "there is no variant b"),
        ("metrics:", "metrics: [mfu]\n    metrics:", "metrics is given twice"),
        ("metrics:", "variants: {a: , a: }\n    metrics:", "variants.a is given twice"),
        ("metrics:", "variants: {a: , b: }\n    metrics:", "a and b run the same command"),
        (
            "metrics:",
            "variants: {a: , b: {values: {c: d}}}\n    metrics:",
            "the command does not use the value c",
        ),
        ("[tokens_per_second]", "{x: {regex: '('}}", "regex is no regular expression"),
        ("[tokens_per_second]", "{x: {regex: abc}}", "regex needs one group"),
        ("[tokens_per_second]", "{x: {json: a, until: b}}", "only one of json, regex, until"),
        ("benchmarks:", "benchmarks: [", "is not YAML"),
        ("benchmarks:", "- x:", "is not a mapping"),
        ("benchmarks:", "benchmark:", "did you mean benchmarks?"),
    ],
)
def test_a_mistake_in_a_specification_is_one_line(
    before: str, after: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, GOOD.replace(before, after, 1))
    assert main(["bench", str(path), f"out={tmp_path / 'out'}"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "takes one thing"),
        (["/nowhere.yaml"], "does not exist"),
        (["SPEC", "--benchmark", "on"], "did you mean one?"),
        (["SPEC", "--compare", "/nowhere.json"], "cannot be read"),
        (["SPEC", "--compare", "SPEC"], "is not a result"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(written(tmp_path, GOOD))
    assert main(["bench", *(path if word == "SPEC" else word for word in words)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line


def test_aliases_that_multiply_are_refused(tmp_path: Path) -> None:
    lines = [f"a{n}: &a{n} {{x: *a{n - 1}, y: *a{n - 1}}}" for n in range(1, 40)]
    path = written(tmp_path, "\n".join(["a0: &a0 {x: 1}", *lines]))
    with pytest.raises(Exception, match="more than 100,000 keys"):
        read_spec(path)


def test_values_stay_one_word_and_may_name_folders(tmp_path: Path) -> None:
    (benchmark,) = read_spec(
        written(
            tmp_path,
            """
            benchmarks:
              one:
                command: "penstock --config {here}/c.yaml train {how} run={folder}/r x={{folder}}"
                values: {how: "a b={work}"}
                warmup_steps: 2
                metrics: [mfu]
            """,
        )
    )
    (job,) = benchmark.jobs
    assert job.verb == "train"
    words = job.words({"folder": "/f", "work": "/w"})[2:]
    assert words == [
        *("penstock", "--config", f"{tmp_path}/c.yaml", "train", "a b=/w", "run=/f/r"),
        *("x={folder}", "--json", "train.throughput_warmup_steps=2"),
    ]


def test_the_specifications_in_the_repository_read() -> None:
    names = [b.name for b in read_spec(ROOT / "benchmarks" / "small.yaml")]
    assert names == ["training", "generation"]
