"""The command line: exit codes, one-line errors, help, and the verbs from end to end."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from penstock.cli import main


def fails(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Run a command that must be a user's mistake; returns its one line."""
    assert main(list(words)) == 2
    err = capsys.readouterr().err
    last = err.strip().splitlines()[-1]
    assert last.startswith("penstock:"), err
    assert "Traceback" not in err
    return last


MODEL = ["model.preset=gpt2-tiny", "data.sequence_length=64"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "did you mean train?"),
        (["train", "train.setps=3"], "did you mean train.steps?"),
        (["train", "sequence_length=3"], "did you mean data.sequence_length?"),
        (["train", "steps"], "is not key=value"),
        (["plan", "batch.micro=0"], "batch.micro=0 is wrong: should be greater than or equal to 1"),
        (["plan", "optimizer.lr=-1"], "optimizer.lr=-1 is wrong"),
        (["prepare", "data.splits=[0, 1, 1]"], "data.splits=0 is wrong: should be greater than 0"),
        (["prepare", "data.splits=[1, -1, 1]"], "data.splits=-1 is wrong: should be greater"),
        (["train", "train.epochs=inf"], "train.epochs=inf is wrong: should be a finite number"),
        (["plan", "model.heads=5", *MODEL], "does not divide model.hidden_size=64"),
        (
            ["plan", "model.preset=gpt2-tiny", "data.sequence_length=65"],
            "longer than the model's 64",
        ),
        (["plan", "model.preset=gtp2"], "did you mean gpt2?"),
        (["plan", "model.layers=many"], "model.layers=many is wrong"),
        (["plan", "--config", "/nowhere.yaml"], "does not exist"),
        (["plan", "plan.target=moon"], "there is no target moon"),
        (["train", "--frobnicate"], "unrecognized"),
        (["--config", "/nowhere.yaml", "plan"], "does not exist"),
        (["train", "data.path=x"], "no run folder"),
        (["train", "data.path=/nowhere", "run=x"], "is not a dataset"),
        (["evaluate", "run=/nowhere", "data.path=/nowhere"], "is not a dataset"),
        (["generate", "run=/nowhere", "generate.prompt=x"], "is not a run"),
        (["inspect", "/nowhere"], "does not exist"),
        (["inspect"], "takes one thing"),
        (["inspect", "a", "seed=1", "b"], "takes one thing"),
        (["inspect", "no=file"], "no=file does not exist"),
        (["inspect", str(Path(__file__))], "holds no known format"),
        (["inspect", "seed=x"], "seed=x is wrong"),
        (["report", "run=/nowhere"], "/nowhere is not a run"),
        (["report"], "no run folder"),
        (["-x"], "there is no verb"),
        (["--json"], "there is no verb"),
        (["plan", "--trust"], "expected one argument"),
        (["convert", "everything"], "cannot convert everything"),
        (["compile", *MODEL], "no file to write"),
        (["train", "executable=/nowhere.penstock", "run=x"], "does not exist"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in fails(capsys, *words)


def test_jobs_that_contradict_their_dataset_are_refused(
    dataset_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["train", f"data.path={dataset_folder}", f"run={tmp_path / 'run'}", "compile.mode=off"]
    small = [*base, "model.preset=gpt2-tiny", "model.vocab_size=100", "train.steps=1"]
    assert "the tokenizer has 512 tokens, the model only 100" in fails(capsys, *small)
    both = [*base, *MODEL, "train.steps=1", "train.tokens=5"]
    assert "set exactly one of" in fails(capsys, *both)
    huge = [*base, "model.preset=gpt2-xl", "batch.micro=512", "train.steps=1"]
    assert "one step needs" in fails(capsys, *huge)


def test_errors_are_json_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "model.preset=gtp2", "--json"]) == 2
    assert "did you mean gpt2?" in json.loads(capsys.readouterr().out)["error"]


def test_plan_json_has_the_promised_keys(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "model.preset=gpt2", "batch.micro=4", "data.sequence_length=512", "--json"]
    assert main(words) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["fits"] in (True, False)
    assert value["memory"]["total"] > value["memory"]["weights"] > 0
    assert value["flops_per_token"] > 0
    assert value["step_seconds"] > 0


