"""Every recipe: its jobs end to end at reduced size, its full-size plans."""

import contextlib
import json
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import penstock
from penstock.cli import main
from penstock.config.load import load_config
from tests.recipes.shell import ROOT, run_script

RECIPES = sorted((ROOT / "recipes").glob("*/*.yaml"))
SMALL = (
    "model.from=null",
    "tokenizer.from=null",
    "tokenizer.train=true",
    "tokenizer.vocab_size=512",
    "data.sequence_length=64",
    "batch.micro=4",
    "batch.size=8",
    "train.epochs=null",
    "train.steps=2",
    "train.evaluate_every=null",
    "train.evaluate_sequences=8",
    "train.report=false",
    "train.tensorboard=false",
    "compile.toolchain=eager",
    "compile.mode=off",
    "plan.target=detect",
    "plan.stages=null",
    "plan.layers_per_stage=null",
    "plan.replicas=1",
    "plan.shard=none",
    "precision.compute=fp32",
)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_recipe_loads(path: Path) -> None:
    assert load_config(path).origins


@pytest.mark.parametrize(
    ("recipe", "changes"),
    [
        ("sambanova-tutorial/sst2", ["model.preset=gpt2", "plan.target=sambanova-sn30-tile"]),
        ("sambanova-modelzoo/llama2-7b", ["model.preset=llama-2-7b"]),
        ("cerebras-gpt2/small", ["plan.target=cerebras-cs2"]),
        ("cerebras-gpt2/medium", ["plan.target=cerebras-cs2"]),
        ("graphcore-gpt2/small", []),
        ("graphcore-gpt2/medium", []),
        ("graphcore-gpt2/large", []),
        ("habana-lm/clm-gpt2", ["model.preset=gpt2", "plan.target=gaudi2"]),
        ("habana-lm/clm-gpt2-8x", ["model.preset=gpt2"]),
        ("habana-lm/clm-gptj", ["model.preset=gpt-j-6b"]),
        ("habana-lm/clm-neox", ["model.preset=gpt-neox-20b"]),
        ("habana-lm/lora-llama", ["model.preset=llama-2-7b"]),
        ("habana-lm/lora-llama", ["model.preset=llama-2-7b", "lora.base=nf4"]),
        ("habana-lm/mlm-roberta", ["model.preset=roberta-base", "plan.target=gaudi2"]),
    ],
)
def test_full_size_jobs_fit_their_machines(recipe: str, changes: list[str]) -> None:
    path = ROOT / "recipes" / f"{recipe}.yaml"
    overrides = ["model.from=null", "data.path=null", *changes]
    config = load_config(path, overrides).config
    plan = penstock.plan(config)
    assert plan.fits
    assert plan.size == (config.batch.size or plan.micro)


