"""A page about a dataset that stands alone: figures, lengths, and sequences with their weights.

`api.inspect` writes it with `out=FILE.html`. It must never read the data itself.
"""

import dataclasses
from pathlib import Path

import jinja2

from penstock.errors import ConfigError
from penstock.files import atomic_write
from penstock.report.inspection_data import COLUMNS, DataInspection

_TEMPLATE = "inspection.html"


def write_inspection(found: DataInspection, out: Path) -> DataInspection:
    """Write the page; returns the inspection that knows of it.

    Raises:
        ConfigError: `out` is a folder.
    """
    if out.is_dir():
        raise ConfigError(f"{out} is a folder", where="out", do="name a file, such as data.html")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    page = environment.get_template(_TEMPLATE).render(
        name=found.path.resolve().name,
        kind="Dataset" if found.dataset is not None else "Data",
        found=found,
        columns=COLUMNS,
        bars=[_bars(split.statistics.bins()) if split.statistics else [] for split in found.splits],
    )
    atomic_write(out, page)
    return dataclasses.replace(found, page=out)


def _bars(bins: list[tuple[str, int]]) -> list[tuple[str, str, float]]:
    """(lengths, sequences, part of the largest bin in percent)."""
    most = max((count for _, count in bins), default=1)
    return [(lengths, f"{count:,}", 100 * count / max(1, most)) for lengths, count in bins]
