"""`penstock bench` from a file's path to its results.

`api.bench` calls it. Mistakes in the file are found before what runs and draws is loaded.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from penstock.bench.jobs import read_spec
from penstock.bench.results import read_results

if TYPE_CHECKING:
    from penstock.bench.report import BenchResult


def run_file(
    spec: Path, out: str | None, names: Sequence[str], compare: str | Path | None
) -> "BenchResult":
    """Run the benchmarks of `spec`, all or those in `names`, into the folder `out`.

    `compare`: an earlier results.json; what changed beyond the noise is flagged.

    Raises:
        ConfigError: a mistake in a file; nothing was run.
        BenchmarkError: a command failed.
    """
    chosen = read_spec(spec, names)
    # Read first: it may be the very file that is about to be replaced.
    earlier = None if compare is None else read_results(Path(compare))
    from penstock.bench.runner import run_benchmarks  # noqa: PLC0415 - loads torch and matplotlib

    folder = Path(out) if out is not None else Path("bench-results", spec.stem)
    return run_benchmarks(spec, chosen, folder, earlier)
