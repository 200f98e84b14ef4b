"""The console: what goes where, and that every figure it shows is right."""

import io
import json
import re
import sys

import pytest

import penstock.console
from penstock.console import Console, get_console, set_console


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock the test sets: its one element is the present, in seconds."""
    now = [1000.0]
    monkeypatch.setattr(penstock.console.time, "monotonic", lambda: now[0])
    return now


def test_messages_go_to_standard_error_and_results_to_standard_output(
    capsys: pytest.CaptureFixture[str],
) -> None:
    console = Console()
    console.info("one")
    console.warning("two")
    console.error("three")
    console.path("run", "/a/b")
    console.table("title", ["name", "size"], [["x", 3]])
    with console.stage("packing"):
        console.write("result")
    seen = capsys.readouterr()
    assert seen.out == "result\n"
    for text in (
        "one",
        "warning: two",
        "penstock: three",
        "→ run: /a/b",
        "title",
        "packing: 0.0 s",
    ):
        assert text in seen.err


def test_quiet_leaves_only_warnings_errors_and_results(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(quiet=True)
    console.info("x")
    console.path("x", "x")
    console.table("x", ["x"], [["x"]])
    with console.stage("x"), console.progress("x", 2) as progress:
        progress.advance(1, x="x")
    console.warning("kept")
    console.write("kept too", end="")
    assert capsys.readouterr() == ("kept too", "warning: kept\n")


@pytest.mark.parametrize(
    "name", ["a[b]c", "/data/:smile:/x", "[/]", "C:\\dir\\", "[red]x", "x" * 300]
)
def test_names_are_shown_as_they_are(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    console.info(name)
    console.warning(name)
    console.error(name)
    console.path(name, name)
    with console.stage(name):
        pass
    assert capsys.readouterr().err.splitlines() == [
        name,
        f"warning: {name}",
        f"penstock: {name}",
        f"→ {name}: {name}",
        f"▶ {name}",
        f"  {name}: 0.0 s",
    ]


def test_tables_show_cells_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    Console().table("[t]", ["[c]"], [["[bold]x"], [":x:"]])
    seen = capsys.readouterr().err
    assert all(text in seen for text in ("[t]", "[c]", "[bold]x", ":x:"))


def test_plain_progress_prints_a_line_every_ten_seconds_at_most(
    capsys: pytest.CaptureFixture[str], clock: list[float]
) -> None:
    with Console().progress("training", total=100) as progress:
        progress.advance(0)
        for _ in range(50):
            clock[0] += 0.5
            progress.advance(1, loss="2.5", tokens_per_second="10")
    assert capsys.readouterr().err.splitlines() == [
        "training 20%  loss 2.5  tokens per second 10  left 40.0 s",
        "training 40%  loss 2.5  tokens per second 10  left 30.0 s",
    ]


def test_the_time_left_of_a_resumed_run_comes_from_its_own_speed(
    capsys: pytest.CaptureFixture[str], clock: list[float]
) -> None:
    with Console().progress("training", total=1000) as progress:
        progress.update(900)
        for _ in range(10):
            clock[0] += 2
            progress.advance(1)
    assert capsys.readouterr().err.splitlines()[-1] == "training 91%  left 3:00"


def test_the_time_left_is_not_guessed_where_it_cannot_be_known(
    capsys: pytest.CaptureFixture[str], clock: list[float]
) -> None:
    with Console().progress("reading") as progress:
        clock[0] += 20
        progress.advance(5, files="5")
    with Console().progress("counting", total=9) as progress:
        clock[0] += 20
        progress.advance(3)
    assert capsys.readouterr().err.splitlines() == ["reading  files 5", "counting 33%"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (59.94, "59.9 s"), (59.96, "1:00"), (185, "3:05"), (3599.6, "1:00:00"), (7385, "2:03:05")],
)  # fmt: skip
def test_durations_read_as_a_clock(seconds: float, text: str) -> None:
    assert penstock.console._clock(seconds) == text


def test_a_terminal_gets_a_bar_with_its_fields(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    console = Console()
    assert console.is_terminal
    with console.progress("[tokenizing]", total=4) as progress:
        progress.update(2, text="[3] MiB")
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    assert "[tokenizing]" in shown
    assert "50%" in shown
    assert "[3] MiB" in shown


def test_the_process_has_one_console_that_flags_replace() -> None:
    try:
        console = set_console(quiet=True, json=True)
        assert get_console() is console
        assert console.quiet
        assert console.json
    finally:
        set_console()
    assert not get_console().quiet


def test_results_are_written_exactly(capsys: pytest.CaptureFixture[str]) -> None:
    text = json.dumps({"text": "[bold] " + "long " * 100})
    Console(json=True).write(text)
    assert capsys.readouterr().out == text + "\n"
