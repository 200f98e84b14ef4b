"""How many generated texts begin with the label.

usage: compare.py PREDICTIONS.jsonl DEV.jsonl
"""

import json
import sys
from pathlib import Path


def main(predictions: Path, labelled: Path) -> None:
    """Print the share of right ones, prompt by prompt."""
    wanted = {}
    for line in labelled.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        wanted[record["prompt"]] = record["completion"]
    found = [json.loads(line) for line in predictions.read_text(encoding="utf-8").splitlines()]
    right = sum(one["text"].strip().startswith(wanted[one["prompt"]]) for one in found)
    print(f"{right} of {len(found)} predictions are right ({right / len(found):.1%})")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
