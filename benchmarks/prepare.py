"""Speed and memory of `penstock prepare`, beside `tokenizers` alone on the same text and cores.

    python benchmarks/prepare.py --text TEXT --tokenizer GPT2 --megabytes 64 --rounds 3
    python benchmarks/prepare.py --text TEXT --tokenizer GPT2 --as llama3 --megabytes 32
    python benchmarks/prepare.py --text TEXT --tokenizer GPT2 --megabytes 5120 --rounds 1 --memory-only
    python benchmarks/prepare.py --dump DUMP.xml.bz2 --tokenizer GPT2 --megabytes 400 --rounds 1

Rounds are interleaved: first `tokenizers`' own `encode_batch` over the text, in memory already, with all
cores; then the whole of `prepare`: start of the processes, reading, cleaning, tokenizing, writing, checksums.
Memory is the largest sum of resident sets (proportional sets where the system tells) of the process and
all it starts. The text is real text, lines shuffled and numbered until there is as much as is wanted; of a
real dump, its pages are repeated. A dump's rate counts the bytes of its XML, unpacked. Seconds of all processors together hardly depend on
what else the machine does.
"""

import argparse
import bz2
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import tokenizers
from tokenizers import normalizers, pre_tokenizers

LINES = 40
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def made_as(
    inner: tokenizers.Tokenizer, kind: str | None, text: Path | None
) -> tokenizers.Tokenizer:
    """The tokenizer with the normalizer and pre-tokenizer of another family.

    `bert`: 30,000 word pieces learned from the text; `other`: a normalizer that nobody cuts for,
    so that the library gets whole texts.
    """
    if kind == "bert":
        from penstock.data.tokenizer import Tokenizer

        assert text is not None, "word pieces are learned from --text"
        return Tokenizer.train([text.read_text("utf-8")], 30000, "bert")._inner
    if kind == "gpt-neox":
        inner.normalizer = normalizers.NFC()  # type: ignore[assignment]
        inner.add_tokens([tokenizers.AddedToken(" " * n, normalized=True) for n in range(2, 25)])
    if kind == "llama3":
        split = pre_tokenizers.Split(tokenizers.Regex(LLAMA3), "isolated")
        cut = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        inner.pre_tokenizer = pre_tokenizers.Sequence([split, cut])  # type: ignore[assignment]
    if kind == "other":
        inner.normalizer = normalizers.NFKC()  # type: ignore[assignment]
    return inner


def make_text(path: Path, source: Path, megabytes: int) -> None:
    """Documents of forty lines of a real text, in a random order that is always the same."""
    lines = source.read_text(encoding="utf-8").splitlines()
    generator = random.Random(0)
    wanted, written = megabytes << 20, 0
    with path.open("w", encoding="utf-8") as handle:
        number = 0
        while written < wanted:
            text = "\n".join(line for line in generator.choices(lines, k=LINES) if line.strip())
            written += handle.write(f"Document {number}\n{text}\n\n")
            number += 1


