"""What earlier versions have written is read, and gives the losses it gave; what a later one has
written is refused by its version.

The files are those of `tools/write_fixtures.py`, run once for each release.
"""

import json
import shutil
from pathlib import Path

import pytest

import penstock
from penstock.cli import main
from penstock.training.metrics import read_metrics

FIXTURES = Path(__file__).resolve().parent / "fixtures"
VERSIONS = sorted(path.name for path in FIXTURES.iterdir())
SAVED, STEPS = 4, 8


@pytest.fixture(params=VERSIONS)
def written(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A copy of a version's dataset and run; its config names them from here."""
    folder = tmp_path / "written"
    shutil.copytree(FIXTURES / request.param, folder)
    monkeypatch.chdir(folder)
    return folder


def test_every_release_has_left_its_files() -> None:
    assert penstock.__version__ in VERSIONS, "run tools/write_fixtures.py for this release"


def test_a_run_of_an_earlier_version_goes_on_with_the_losses_it_had(written: Path) -> None:
    before = read_metrics(written / "run" / "metrics.jsonl")
    penstock.train("run/config.yaml")
    after = read_metrics(written / "run" / "metrics.jsonl")
    for name in ("loss", "grad_norm", "validation_loss"):
        expected = {r["step"]: r[name] for r in before if name in r}
        found = {r["step"]: r[name] for r in after if name in r}
        assert found == pytest.approx(expected, rel=1e-5)
    assert [r["step"] for r in after if "loss" in r] == [*range(1, STEPS + 1)]
    # It went on: what it made now are the steps after the checkpoint.
    took = {r["step"]: r["step_seconds"] for r in after if "loss" in r}
    old = {r["step"]: r["step_seconds"] for r in before if "loss" in r}
    assert [step for step in took if took[step] != old[step]] == [*range(SAVED + 1, STEPS + 1)]
    text = penstock.generate(run="run", generate={"prompt": "3 times", "tokens": 4}).json()
    assert text["tokens"] == 4


@pytest.mark.parametrize(
    ("file", "key"),
    [
        (f"run/checkpoints/step-{SAVED:08}/manifest.json", "format_version"),
        ("dataset/dataset.json", "schema_version"),
    ],
)
def test_files_of_a_later_version_are_refused_in_one_line_that_names_it(
    file: str, key: str, written: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    content = json.loads((written / file).read_bytes())
    (written / file).write_text(json.dumps({**content, key: content[key] + 1}))
    assert main(["train", "--config", "run/config.yaml", "--quiet"]) == 2
    [line] = capfd.readouterr().err.splitlines()
    assert f"version {content[key] + 1}" in line
    assert str(Path(file).parent) in line
    assert len(read_metrics(written / "run" / "metrics.jsonl")) == STEPS + 2
