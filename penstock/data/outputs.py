"""The last step of `prepare`: merged splits in the format the user wants, and the manifest.

`data/prepare.py` calls it once every shard is done. It must never read text.
"""

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from penstock.config.cleaning import CleanSection
from penstock.config.data import DataSection
from penstock.console import get_console
from penstock.data.articles import ArticleRules
from penstock.data.convert_plan import plan_conversion
from penstock.data.convert_text import Vocabulary
from penstock.data.dataset import MANIFEST, PREPARED, SCHEMA_VERSION, TOKENIZER, is_inside
from penstock.data.documents import Chained, Documents
from penstock.data.duplicates import exact_duplicates, near_duplicates
from penstock.data.formats.registry import FORMATS
from penstock.data.formats.sambanova_metadata import CHECKSUMS, add_checksums
from penstock.data.formats.sequence import Layout, Origin
from penstock.data.merge import MergedReader, Rows, merge_split
from penstock.data.packing import parse_packing
from penstock.data.sources.piece import READ
from penstock.data.splits import SPLITS
from penstock.data.tokenize import Shard, Totals
from penstock.data.tokenizer import Tokenizer
from penstock.data.write_split import require_files, write_split
from penstock.errors import ConfigError, DataError
from penstock.files import atomic_write, canonical_json, fsync_folder, read_json, sha256_file


def check_output(data: DataSection) -> None:
    """Refuse settings that contradict each other before any work is done.

    Raises:
        ConfigError: they do.
    """
    target = FORMATS[data.format]
    require_files(target, data.files)
    packing = parse_packing(data.packing)
    if data.sequence_length is None and (packing.kind != "full" or target.fixed_width):
        raise ConfigError(
            f"packing {data.packing} for {data.format} needs a length",
            where="data.sequence_length",
            do="set data.sequence_length",
        )


def find_duplicates(
    shards: Sequence[Shard], totals: Totals, cleaning: CleanSection, work_folder: Path
) -> None:
    """Note in `totals` which documents are to be left out, the train split's being first."""
    if not cleaning.exact_duplicates and cleaning.near_duplicates is None:
        return
    with get_console().stage("looking for duplicates"):
        splits = [Documents(shards, name, prompted=False) for name in SPLITS]
        documents = Chained(splits)
        left_out = np.zeros(len(documents), bool)
        if cleaning.exact_duplicates:
            left_out = exact_duplicates(documents)
            totals.tally["documents left out: equal to an earlier one"] = int(left_out.sum())
        if cleaning.near_duplicates is not None:
            near = near_duplicates(documents, cleaning.near_duplicates, work_folder) & ~left_out
            totals.tally["documents left out: nearly equal to an earlier one"] = int(near.sum())
            left_out |= near
    ends = np.cumsum([len(split) for split in splits])[:-1]
    totals.left_out.update(zip(SPLITS, np.split(left_out, ends), strict=True))


def write_dataset(
    folder: Path,
    work_folder: Path,
    shards: Sequence[Shard],
    tokenizer: Tokenizer,
    data: DataSection,
    totals: Totals,
    rules: ArticleRules,
    seed: int,
    provenance: dict[str, Any],
) -> None:
    """Merge the shards in order and write them; the manifest comes last and makes it count.

    Raises:
        DataError: too little text.
    """
    categorized = provenance["source"]["category_key"] is not None
    names = provenance["source"]["categories"]
    rows = dataclasses.replace(_rows(data, totals, rules, seed), categorized=categorized)
    merged = work_folder / "merged"
    merged.mkdir(exist_ok=True)
    origins: dict[str, Origin | None] = {}
    for name in SPLITS:
        own = dataclasses.replace(rows, left_out=totals.left_out.get(name))
        origins[name] = merge_split(merged / name, shards, own, tokenizer, totals.splits[name])
    _require_text({name: totals.splits[name]["tokens"] for name in SPLITS}, data)
    _remove_former(folder)
    if data.format == "megatron" and not rows.with_roles:
        files = _moved(merged, folder)
        tokenizer.save(folder / TOKENIZER)
        files.append(folder / TOKENIZER)
    else:
        staging = work_folder / "written"
        files = _convert(merged, staging, folder, tokenizer, data, rows, origins, names)
    place = _SAMBANOVA_TOKENIZER if data.format == "sambanova" else Path(TOKENIZER)
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "format": data.format,
        "tokenizer": {
            "file": place.as_posix(),
            "sha256": tokenizer.sha256,
            "vocab_size": tokenizer.vocab_size,
            "end_of_text": tokenizer.end_of_text,
        },
        "packing": data.packing,
        "sequence_length": data.sequence_length,
        "splits": totals.splits,
        "read": {name: n for name, n in totals.tally.items() if name in READ},
        "left_out": {name: n for name, n in totals.tally.items() if name not in READ},
        "files": {
            path.relative_to(folder).as_posix(): {
                "sha256": sha256_file(path),
                "bytes": path.stat().st_size,
            }
            for path in sorted(files)
            if path != folder / CHECKSUMS
        },
        **provenance,
    }
    _seal(folder, work_folder / manifest_name(data), manifest, files, data)


