"""Files that have made other trainers run programs or read what they should not: none does here.

One case for each published flaw that concerns files Penstock opens, under the verbs that open them.
A program that ran would leave a mark; every trap is shown to be one first.
"""

import io
import json
import pickle
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import h5py
import jinja2
import numpy as np
import torch
import yaml

import penstock

FIXTURE = sorted((Path(__file__).resolve().parent / "fixtures").iterdir())[-1]
TEXT = "3 times 4 is 12.\n" * 40

CHILD = """
import contextlib, io, json, sys
import penstock.cli
for case in json.load(open(sys.argv[1])):
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        code = penstock.cli.main([*case, "--quiet"])
    print(json.dumps({"words": case, "code": code, "said": said.getvalue()}), flush=True)
"""


class Trap:
    """Unpickling it runs a program."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        import os

        return os.system, (f"touch {self.mark}",)


def model_folder(folder: Path) -> Path:
    """A small GPT-2 in the Hugging Face layout, with a tokenizer."""
    penstock.convert("checkpoint", run=FIXTURE / "run", out=folder)
    return folder


def change_json(path: Path, **values: object) -> None:
    before = json.loads(path.read_bytes()) if path.is_file() else {}
    path.write_text(json.dumps({**before, **values}))


def other_family(folder: Path) -> Path:
    """A model that only `transformers` knows."""
    import transformers

    small = {"vocab_size": 280, "hidden_size": 16, "num_hidden_layers": 1, "ffn_dim": 16}
    more = {"num_attention_heads": 2, "max_position_embeddings": 16, "word_embed_proj_dim": 16}
    model_folder(folder)
    transformers.AutoModelForCausalLM.from_config(
        transformers.OPTConfig(**small, **more)
    ).save_pretrained(folder)
    return folder


# Each trap: builds its files in a folder, and returns the command lines that open them.


def using(model: Path) -> list[list[str]]:
    """Verbs that open a model folder."""
    data = [f"data.path={FIXTURE / 'dataset'}", "data.sequence_length=16"]
    run = f"run={model}-trained"
    train = ["train.steps=1", "train.tensorboard=false", "train.report=false", "compile.mode=off"]
    return [
        ["plan", f"model.from={model}", *data],
        ["train", f"model.from={model}", *data, "batch.micro=2", run, *train],
        ["generate", f"model.from={model}", "generate.prompt=3 times", "generate.tokens=2"],
    ]


def code_in_legacy_weights(folder: Path, mark: Path) -> list[list[str]]:
    """CVE-2024-11392 and its like, litgpt#2189: pickled weights."""
    model = model_folder(folder / "model")
    (model / "model.safetensors").unlink()
    torch.save({"transformer.wte.weight": Trap(mark)}, model / "pytorch_model.bin")
    pickle.loads(pickle.dumps(Trap(mark)))
    return using(model)


def code_in_a_tar_of_weights(folder: Path, mark: Path) -> list[list[str]]:
    """CVE-2025-32434: the tar that torch once read as if `weights_only` had not been said."""
    model = model_folder(folder / "model")
    (model / "model.safetensors").unlink()
    with tarfile.open(model / "pytorch_model.bin", "w") as tar:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            content = pickle.dumps(Trap(mark))
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    pickle.loads(pickle.dumps(Trap(mark)))
    return using(model)


def sparse_weights(folder: Path, mark: Path) -> list[list[str]]:
    """CVE-2025-62164: a sparse tensor whose indices lie outside of it."""
    model = model_folder(folder / "model")
    (model / "model.safetensors").unlink()
    from penstock.models.weight_files import WeightFiles

    whole = WeightFiles(model_folder(folder / "other"))
    tensors = {name: whole.read(name) for name in whole.names()}
    name = next(n for n in tensors if n.endswith("wte.weight"))
    tensors[name] = torch.sparse_coo_tensor(
        torch.tensor([[10**9], [10**9]]), torch.ones(1), tuple(tensors[name].shape),
        check_invariants=False,
    )  # fmt: skip
    torch.save(tensors, model / "pytorch_model.bin")
    mark.touch()
    return using(model)


