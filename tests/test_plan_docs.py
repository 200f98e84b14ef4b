"""docs/plan.md: its commands run, its target loads, its table is what the planner says."""

import re
from pathlib import Path

import pytest

from penstock.cli import main
from penstock.hardware.target import load_target, target_names
from tests.compiler.test_placements import plan_for

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "plan.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("line", re.findall(r"^    penstock (plan .*)$", PAGE, re.MULTILINE))
def test_commands_run(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line.split()) == 0
    assert "Predicted memory" in capsys.readouterr().err


def test_the_advice_shown_is_the_advice_given(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "model.preset=gpt2-xl", "batch.micro=64", "plan.target=h100"]) == 0
    (shown,) = re.findall(r"^    (batch\.micro=.* tried\.)$", PAGE, re.MULTILINE)
    assert shown in " ".join(capsys.readouterr().err.split())


def test_the_target_shown_loads(tmp_path: Path) -> None:
    shown = PAGE[PAGE.index("    name: my-machine") : PAGE.index("A missing, negative")]
    path = tmp_path / "mine.yaml"
    path.write_text(re.sub("^    ", "", shown, flags=re.MULTILINE))
    assert load_target(str(path)).streams == ("optimizer",)


def test_every_target_is_listed() -> None:
    listed = PAGE[PAGE.index("| name | what") : PAGE.index("Each file names")]
    assert set(re.findall(r"`([a-z0-9-]+)`", listed)) == set(target_names())


@pytest.mark.parametrize("name", ["small", "medium", "large-512", "large-1024"])
def test_the_table_of_placements_is_what_is_planned(name: str) -> None:
    model, _, length = name.partition("-")
    row = re.search(rf"^\| {model}, {length or 1024} \|(.*)\|$", PAGE, re.MULTILINE)
    assert row is not None
    by_hand, found, bubble_by_hand, bubble, fullest = (c.strip() for c in row[1].split("|"))
    accumulation = {"small": 2048, "medium": 4096, "large-512": 4096, "large-1024": 8192}[name]
    placement = [int(word) for word in by_hand.split()]
    theirs = plan_for(name, accumulation, "graphcore-pod16", layers_per_stage=placement)
    ours = plan_for(name, accumulation, "graphcore-pod16", stages=len(placement))
    assert " ".join(map(str, ours.layers_per_stage)) == found
    assert (f"{theirs.bubble:.1%}", f"{ours.bubble:.1%}") == (bubble_by_hand, bubble)
    for plan in (theirs, ours):
        assert f"{plan.memory['total'] / 2**20:.0f} MiB" == fullest