def _seal(
    folder: Path, draft: Path, manifest: dict[str, Any], files: Sequence[Path], data: DataSection
) -> None:
    """Write the manifest at `draft` and bring it to its place, SambaNova's checksums before it."""
    atomic_write(draft, canonical_json(manifest))
    if data.format == "sambanova":
        # They name the manifest too, so the manifest cannot name them.
        named = [(path.relative_to(folder), path) for path in files if path != folder / CHECKSUMS]
        add_checksums(folder, [*named, (Path(draft.name), draft)])
    draft.replace(folder / draft.name)
    fsync_folder(folder)


def manifest_name(data: DataSection) -> str:
    """What the manifest is called: ours makes a folder a dataset that opens as it is."""
    return MANIFEST if data.format == "megatron" else PREPARED


CATEGORY_NUMBERS = "category_to_id.json"
"""SambaNova's numbers of categories by their names."""
_SAMBANOVA_TOKENIZER = Path("tokenizer") / TOKENIZER
"""Where SambaNova's tools look for the tokenizer."""


def _rows(data: DataSection, totals: Totals, rules: ArticleRules, seed: int) -> Rows:
    """What becomes of documents on their way into this format."""
    target, packing = FORMATS[data.format], parse_packing(data.packing)
    length = data.sequence_length
    is_stream = packing.kind == "full" and (length is None or not target.as_rows)
    if data.format == "cerebras" and packing.kind == "greedy":
        # The writer packs, since it marks the borders of what a row holds.
        packing = dataclasses.replace(packing, kind="single")
    # Rows of ours and of Cerebras' hold inputs and the targets one further on.
    extra = 1 if data.format == "megatron" else target.extra
    return Rows(
        packing=None if is_stream else packing,
        width=(length or 0) + extra,
        overlap=target.extra,
        rules=rules,
        prompted=totals.prompted,
        with_roles=totals.prompted or data.format == "sambanova",
        shuffle=data.shuffle,
        seed=seed,
    )


def _moved(source: Path, folder: Path) -> list[Path]:
    """Every file of a folder, brought under its name into another on the same disk."""
    found = sorted(path for path in source.rglob("*") if path.is_file())
    moved: list[Path] = []
    for path in found:
        moved.append(folder / path.relative_to(source))
        moved[-1].parent.mkdir(parents=True, exist_ok=True)
        path.replace(moved[-1])
    fsync_folder(folder)
    return moved


def _convert(
    merged: Path,
    staging: Path,
    folder: Path,
    tokenizer: Tokenizer,
    data: DataSection,
    rows: Rows,
    origins: Mapping[str, Origin | None],
    names: Sequence[str] | None,
) -> list[Path]:
    """Write the merged splits in the wanted format, and move them to their place once whole.

    `names`: of the categories, where they have some.
    """
    target = FORMATS[data.format]
    shutil.rmtree(staging, ignore_errors=True)
    readers = {
        name: MergedReader(merged / name, rows.rules.prompt_weight, with_roles=target.roles)
        for name in SPLITS
    }
    packs = data.format == "cerebras" and parse_packing(data.packing).kind == "greedy"
    wanted = data.model_copy(
        update={
            "packing": data.packing if packs else "full",
            "sequence_length": None if rows.packing is None else rows.width - target.extra,
        }
    )
    jobs, lost = plan_conversion(readers, target, wanted, Vocabulary(tokenizer))
    for job in jobs:
        layout = dataclasses.replace(job.layout, origin=origins[job.split])
        write_split(dataclasses.replace(job, layout=layout), target, staging, data.files)
    if lost:
        what = "; ".join(lost)
        get_console().warning(f"{target.title} cannot hold {what}: this is lost")
    if data.format == "megatron":
        _write_empty_splits(staging, tokenizer)
    if data.format == "sambanova":
        tokenizer.save(staging / _SAMBANOVA_TOKENIZER, settings=True)
        if names is not None:
            numbers = {name: number for number, name in enumerate(names)}
            atomic_write(staging / CATEGORY_NUMBERS, json.dumps(numbers))
    else:
        tokenizer.save(staging / TOKENIZER)
    return _moved(staging, folder)


def _write_empty_splits(folder: Path, tokenizer: Tokenizer) -> None:
    """Our own datasets have every split, with or without documents."""
    for name in SPLITS:
        if not (folder / f"{name}.idx").exists():
            layout = Layout(width=1, vocab_size=tokenizer.vocab_size)
            FORMATS["megatron"].write(folder, name, layout).finish()


def _remove_former(folder: Path) -> None:
    """Remove the files of the dataset that is to be replaced; its manifest names them."""
    for manifest in (folder / MANIFEST, folder / PREPARED):
        if not manifest.is_file():
            continue
        try:
            names = [str(name) for name in read_json(manifest)["files"]]
        except (DataError, KeyError, TypeError):
            names = []
        manifest.unlink()
        for name in filter(is_inside, [*names, CHECKSUMS]):
            (folder / name).unlink(missing_ok=True)


def _require_text(tokens: Mapping[str, int], data: DataSection) -> None:
    """The train split must hold one sequence; other empty splits are only worth a warning."""
    full = parse_packing(data.packing).kind == "full"
    needed = (data.sequence_length or 1) + 1 if full else int(data.format != "megatron")
    if tokens["train"] < needed:
        raise DataError(
            f"the train split has {tokens['train']} of {sum(tokens.values())} tokens, "
            f"one sequence needs {needed}",
            where="source",
            do="use more text (equal documents share a split) or a shorter data.sequence_length",
        )
    for name, share in zip(SPLITS, data.splits, strict=True):
        if tokens[name] == 0 and share:
            get_console().warning(f"the {name} split is empty")