def code_beside_a_checkpoint(folder: Path, mark: Path) -> list[list[str]]:
    """CVE-2026-1839 (rng_state.pth), pytorch#189308 (DCP's metadata), CVE-2025-23304."""
    shutil.copytree(FIXTURE, folder / "written")
    run = folder / "written" / "run"
    for place in (run, *(run / "checkpoints").iterdir()):
        for name in ("rng_state.pth", "optimizer.pt", "training_args.bin", ".metadata", "x.distcp"):
            (place / name).write_bytes(pickle.dumps(Trap(mark)))
    pickle.loads((run / ".metadata").read_bytes())
    given = ["--config", str(run / "config.yaml"), f"run={run}"]
    return [
        ["train", *given, f"data.path={folder / 'written' / 'dataset'}"],
        ["inspect", str(run)],
        ["generate", f"run={run}", "generate.prompt=3 times", "generate.tokens=2"],
        ["convert", "checkpoint", f"run={run}", f"out={folder / 'out'}"],
    ]


def code_in_an_exported_program(folder: Path, mark: Path) -> list[list[str]]:
    """pytorch#171653, #186073: torch.export.load unpickles what it cannot read safely."""
    path = folder / "evil.pt2"
    path.parent.mkdir(parents=True)
    program = torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),))
    torch.export.save(program, folder / "good.pt2")
    payload = io.BytesIO()
    torch.save(Trap(mark), payload)
    with zipfile.ZipFile(folder / "good.pt2") as good, zipfile.ZipFile(path, "w") as evil:
        for entry in good.infolist():
            is_input = "sample_inputs" in entry.filename
            evil.writestr(entry, payload.getvalue() if is_input else good.read(entry))
    loading = "import sys, torch; torch.export.load(sys.argv[1])"
    subprocess.run([sys.executable, "-c", loading, str(path)], check=False, capture_output=True)
    data = f"data.path={FIXTURE / 'dataset'}"
    train = ["train", f"executable={path}", data, f"run={folder / 'run'}", "train.steps=1"]
    return [train, ["inspect", str(path)]]


def code_named_by_a_config(folder: Path, mark: Path) -> list[list[str]]:
    """CVE-2025-66448, CVE-2026-22807, CVE-2026-4372, CVE-2026-5241: auto_map and its relatives."""
    words: list[list[str]] = []
    for make in (model_folder, other_family):
        model = make(folder / make.__name__)
        evil = f"import os\nos.system('touch {mark}')\nclass Evil: pass\n"
        for name in ("modeling_evil.py", "configuration_evil.py", "tokenization_evil.py"):
            (model / name).write_text(evil)
        classes = {
            "AutoConfig": "configuration_evil.Evil",
            "AutoModelForCausalLM": "modeling_evil.Evil",
            "AutoModel": "modeling_evil.Evil",
            "AutoTokenizer": ["tokenization_evil.Evil", "tokenization_evil.Evil"],
        }
        more = {"auto_map": classes, "trust_remote_code": True}
        nested = {"more": [dict(more)], "_attn_implementation_internal": "evil/kernel"}
        change_json(model / "config.json", **more, **nested)
        change_json(model / "generation_config.json", custom_generate=str(model))
        change_json(model / "tokenizer_config.json", **more, tokenizer_class="Evil")
        exec(compile(evil, "modeling_evil.py", "exec"), {})
        words += using(model)
        tokenizer = f"tokenizer.from={model}"
        (folder / "text.txt").write_text(TEXT)
        words.append(
            [
                "prepare",
                f"source.path={folder / 'text.txt'}",
                tokenizer,
                f"data.path={model}-data",
                "data.sequence_length=16",
            ]
        )
    return words