def test_help_lists_keys_with_defaults_and_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    assert "optimizer.lr = 0.0006   (number)" in text
    assert "Peak learning rate, per optimizer step." in text
    assert main(["--help"]) == 0
    assert "prepare" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["train", "--help"], 0),
        (["plan", "model.preset=gpt2-tiny", "plan.target=zen5-2core"], 0),
        (["plan", "model.preset=gpt2-xl", "plan.target=rtx-4090", "batch.micro=64"], 0),
        (["plan", "model.preset=gpt2", "plan.target=graphcore-pod16", "plan.stages=4"], 0),
        (["plan", "model.preset=gtp2"], 2),
        (["train", "train.setps=3"], 2),
        (["prepare", "source.path=/nowhere"], 2),
        (["train", "model.preset=gpt2-tiny", "train.steps=1", "run=RUN", "--config", "/no"], 2),
    ],
)
def test_what_needs_no_torch_loads_none(words: list[str], code: int) -> None:
    program = (
        f"import sys; from penstock.cli import main; assert main({words!r}) == {code}; "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run(
        [sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL, timeout=60
    )


def test_training_loads_nothing_that_draws() -> None:
    program = (
        "import sys, penstock.train_run; assert not {'matplotlib', 'PIL'} & sys.modules.keys(); "
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_faults_of_ours_exit_1_with_a_report(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import penstock.cli

    def broken(options: object) -> None:
        raise RuntimeError("the penstock burst")

    monkeypatch.setattr(penstock.cli, "_call", broken)
    assert main(["doctor"]) == 1
    line = capsys.readouterr().err.strip()
    report = Path(line.rpartition("Details: ")[2])
    assert "the penstock burst" in report.read_text()
    report.unlink()


def test_a_full_disk_anywhere_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    import penstock.cli

    def full(options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/data/metrics.jsonl")

    monkeypatch.setattr(penstock.cli, "_call", full)
    assert "No space left on device (/data/metrics.jsonl)" in fails(capsys, "doctor")


def test_faults_are_json_when_asked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import penstock.cli

    def broken(options: object) -> None:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(penstock.cli, "_call", broken)
    assert main(["doctor", "--json"]) == 1
    seen = capsys.readouterr()
    assert json.loads(seen.out)["error"] in seen.err
    assert len(seen.err.strip().splitlines()) == 1
    Path(seen.err.strip().rpartition("Details: ")[2]).unlink()


def test_an_interrupt_is_130(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import penstock.cli

    def interrupted(options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(penstock.cli, "_call", interrupted)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "penstock: interrupted\n"


def test_trust_on_the_command_line_adds_to_the_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from penstock import api
    from penstock.config.schema import Config

    seen: list[Config] = []
    monkeypatch.setattr(api, "doctor", seen.append)
    file = tmp_path / "c.yaml"
    file.write_text("trust: [0123]\n")
    assert main(["doctor", "--config", str(file), "--trust", "1e5", "--trust=b", "seed=3"]) == 0
    assert seen[0].trust == ["0123", "1e5", "b"]
    assert seen[0].seed == 3


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    import penstock

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"penstock {penstock.__version__}\n"


def test_the_package_says_the_version_it_is_installed_as() -> None:
    import importlib.metadata

    import penstock

    assert importlib.metadata.version("penstock") == penstock.__version__


def test_a_reader_that_leaves_is_no_fault() -> None:
    # The reader is gone before anything is written; standard output is a pipe of its own.
    command = f"(sleep 0.5; {sys.executable} -m penstock train --help; echo code $? >&2) | true"
    done = subprocess.run(
        ["sh", "-c", command], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stderr == "code 1\n"


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["trian"], 2, "penstock: there is no verb trian: did you mean train?\n"),
        (
            ["train", "train.setps=3"],
            2,
            "penstock: there is no key train.setps (command line): did you mean train.steps?\n",
        ),
        (["train", "--help"], 0, ""),
    ],
)
def test_a_process_of_its_own_says_the_same(words: list[str], code: int, message: str) -> None:
    done = run(*words)
    assert (done.returncode, done.stderr) == (code, message)


def test_importing_the_package_costs_nothing_and_verbs_are_functions() -> None:
    code = """
import sys, penstock
assert not {"torch", "pydantic", "rich"} & set(sys.modules)
assert penstock.Config().seed == 0 and issubclass(penstock.UserError, Exception)
assert "torch" not in sys.modules
for verb in ("prepare", "plan", "compile", "train", "evaluate", "generate", "convert", "inspect", "doctor"):
    assert callable(getattr(penstock, verb)), verb
assert callable(penstock.api.report)
try:
    penstock.nothing
except AttributeError:
    pass
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def run(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "penstock", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


def test_the_verbs_from_raw_text_to_generated_text(
    corpus: Path, tiny_executable: Path, tmp_path: Path
) -> None:
    data, folder, hf = tmp_path / "data", tmp_path / "run", tmp_path / "hf"
    made = run("prepare", f"source.path={corpus}", "tokenizer.train=true",
               "tokenizer.vocab_size=512", f"data.path={data}", "data.sequence_length=64", "--json")  # fmt: skip
    assert json.loads(made.stdout)["splits"]["train"]["tokens"] > 1000, made.stderr
    train = ["train", f"executable={tiny_executable}", f"data.path={data}", f"run={folder}",
             "train.steps=8", "optimizer.lr=3e-3"]  # fmt: skip
    trained = run(*train, "--json")
    assert trained.returncode == 0, trained.stderr
    summary = json.loads(trained.stdout)
    assert summary["complete"]
    assert summary["compiled"]
    for name in (
        "config.yaml",
        "metrics.jsonl",
        "summary.json",
        "checkpoints",
        "tensorboard",
        "report.html",
        "loss.png",
    ):
        assert (folder / name).exists(), name
    record = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-2])
    assert {
        "step",
        "loss",
        "lr",
        "grad_norm",
        "tokens",
        "tokens_per_second",
        "step_seconds",
        "memory_bytes",
        "mfu",
    } <= record.keys()
    assert "trained to step 8 already: reused" in run(*train).stderr
    longer = run(*[word.replace("train.steps=8", "train.steps=10") for word in map(str, train)])
    assert "after step 8" in longer.stderr
    assert longer.returncode == 0, longer.stderr
    scores = run("evaluate", f"run={folder}", f"data.path={data}", "evaluate.split=test", "evaluate.compressors=true", "--json")  # fmt: skip
    values = json.loads(scores.stdout)
    assert {"loss", "perplexity", "word_perplexity", "bits_per_byte", "tokens"} <= values.keys()
    assert "compressors" in json.loads((folder / "summary.json").read_text())
    text = run(
        "generate", f"run={folder}", "generate.prompt=def add(", "generate.tokens=10", "--json"
    )
    value = json.loads(text.stdout)
    assert value["prompt"] == "def add("
    assert value["tokens"] <= 10
    assert run("convert", "checkpoint", f"run={folder}", f"out={hf}").returncode == 0
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(hf)
    tokenizer = transformers.AutoTokenizer.from_pretrained(hf)
    ids = tokenizer("def add(", return_tensors="pt").input_ids
    with torch.no_grad():
        new = model.generate(ids, max_new_tokens=10, do_sample=False)[0, ids.shape[1] :]
    assert tokenizer.decode(new, skip_special_tokens=True) == value["text"]
    from_hf = run(
        "generate", f"model.from={hf}", "generate.prompt=def add(", "generate.tokens=10", "--json"
    )
    assert json.loads(from_hf.stdout)["text"] == value["text"], from_hf.stderr
    for thing, kind in ((tiny_executable, "executable"), (data, "dataset"), (folder, "run")):
        assert json.loads(run("inspect", thing, "--json").stdout)["kind"] == kind


def test_prompts_in_jsonl_come_back_in_jsonl(
    tiny_executable: Path, dataset_folder: Path, tmp_path: Path
) -> None:
    assert main(["train", f"executable={tiny_executable}", f"data.path={dataset_folder}", f"run={tmp_path}/run", "train.steps=1", "--quiet"]) == 0  # fmt: skip
    prompts = [{"prompt": "def"}, {"prompt": ""}, {"prompt": "class A:"}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(p) + "\n" for p in prompts))
    assert main(["generate", f"run={tmp_path}/run", f"generate.input={tmp_path}/in.jsonl", f"generate.output={tmp_path}/out.jsonl", "generate.tokens=5"]) == 0  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == ["def", "", "class A:"]


def test_data_of_another_tokenizer_is_refused(
    tiny_executable: Path, dataset_folder: Path, corpus: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    train = ["train", f"executable={tiny_executable}", f"run={tmp_path}/run", "train.steps=1"]
    assert main([*train, f"data.path={dataset_folder}", "--quiet"]) == 0
    prepare = [
        "prepare",
        f"source.path={corpus}",
        "tokenizer.train=true",
        "tokenizer.vocab_size=400",
    ]
    assert main([*prepare, f"data.path={tmp_path}/other", "--quiet"]) == 0
    assert "made with another tokenizer" in fails(capsys, *train, f"data.path={tmp_path}/other")
    assert "made with another tokenizer" in fails(
        capsys, "evaluate", f"run={tmp_path}/run", f"data.path={tmp_path}/other"
    )


def test_doctor_finds_one_openmp_and_the_allocator_set() -> None:
    value = json.loads(run("doctor", "--json").stdout)
    assert value["allocator"] == "freed memory is kept"
    assert value["openmp"].count("gomp") == 1
    assert value["bf16_gflops"] > 0
