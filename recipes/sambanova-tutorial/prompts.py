"""SST-2's tables (sentence TAB label) as the tutorial's prompts and completions.

usage: prompts.py FOLDER_WITH_TRAIN_AND_DEV_TSV OUT [PROMPT]; {text} in PROMPT is the sentence
"""

import json
import sys
from pathlib import Path

LABELS = ("negative", "positive")
PROMPT = "SENTIMENT ANALYSIS: {text} QUESTION: Is this sentence positive or negative?\n\n"


def main(source: Path, out: Path, prompt: str = PROMPT) -> None:
    """Write train.jsonl, dev.jsonl, and dev's prompts alone as prediction-inputs.jsonl."""
    out.mkdir(parents=True, exist_ok=True)
    for split in ("train", "dev"):
        rows = (source / f"{split}.tsv").read_text(encoding="utf-8").splitlines()
        pairs = [row.rpartition("\t") for row in rows if row.rpartition("\t")[2] in ("0", "1")]
        records = [
            {"prompt": prompt.replace("{text}", text), "completion": LABELS[int(label)]}
            for text, _, label in pairs
        ]
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (out / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    prompts = "".join(json.dumps({"prompt": record["prompt"]}) + "\n" for record in records)
    (out / "prediction-inputs.jsonl").write_text(prompts, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