def code_in_a_chat_template(folder: Path, mark: Path) -> list[list[str]]:
    """CVE-2026-5760: a template of a model's tokenizer that reaches out of Jinja."""
    model = model_folder(folder / "model")
    reach = f"cycler.__init__.__globals__.os.popen('touch {mark}').read()"
    template = "{{ " + reach + " }}{% for m in messages %}{{ m.content }}{% endfor %}"
    jinja2.Environment().from_string(template).render(messages=[])
    change_json(model / "tokenizer_config.json", chat_template=template)
    (model / "chat_template.jinja").write_text(template)
    turns = [{"role": "user", "content": "3 times 4"}, {"role": "assistant", "content": "12"}]
    (folder / "chat.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    prepare = ["prepare", "source.kind=jsonl", f"source.path={folder / 'chat.jsonl'}"]
    prepare += [f"tokenizer.from={model}", f"data.path={folder / 'data'}"]
    return [[*prepare, "data.sequence_length=16"], *using(model)]


def shards_outside_the_folder(folder: Path, mark: Path) -> list[list[str]]:
    """transformers#46097, #47176: a shard index that leads out of its folder."""
    model = model_folder(folder / "model")
    (model / "model.safetensors").unlink()
    torch.save({"x": Trap(mark)}, folder / "outside.bin")
    places = {"transformer.wte.weight": "../outside.bin"}
    (model / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    pickle.loads(pickle.dumps(Trap(mark)))
    return using(model)


def code_in_pickled_data(folder: Path, mark: Path) -> list[list[str]]:
    """CVE-2024-11393 and its like, ShadowMQ's cause: data that is a pickle."""
    folder.mkdir(parents=True)
    path = folder / "data.pkl"
    path.write_bytes(pickle.dumps([[1, 2], Trap(mark)]))
    pickle.loads(path.read_bytes())
    return [
        ["inspect", str(path)],
        ["convert", "data", f"from={path}", "data.format=megatron", f"out={folder / 'out'}"],
        ["train", f"data.path={path}", "data.sequence_length=16", f"run={folder / 'run'}"],
    ]


def data_that_reads_other_files(folder: Path, mark: Path) -> list[list[str]]:
    """CVE-2026-1669: HDF5 whose data lie in any file of the user's."""
    folder.mkdir(parents=True)
    secret = folder / "secret"
    secret.write_bytes(np.arange(8, dtype=np.int32).tobytes())
    with h5py.File(folder / "data.hdf5", "w") as file:
        file.create_dataset("input_ids", (2, 4), np.int32, external=[(str(secret), 0, 32)])
        file["token_type_ids"] = h5py.ExternalLink(str(secret), "/x")
        assert file["input_ids"][1, 3] == 7
    mark.touch()
    return [["inspect", str(folder / "data.hdf5")]]


def code_in_yaml(folder: Path, mark: Path) -> list[list[str]]:
    """YAML that makes objects, and `_target_` as in CVE-2025-23304 and CVE-2026-24157."""
    folder.mkdir(parents=True)
    tagged = f"train:\n  steps: !!python/object/apply:os.system ['touch {mark}']\n"
    yaml.unsafe_load(tagged)
    (folder / "tagged.yaml").write_text(tagged)
    target = {"_target_": "os.system", "_args_": [f"touch {mark}"]}
    (folder / "target.yaml").write_text(json.dumps({"optimizer": target}))
    words = [["train", "--config", str(folder / name)] for name in ("tagged.yaml", "target.yaml")]
    words += [
        ["import-config", str(folder / name), "--from", system]
        for name in ("tagged.yaml", "target.yaml")
        for system in ("sambanova", "cerebras", "habana", "accelerate")
    ]
    return words


def code_with_a_data_set(folder: Path, mark: Path) -> list[list[str]]:
    """A loading script of a data set, and data that looks like a program (CVE-2025-23307)."""
    data = folder / "evil"
    data.mkdir(parents=True)
    script = f"import os\nos.system('touch {mark}')\n"
    exec(compile(script, "evil.py", "exec"), {})
    (data / "evil.py").write_text(script)
    line = f"__import__('os').system('touch {mark}')"
    # Equal documents go to one split together, which one depends on the folder's name.
    documents = [json.dumps({"text": f"{line}  # {number}"}) + "\n" for number in range(400)]
    (data / "train.jsonl").write_text("".join(documents))
    given = ["tokenizer.train=true", "tokenizer.vocab_size=280", "data.sequence_length=16"]
    return [
        [
            "prepare",
            f"source.kind={kind}",
            f"source.path={path}",
            f"data.path={folder / kind}",
            *given,
        ]
        for kind, path in (("hub", data), ("jsonl", data / "train.jsonl"))
    ]


def files_out_of_an_archive(folder: Path, mark: Path) -> list[list[str]]:
    """CVE-2024-0129, CVE-2025-4517: an archive whose members lie elsewhere."""
    folder.mkdir(parents=True)
    path = folder / "model.nemo"
    with tarfile.open(path, "w") as tar:
        for name in (str(mark), f"../{mark.name}"):
            entry = tarfile.TarInfo(name)
            entry.size = 1
            tar.addfile(entry, io.BytesIO(b"x"))
    with tarfile.open(path) as tar:
        tar.extract(tar.getmembers()[0], "/", filter="fully_trusted")
    return [
        ["inspect", str(path)],
        ["prepare", f"source.path={path}", "tokenizer.train=true", f"data.path={folder / 'd'}"],
        ["plan", f"model.from={path}"],
        ["train", f"executable={path}", f"data.path={FIXTURE / 'dataset'}"],
    ]


TRAPS: list[Callable[[Path, Path], list[list[str]]]] = [
    code_in_legacy_weights,
    code_in_a_tar_of_weights,
    sparse_weights,
    code_beside_a_checkpoint,
    code_in_an_exported_program,
    code_named_by_a_config,
    code_in_a_chat_template,
    shards_outside_the_folder,
    code_in_pickled_data,
    data_that_reads_other_files,
    code_in_yaml,
    code_with_a_data_set,
    files_out_of_an_archive,
]
HARMLESS = {"code_beside_a_checkpoint", "code_named_by_a_config"}
"""What is read all the same, without what is wrong with it; all else is refused."""


def test_no_file_that_fooled_others_runs_anything(tmp_path: Path) -> None:
    marks: dict[str, Path] = {}
    cases: list[tuple[str, list[str]]] = []
    for trap in TRAPS:
        name = trap.__name__
        marks[name] = tmp_path / f"mark-{name}"
        words = trap(tmp_path / name, marks[name])
        assert marks[name].exists(), f"{name} is no trap"
        marks[name].unlink()
        cases += [(name, case) for case in words]
    (tmp_path / "cases.json").write_text(json.dumps([case for _, case in cases]))
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path / "cases.json")],
        check=False,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert not [name for name, mark in marks.items() if mark.exists()]
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == len(cases)
    for (name, words), answer in zip(cases, answers, strict=True):
        assert answer["code"] in (0, 2), answer
        assert "Traceback" not in answer["said"], answer
        if name not in HARMLESS and words[0] == "import-config":
            assert answer["code"] == 2, answer
    by_name = {
        name: [a for (n, _), a in zip(cases, answers, strict=True) if n == name] for name in marks
    }
    for name in HARMLESS:
        for answer in by_name[name]:
            # Models of other families are trained, and make text elsewhere.
            refused = answer["words"][0] == "generate" and "other_family" in answer["words"][1]
            assert answer["code"] == (2 if refused else 0), answer
    assert by_name["code_with_a_data_set"][1]["code"] == 0, by_name["code_with_a_data_set"]
    for name in ("code_in_legacy_weights", "code_in_a_tar_of_weights"):
        assert [answer["code"] for answer in by_name[name][1:]] == [2, 2], by_name[name]
    assert "more than weights" in by_name["code_in_legacy_weights"][1]["said"], by_name
    assert "sparse" in by_name["sparse_weights"][1]["said"]
    assert "lies outside" in by_name["shards_outside_the_folder"][1]["said"]
    assert "unsafe" in by_name["code_in_a_chat_template"][0]["said"]


def test_the_list_of_traps_is_whole() -> None:
    """A pytest that collected none of them would pass otherwise."""
    assert len(TRAPS) >= 13
