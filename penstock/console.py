"""Everything a person sees in the terminal: messages, tables, progress, results.

All layers report through `get_console()`; no other module prints. Progress and messages go to
standard error, so that results on standard output stay clean. It knows nothing of the work.
"""

import contextlib
import sys
import time
from collections.abc import Generator, Sequence

import rich.box
import rich.progress
from rich.console import Console as RichConsole
from rich.table import Table
from rich.text import Text

_PLAIN_INTERVAL_SECONDS = 10.0
"""At least this long between progress lines when standard error is not a terminal."""


class Progress:
    """One running task: `advance` as work is done; extra fields are shown beside the bar."""

    def __init__(self, description: str, total: float | None, console: "Console") -> None:
        """`total` in the caller's unit; None when it is not known."""
        self.description = description
        self.total = total
        self.done = 0.0
        self._console = console
        self._last = time.monotonic()
        self._first: tuple[float, float] | None = None
        """Time and amount at the first report: what an earlier process did is in it."""
        self._bar: rich.progress.Progress | None = None
        self._task: rich.progress.TaskID | None = None

    def advance(self, amount: float = 1, **fields: str) -> None:
        """Note `amount` more of the total as done."""
        self.update(self.done + amount, **fields)

    def update(self, done: float, **fields: str) -> None:
        """Note that `done` of the total is done in all."""
        self.done = done
        now = time.monotonic()
        if self._first is None:
            self._first = (now, done)
        text = "  ".join(f"{name.replace('_', ' ')} {value}" for name, value in fields.items())
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self.done, fields=text)
        elif now - self._last >= _PLAIN_INTERVAL_SECONDS:
            self._last = now
            share = f" {self.done / self.total:.0%}" if self.total else ""
            seconds = self.remaining_seconds(now)
            left = "" if seconds is None else f"left {_clock(seconds)}"
            self._console.line("  ".join(filter(None, (self.description + share, text, left))))

    def remaining_seconds(self, now: float) -> float | None:
        """Seconds to the end at this process's own speed; None while that is not known.

        `now`: the present, by `time.monotonic`.
        """
        if self._first is None or not self.total or self.done <= self._first[1]:
            return None
        started, before = self._first
        return (now - started) / (self.done - before) * max(0.0, self.total - self.done)


class Console:
    """A terminal or a log: rich output on the one, plain lines on the other."""

    def __init__(self, *, quiet: bool = False, json: bool = False, speaker: str = "") -> None:
        """`quiet` leaves only warnings and results; `json` keeps standard output for JSON;
        `speaker` names the process in front of its errors, and its warnings are left to others.
        """
        self.speaker = speaker
        self.quiet = quiet
        self.json = json
        # Everything is printed as Text, never as markup: a path with `[b]` or `:x:` in it must be
        # shown, and copied, as it is.
        self._err = RichConsole(stderr=True, highlight=False, soft_wrap=True)

    @property
    def is_terminal(self) -> bool:
        """Whether a person is watching standard error."""
        return self._err.is_terminal

    def line(self, text: str) -> None:
        """One line as it is, unless quiet."""
        if not self.quiet:
            self._err.print(Text(text))

    def info(self, text: str) -> None:
        """Something worth knowing."""
        self.line(text)

    def warning(self, text: str) -> None:
        """Something the user should look at; shown even when quiet."""
        if self.speaker:
            return
        self._err.print(Text.assemble(("warning:", "yellow"), " ", text))

    def error(self, text: str) -> None:
        """The one line of a user's mistake."""
        who = f"penstock {self.speaker}".strip()
        self._err.print(Text.assemble((f"{who}:", "bold red"), " ", text))

    def path(self, label: str, path: object) -> None:
        """An artefact and where it is."""
        if not self.quiet:
            self._err.print(Text.assemble(("→", "green"), f" {label}: ", (str(path), "bold")))

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """A small table; columns after the first are right-aligned."""
        if self.quiet:
            return
        table = Table(
            title=Text(title),
            title_justify="left",
            box=rich.box.SIMPLE_HEAD,
            show_header=any(columns),
        )
        for index, column in enumerate(columns):
            table.add_column(Text(column), justify="right" if index else "left", overflow="fold")
        for row in rows:
            table.add_row(*(Text(str(cell)) for cell in row))
        self._err.print(table)

    def passage(self, parts: Sequence[tuple[str, str]]) -> None:
        """A text in several styles, unless quiet; what would move the cursor is shown as a sign."""
        if not self.quiet:
            safe = [(_printable(text), style) for text, style in parts]
            self._err.print(Text.assemble(*safe))

    @contextlib.contextmanager
    def stage(self, name: str) -> Generator[None]:
        """Frame a stage of work with its name and, at the end, its elapsed time."""
        started = time.monotonic()
        if not self.quiet:
            self._err.print(Text(f"▶ {name}", "bold cyan"))
        yield
        if not self.quiet:
            self._err.print(Text(f"  {name}: {_clock(time.monotonic() - started)}", "dim"))

    @contextlib.contextmanager
    def progress(self, description: str, total: float | None = None) -> Generator[Progress]:
        """Show a task's progress: a bar on a terminal, a line now and then elsewhere."""
        progress = Progress(description, total, self)
        if self.quiet or not self.is_terminal:
            yield progress
            return
        columns = (
            rich.progress.TextColumn("  {task.description}", markup=False),
            rich.progress.BarColumn(),
            rich.progress.TaskProgressColumn(),
            rich.progress.TextColumn("{task.fields[fields]}", markup=False),
            rich.progress.TimeElapsedColumn(),
            rich.progress.TextColumn("left"),
            rich.progress.TimeRemainingColumn(),
        )
        with rich.progress.Progress(*columns, console=self._err) as bar:
            progress._bar = bar
            progress._task = bar.add_task(description, total=total, fields="")
            yield progress

    def write(self, text: str, end: str = "\n") -> None:
        """A verb's result, on standard output, exactly as it is."""
        sys.stdout.write(text + end)
        sys.stdout.flush()


def _printable(text: str) -> str:
    """Text of others without control characters, which could do things to a terminal."""
    return "".join(c if c in "\n\t" or c.isprintable() else "·" for c in text)


def _clock(seconds: float) -> str:
    """A duration as 4.2 s, 3:05 or 2:03:05."""
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


_current: list[Console] = []


def get_console() -> Console:
    """This process's console."""
    if not _current:
        _current.append(Console())
    return _current[0]


def set_console(*, quiet: bool = False, json: bool = False, speaker: str = "") -> Console:
    """Replace this process's console, as the command line's flags ask."""
    _current[:] = [Console(quiet=quiet, json=json, speaker=speaker)]
    return _current[0]
