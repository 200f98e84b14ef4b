"""Instructions as prompts and completions, by Alpaca's template.

Reads Alpaca's JSON (a list of instruction, input, output) or its seed tasks' JSON lines (instances).

usage: alpaca.py SOURCE OUT.jsonl
"""

import json
import sys
from pathlib import Path

WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:"
)


def main(source: Path, out: Path) -> None:
    """Write one object with prompt and completion per example."""
    text = source.read_text(encoding="utf-8")
    tasks = (
        json.loads(text) if text.lstrip().startswith("[") else map(json.loads, text.splitlines())
    )
    lines = []
    for task in tasks:
        for one in task.get("instances", [task]):
            values = {"instruction": task["instruction"], "input": one.get("input", "")}
            prompt = (WITH_INPUT if values["input"] else WITHOUT_INPUT).format(**values)
            lines.append(json.dumps({"prompt": prompt, "completion": one["output"]}) + "\n")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