def make_dump(path: Path, source: Path, megabytes: int) -> int:
    """A real dump's pages again and again, in streams one after another where `path` ends in .bz2;
    returns the bytes of the XML.
    """
    xml = bz2.decompress(source.read_bytes())
    begin, end = xml.index(b"<page>"), xml.rindex(b"</page>") + len(b"</page>\n")
    parts = [xml[:begin], xml[begin:end], b"</mediawiki>\n"]
    times = max(1, (megabytes << 20) // len(parts[1]))
    pack = bz2.compress if path.suffix == ".bz2" else bytes
    head, pages, foot = map(pack, parts)
    with path.open("wb") as handle:
        handle.write(head)
        for _ in range(times):
            handle.write(pages)
        handle.write(foot)
    return len(parts[0]) + times * len(parts[1]) + len(parts[2])


def encode_alone(path: Path, tokenizer: Path) -> float:
    """Seconds that `encode_batch` takes over the documents, on all cores."""
    program = (
        "import sys, time, tokenizers\n"
        "t = tokenizers.Tokenizer.from_file(sys.argv[2])\n"
        "text = open(sys.argv[1], encoding='utf-8').read().split('\\n\\n')\n"
        "seconds = 0.0\n"
        "for first in range(0, len(text), 500):\n"
        "    batch = text[first : first + 500]\n"
        "    begun = time.perf_counter()\n"
        "    t.encode_batch(batch, add_special_tokens=False)\n"
        "    seconds += time.perf_counter() - begun\n"
        "print(seconds)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, str(path), str(tokenizer)],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "TOKENIZERS_PARALLELISM": "true"},
    )
    return float(run.stdout)


def prepare(path: Path, tokenizer: Path, out: Path, words: list[str]) -> tuple[float, float, int]:
    """Seconds, seconds of all processors, and peak bytes of `penstock prepare`."""
    shutil.rmtree(out, ignore_errors=True)
    command = [
        *(sys.executable, "-m", "penstock", "prepare", f"source.path={path}"),
        *(f"tokenizer.from={tokenizer.parent}", f"data.path={out}", *words),
    ]
    begun = time.perf_counter()
    worked: dict[int, float] = {}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    largest = 0
    while process.poll() is None:
        largest = max(largest, resident(process.pid, worked))
        time.sleep(0.1)
    seconds = time.perf_counter() - begun
    if process.returncode:
        raise SystemExit(f"prepare ended with {process.returncode}")
    return seconds, sum(worked.values()), largest


def resident(pid: int, worked: dict[int, float]) -> int:
    """Bytes that a process and its children hold, memory they share counted once.

    `worked` takes the seconds that each has worked so far: what has ended is asked for no more.
    """
    total = 0
    try:
        for one in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
            try:
                total += one.memory_full_info().pss
                worked[one.pid] = sum(one.cpu_times()[:2])
            except (psutil.Error, AttributeError):
                continue
    except psutil.Error:
        pass
    return total


def main() -> None:
    """Measure, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--text", type=Path, help="a real text to take lines from")
    parser.add_argument("--dump", type=Path, help="a real dump, .xml.bz2, instead")
    parser.add_argument("--plain", action="store_true", help="the repeated dump is not packed")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of a tokenizer")
    parser.add_argument("--as", dest="kind", choices=["gpt-neox", "llama3", "bert", "other"])
    parser.add_argument("--memory-only", action="store_true")
    arguments = parser.parse_args()
    if (arguments.text is None) == (arguments.dump is None):
        parser.error("give --text or --dump")
    from penstock.data.tokenizer import Tokenizer

    folder = Path(tempfile.mkdtemp(prefix="penstock-prepare-"))
    try:
        text, tokenizer = folder / "text.txt", folder / "tokenizer" / "tokenizer.json"
        inner = made_as(Tokenizer.load(arguments.tokenizer)._inner, arguments.kind, arguments.text)
        Tokenizer(inner).save(tokenizer)
        words = [f"prepare.workers={arguments.workers}"]
        if arguments.dump is not None:
            text = folder / ("dump.xml" if arguments.plain else "dump.xml.bz2")
            size = make_dump(text, arguments.dump, arguments.megabytes)
            words.append("source.kind=wikipedia")
        else:
            make_text(text, arguments.text, arguments.megabytes)
            size = text.stat().st_size
            words.append("source.documents=blank_line")
        alone: list[float] = []
        ours: list[tuple[float, float, int]] = []
        for _ in range(arguments.rounds):
            if arguments.dump is None and not arguments.memory_only:
                alone.append(encode_alone(text, tokenizer))
            ours.append(prepare(text, tokenizer, folder / "out", words))
        megabytes = size / 1e6
        ratios = [a / s for a, (s, *_) in zip(alone, ours, strict=False)]
        result = {
            "megabytes": round(megabytes),
            "cores": os.cpu_count(),
            "workers": arguments.workers,
            "tokenizer": arguments.kind or arguments.tokenizer.name,
            "tokenizers": tokenizers.__version__,
            "encode_batch_mb_per_second": [round(megabytes / s, 2) for s in alone],
            "prepare_mb_per_second": [round(megabytes / s, 2) for s, *_ in ours],
            "prepare_mb_per_processor_second": [round(megabytes / w, 2) for _, w, _ in ours],
            "ratio_median": round(statistics.median(ratios), 3) if ratios else None,
            "peak_megabytes": round(max(peak for *_, peak in ours) / 1e6),
        }
        print(json.dumps(result))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
