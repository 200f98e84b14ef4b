"""The report: it stands alone, escapes what it shows, and copes with what is missing."""

import json
import re
import subprocess
import sys
from pathlib import Path

from penstock.report.page import write_report

SUMMARY = {
    "complete": True,
    "steps": 3,
    "seconds": 12.3,
    "tokens": 3000,
    "loss": {"final": 4.5},
    "throughput": {"tokens_per_second": 1234.5, "mfu": 0.61},
    "evaluation": {"bits_per_byte": 1.5, "perplexity": 60.0},
    "compressors": {"gzip": 1.98, "bzip2": 1.76, "xz": 1.77},
    "tasks": {
        "sst2": {
            "accuracy": 0.8125,
            "sentences": 872,
            "data": "dev.tsv",
            "labels": ["bad", "good"],
        },
        "wikitext": {"word_perplexity": 37.37, "stride": 32, "seconds": 3.2},
    },
    "environment": {"processor": "<script>alert(1)</script>", "memory_bytes": 25 << 30, "gpus": []},
    "plan": {"memory": {"weights": 1 << 20, "total": 2 << 20}},
}


def test_the_page_shows_the_figures_and_stands_alone(tmp_path: Path) -> None:
    records = [{"step": i, "loss": 9.0 - i, "tokens_per_second": 1000.0} for i in range(1, 4)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    (tmp_path / "config.yaml").write_text("seed: 1  # <default>\n")
    (tmp_path / "samples.jsonl").write_text(json.dumps({"prompt": "def <f>(", "text": "x):"}))
    files = write_report(tmp_path)
    page = files.page.read_text()
    for text in (
        "1.500",
        "1.760",
        "1,234",
        "61%",
        "def &lt;f&gt;(",
        "accuracy 81.25%",
        "labels bad, good",
        "word perplexity 37.37",
        "stride 32",
        "<td>memory</td><td>25.0 GiB</td>",
        "<td>gpus</td><td>none</td>",
    ):
        assert text in page
    assert "<script" not in page
    assert not re.search(r"(?:src|href)=[\"']?(?:https?:|//)", page)
    assert files.curve.read_bytes().startswith(b"\x89PNG")


def test_an_empty_run_still_has_a_page(tmp_path: Path) -> None:
    assert write_report(tmp_path).page.is_file()


def test_training_loads_no_drawing_library() -> None:
    code = "import sys, penstock.train_run; assert not {'matplotlib', 'PIL'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