def part_of_sst2(test_data: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "sst2"
    folder.mkdir()
    for name, rows in (("train.tsv", 60), ("dev.tsv", 8)):
        lines = (test_data / "sst2" / name).read_text().splitlines(keepends=True)
        (folder / name).write_text("".join(line for line in lines if len(line) < 80)[: rows * 80])
    return folder


def test_sambanova_tutorial(test_data: Path, tmp_path: Path) -> None:
    words = run_script(
        tmp_path,
        "sambanova-tutorial/run.sh",
        *SMALL,
        "model.preset=gpt2-tiny",
        "model.max_positions=192",
        "data.sequence_length=160",
        "evaluate.min_accuracy=0",
        "generate.tokens=3",
        SST2=str(part_of_sst2(test_data, tmp_path)),
    )
    verbs = [one[0] for one in words]
    assert verbs == ["prepare", "plan", "compile", "train", "evaluate", "compile", "generate"]
    work = tmp_path / "build" / "sambanova-tutorial"
    assert list((work / "hdf5").rglob("train_*_of_*.hdf5"))
    summary = json.loads((work / "run" / "summary.json").read_text())
    assert summary["complete"]
    assert 0 <= summary["tasks"]["sst2"]["accuracy"] <= 1
    predictions = (work / "predictions.jsonl").read_text().splitlines()
    assert len(predictions) == summary["tasks"]["sst2"]["sentences"]


@pytest.mark.parametrize(
    "replicas", [1, pytest.param(2, marks=[pytest.mark.slow, pytest.mark.distributed])]
)
def test_sambanova_model_zoo(replicas: int, test_data: Path, tmp_path: Path) -> None:
    source = part_of_sst2(test_data, tmp_path)
    records = [
        {"prompt": line.split("\t")[0], "completion": "x"}
        for line in (source / "train.tsv").read_text().splitlines()
    ]
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    words = run_script(
        tmp_path,
        "sambanova-modelzoo/run.sh",
        *SMALL,
        "model.preset=llama-tiny",
        f"source.path={data}",
        "schedule.warmup=1",
        f"plan.replicas={replicas}",
        **({"PROCESSES": str(replicas)} if replicas > 1 else {}),
    )
    verbs = [one[0] for one in words]
    assert verbs == ["prepare", "plan", "compile", "train", "evaluate", "convert", "inspect"]
    work = tmp_path / "build" / "sambanova-modelzoo"
    assert (work / "hf" / "model.safetensors").is_file()
    assert json.loads((work / "summary.txt").read_text())
    summary = json.loads((work / "run" / "summary.json").read_text())
    assert summary["plan"]["replicas"] == replicas
    assert summary["complete"]


@pytest.mark.parametrize("size", ["small", pytest.param("medium", marks=pytest.mark.slow)])
def test_cerebras_gpt2(size: str, corpus: Path, tmp_path: Path) -> None:
    data = tmp_path / "hdf5"
    files = sorted(str(path) for path in corpus.iterdir())[:6]
    penstock.prepare(
        source={"path": files},
        tokenizer={"train": True, "vocab_size": 512},
        data={"path": str(data), "sequence_length": 64, "format": "cerebras"},
    )
    # Each mode with the verbs of its own; what is trained last is what `eval` evaluates.
    modes = {
        "validate_only": ["plan"],
        "compile_only": ["plan", "compile"],
        "train": ["plan", "compile", "train"],
        "eval": ["evaluate"],
        "train_and_eval": ["plan", "compile", "train", "evaluate"],
    }
    folder = tmp_path / "build" / "cerebras-gpt2"
    made = {"validate_only": [], "compile_only": [f"{size}.penstock"]}
    for mode, verbs in modes.items():
        words = run_script(
            tmp_path,
            "cerebras-gpt2/run.sh",
            *SMALL,
            "model.preset=gpt2-tiny",
            "model.max_positions=64",
            "model.vocab_size=null",
            "schedule.warmup=1",
            "train.log_every=1",
            DATA=str(data),
            SIZE=size,
            MODE=mode,
        )
        assert [one[0] for one in words] == ["inspect", *verbs]
        if mode in made:
            assert sorted(path.name for path in folder.glob("*")) == made[mode]
    assert json.loads((folder / size / "summary.json").read_text())["evaluation"]["loss"] > 0


@pytest.mark.parametrize("data", ["tfrecord", "megatron", "generated"])
def test_graphcore_gpt2(data: str, test_data: Path, tmp_path: Path) -> None:
    # WikiExtractor's folder.
    source = tmp_path / "wikipedia" / "AA" / "wiki_00"
    source.parent.mkdir(parents=True)
    lines = (test_data / "wikitext-2" / "valid.txt").read_text().splitlines()
    articles = [" ".join(lines[first : first + 5]) for first in range(0, 300, 5)]
    source.write_text(
        "".join(
            f'<doc id="{i}" url="u" title="t{i}">\n{text}\n</doc>\n'
            for i, text in enumerate(articles)
        )
    )
    run_script(
        tmp_path,
        "graphcore-gpt2/train.sh",
        *SMALL,
        "model.preset=gpt2-tiny",
        f"source.path={source.parent.parent}",
        "evaluate.limit=4",
        f"evaluate.task_data={test_data}",
        "schedule.warmup=1",
        DATA=data,
    )
    work = tmp_path / "build" / "graphcore-gpt2"
    kinds = {"tfrecord": "*.tfrecord", "megatron": "*.bin", "generated": "*.tfrecord"}
    assert list((work / data).rglob(kinds[data]))
    summary = json.loads((work / "small" / "summary.json").read_text())
    assert summary["tasks"]["wikitext"]["stride"] == 32
    assert "accuracy" in summary["tasks"]["lambada"]


def test_graphcore_interactive_generation(trained_run: Path, tmp_path: Path) -> None:
    """On a terminal, by the script as a user runs it."""
    script, small = "graphcore-gpt2/generate.sh", [f"run={trained_run}", "compile.mode=off"]
    small.append("generate.tokens=3")
    [words] = run_script(tmp_path, script, *small, PROMPT="It was a long story")
    assert "generate.prompt=It was a long story" in words
    ours, theirs = pty.openpty()
    with os.fdopen(ours, "rb", buffering=0) as terminal:
        process = subprocess.Popen(
            ["sh", f"recipes/{script}", *small],
            cwd=tmp_path,
            env={**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}/usr/bin:/bin"},
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
        )
        os.close(theirs)
        os.write(ours, b"The history of\nIt was\n\n")
        shown = b""
        with contextlib.suppress(OSError):  # the end of a terminal is an error
            while part := terminal.read(4096):
                shown += part
    assert process.wait() == 0, shown
    assert shown.count(b"tokens in") == 2, shown


def test_graphcore_plans(tmp_path: Path) -> None:
    run_script(tmp_path, "graphcore-gpt2/plan.sh", "data.path=null")
    assert (tmp_path / "build" / "graphcore-gpt2" / "plan-large" / "plan.json").is_file()


@pytest.mark.parametrize(
    ("job", "preset", "processes"),
    [
        ("clm-gpt2", None, 1),
        ("clm-gptj", "gpt-j-tiny", 1),
        ("clm-neox", "pythia-tiny", 1),
        pytest.param(
            "clm-gpt2-8x",
            "gpt2-tiny",
            2,
            marks=[pytest.mark.slow, pytest.mark.distributed],
        ),
        pytest.param(
            "clm-gptj", "gpt-j-tiny", 2, marks=[pytest.mark.slow, pytest.mark.distributed]
        ),
    ],
)
def test_habana_causal(
    job: str, preset: str | None, processes: int, test_data: Path, tmp_path: Path
) -> None:
    source = tmp_path / "text"
    source.mkdir()
    text = (test_data / "wikitext-2" / "valid.txt").read_text()
    for index in range(30):
        (source / f"{index}.txt").write_text(text[index * 4000 : (index + 1) * 4000])
    if preset is None:  # from scratch
        model = ["model.family=gpt2", "model.layers=2", "model.hidden_size=48", "model.heads=3"]
        model += ["model.vocab_size=null", "model.max_positions=64"]
    else:
        model = [f"model.preset={preset}"]
    # ZeRO-2 as the job says it, where there is more than one process.
    several = ["plan.shard=gradients"] if processes > 1 else []
    run_script(
        tmp_path,
        "habana-lm/clm.sh",
        *SMALL,
        *model,
        f"source.path={source}",
        "evaluate.stride=64",
        f"plan.replicas={processes}",
        *several,
        JOB=job,
        **({"PROCESSES": str(processes)} if processes > 1 else {}),
    )
    run = tmp_path / "build" / "habana-lm" / job
    summary = json.loads((run / "summary.json").read_text())
    assert summary["evaluation"]["perplexity"] > 1
    assert summary["plan"]["replicas"] == processes


def test_habana_plans(tmp_path: Path) -> None:
    words = ["data.path=null", "model.from=null", "model.preset=gpt-j-6b"]
    assert len(run_script(tmp_path, "habana-lm/plan.sh", *words)) == 3


@pytest.mark.parametrize("by_line", [False, True])
def test_habana_masked(by_line: bool, test_data: Path, tmp_path: Path) -> None:
    text = (test_data / "wikitext-2" / "valid.txt").read_text()
    (tmp_path / "text.txt").write_text(text[:60000])
    lines = ["source.documents=line", "data.packing=single::truncate_right"]
    lines += ["data.group_by_length=true"]
    run_script(
        tmp_path,
        "habana-lm/mlm.sh",
        *SMALL,
        "tokenizer.kind=roberta",
        "model.preset=roberta-tiny",
        f"source.path={tmp_path / 'text.txt'}",
        *(lines if by_line else []),
    )
    summary = json.loads(
        (tmp_path / "build" / "habana-lm" / "mlm-roberta" / "summary.json").read_text()
    )
    assert summary["complete"]
    assert summary["tasks"]["masked"]["perplexity"] > 1


def test_habana_deepspeed_streaming_and_evaluation_alone(
    trained_run: Path, corpus: Path, tmp_path: Path
) -> None:
    penstock.convert("checkpoint", run=trained_run, out=tmp_path / "model")
    small = [word for word in SMALL if not word.startswith(("train.steps", "tokenizer.", "model."))]

    run_script(
        tmp_path,
        "habana-lm/others.sh",
        *small,
        f"model.from={tmp_path / 'model'}",
        f"tokenizer.from={tmp_path / 'model'}",
        "data.shuffle_buffer=8",
        "evaluate.stride=64",
        TEXT=str(corpus),
        MODEL=str(tmp_path / "model"),
        STEPS="2",
    )
    work = tmp_path / "build" / "habana-lm"
    imported = load_config(work / "deepspeed-zero2.yaml").config
    assert imported.plan.shard == "gradients"
    assert imported.optimizer.clip == 1.0
    assert json.loads((work / "clm-streamed" / "summary.json").read_text())["steps"] == 2


def test_graphcore_benchmarks(tmp_path: Path) -> None:
    """The benchmark file as it is, but for sizes."""
    folder = tmp_path / "recipe"
    shutil.copytree(ROOT / "recipes" / "graphcore-gpt2", folder)
    file = folder / "benchmarks.yml"
    small = "model.preset=gpt2-tiny compile.mode=off data.sequence_length=64 train.steps=6"
    text = file.read_text().replace("train.steps=6", small)
    text = text.replace("data.sequence_length=1024", "data.sequence_length=64")
    assert "source.kind=generated tokenizer.train=true" in text
    file.write_text(
        text.replace("tokenizer.train=true", "tokenizer.train=true tokenizer.vocab_size=512")
    )
    code = main(["bench", str(file), "--benchmark", "gpt2_small_pretraining", f"out={tmp_path}/o"])
    assert code == 0
    results = json.loads((tmp_path / "o" / "results.json").read_text())
    assert "throughput" in json.dumps(results)


def test_habana_adapters(test_data: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    base = tmp_path / "base"
    seeds = test_data / "instructions" / "seed_tasks.jsonl"
    part = tmp_path / "seed_tasks.jsonl"
    part.write_text("".join(seeds.read_text().splitlines(keepends=True)[:40]))
    penstock.prepare(
        source={"path": str(part)},
        tokenizer={"train": True, "vocab_size": 512},
        data={"path": str(base), "sequence_length": 64, "splits": [1, 0, 0]},
    )
    penstock.train(
        model={"preset": "llama-tiny"},
        data={"path": str(base), "sequence_length": 64},
        batch={"micro": 2},
        run=str(tmp_path / "run"),
        train={"steps": 1, "report": False, "tensorboard": False},
        compile={"mode": "off"},
    )
    penstock.convert("checkpoint", run=str(tmp_path / "run"), out=str(model))
    run_script(
        tmp_path,
        "habana-lm/lora.sh",
        *SMALL,
        f"model.from={model}",
        "tokenizer.train=false",
        f"tokenizer.from={model}",
        "schedule.warmup=1",
        "evaluate.split=train",
        ALPACA=str(part),
    )
    adapter = tmp_path / "build" / "habana-lm" / "adapter"
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["r"] == 8
    assert config["target_modules"] == ["q_proj", "v_proj"]
