"""Executables: what they compute, and everything that must be refused."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import penstock
from penstock.compiler.executable import Executable
from penstock.compiler.runtime import attach
from penstock.errors import ExecutableError
from penstock.models.initialization import initialize
from penstock.models.transformer import Transformer
from tests.numerics import assert_matches


def model_for(executable: Executable, dtype: torch.dtype, layers: int = 2) -> Transformer:
    model = Transformer(dataclasses.replace(executable.plan.architecture, layers=layers))
    initialize(model, 1)
    return model.to(dtype)


def run(model: Transformer) -> tuple[torch.Tensor, list[torch.Tensor]]:
    g = torch.Generator().manual_seed(0)
    tokens, targets = (torch.randint(0, 512, (4, 64), generator=g) for _ in range(2))
    weights = torch.rand(4, 64, generator=g)
    keys = model.dropout_keys(0, 5, torch.arange(4))
    loss = model(tokens, targets, weights / weights.sum(), keys, torch.tensor(1e-3))
    model.zero_grad()
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters()]


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_compiled_training_equals_eager_at_any_depth(tiny_executable: Path, layers: int) -> None:
    executable = Executable.open(tiny_executable)
    loss, gradients = run(model_for(executable, torch.float32, layers))
    compiled = model_for(executable, torch.float32, layers)
    attach(compiled, executable.kernels())
    compiled_loss, compiled_gradients = run(compiled)
    assert_matches(compiled_loss, loss, 1e-5)
    for ours, theirs in zip(compiled_gradients, gradients, strict=True):
        assert_matches(ours, theirs, 1e-4)


def test_compiled_dropout_drops_what_eager_drops(dropout_executable: Path) -> None:
    executable = Executable.open(dropout_executable)
    loss, gradients = run(model_for(executable, torch.bfloat16))
    compiled = model_for(executable, torch.bfloat16)
    attach(compiled, executable.kernels())
    compiled_loss, compiled_gradients = run(compiled)
    assert_matches(compiled_loss, loss, 2e-3)
    for ours, theirs in zip(compiled_gradients, gradients, strict=True):
        assert (ours - theirs).float().norm() < 0.03 * theirs.float().norm()


def test_recompute_changes_no_bit(dropout_executable: Path) -> None:
    executable = Executable.open(dropout_executable)
    results = []
    for recompute in ("selective", "blocks", "every-2"):
        model = model_for(executable, torch.bfloat16)
        attach(model, executable.kernels(), recompute=recompute)
        results.append(run(model))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))


def test_evaluation_losses_equal_eager(dropout_executable: Path, tiny_executable: Path) -> None:
    tokens = torch.arange(4 * 64).view(4, 64) % 512
    for path, dtype, relative in (
        (tiny_executable, torch.float32, 1e-5),
        (dropout_executable, torch.bfloat16, 2e-2),
    ):
        executable = Executable.open(path)
        model = model_for(executable, dtype)
        expected = model.token_losses(tokens, tokens.roll(1, 1))
        attach(model, executable.kernels())
        assert_matches(model.token_losses(tokens, tokens.roll(1, 1)), expected, relative)


def test_a_wrong_shape_is_refused(tiny_executable: Path) -> None:
    executable = Executable.open(tiny_executable)
    model = model_for(executable, torch.float32)
    attach(model, executable.kernels())
    with pytest.raises(ExecutableError, match=r"compiled for int64\[4, 64\]"):
        model.token_losses(
            torch.zeros(2, 64, dtype=torch.int64), torch.zeros(2, 64, dtype=torch.int64)
        )


def test_another_jobs_regions_are_refused_naming_field_and_command(tiny_executable: Path) -> None:
    executable = Executable.open(tiny_executable)
    executable.require(executable.plan)
    deeper = dataclasses.replace(executable.plan.architecture, layers=7)
    executable.require(dataclasses.replace(executable.plan, architecture=deeper))
    for fields, name in (
        ({"sequence_length": 32}, "sequence_length=64, but this job has sequence_length=32"),
        ({"compute": "bf16"}, "compute=fp32"),
        (
            {"architecture": dataclasses.replace(deeper, hidden_size=128)},
            "architecture.hidden_size=64",
        ),
    ):
        with pytest.raises(ExecutableError, match=re.escape(name)) as caught:
            executable.require(dataclasses.replace(executable.plan, **fields))
        assert "penstock compile" in str(caught.value)


def rewrite(source: Path, target: Path, change: dict[str, bytes | None]) -> Path:
    """Copy an executable with some members replaced, or removed where None."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            data = change.get(name, old.read(name))
            if data is not None:
                new.writestr(zipfile.ZipInfo(name), data)
        for name in change.keys() - set(old.namelist()):
            new.writestr(zipfile.ZipInfo(name), change[name])
    return target


def members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_tampering_with_any_member_is_detected(tiny_executable: Path, tmp_path: Path) -> None:
    for name, data in members(tiny_executable).items():
        if name == "signature.json":
            continue
        changed = bytearray(data)
        changed[len(changed) // 2] ^= 1
        path = rewrite(tiny_executable, tmp_path / "x.penstock", {name: bytes(changed)})
        with pytest.raises(ExecutableError):
            Executable.open(path)
    extra = rewrite(tiny_executable, tmp_path / "x.penstock", {"kernels/more.so": b"code"})
    with pytest.raises(ExecutableError, match="changed after it was made"):
        Executable.open(extra)


def test_unsigned_and_foreign_files_need_their_exact_digest(
    tiny_executable: Path, tmp_path: Path
) -> None:
    unsigned = rewrite(tiny_executable, tmp_path / "unsigned.penstock", {"signature.json": None})
    foreign = json.dumps({"key_id": "0" * 16, "hmac": "0" * 64}).encode()
    other = rewrite(tiny_executable, tmp_path / "other.penstock", {"signature.json": foreign})
    for path, reason in ((unsigned, "unsigned"), (other, "another user's")):
        with pytest.raises(ExecutableError, match=reason) as caught:
            Executable.open(path)
        digest = re.search(r"--trust ([0-9a-f]{64})", str(caught.value))
        assert digest is not None
        assert Executable.open(path, [digest.group(1)]).kernels()
        with pytest.raises(ExecutableError):
            Executable.open(path, ["0" * 64])
        assert Executable.inspect(path).origin in ("unsigned", "another user's")
        with pytest.raises(ExecutableError):
            Executable.inspect(path).kernels()


def test_a_forged_signature_is_refused(tiny_executable: Path, tmp_path: Path) -> None:
    real = json.loads(members(tiny_executable)["signature.json"])
    forged = json.dumps({**real, "hmac": "0" * 64}).encode()
    path = rewrite(tiny_executable, tmp_path / "x.penstock", {"signature.json": forged})
    with pytest.raises(ExecutableError, match="changed after it was made"):
        Executable.open(path)


@pytest.mark.parametrize("keep", [0, 10, 1000, -1000, -1])
def test_truncated_files_are_refused(tiny_executable: Path, tmp_path: Path, keep: int) -> None:
    path = tmp_path / "x.penstock"
    path.write_bytes(tiny_executable.read_bytes()[:keep])
    with pytest.raises(ExecutableError, match="not a whole executable"):
        Executable.open(path)


def made_elsewhere(source: Path, target: Path, change: dict[str, object]) -> Path:
    """An executable whose manifest states another toolchain, signed by this user."""
    from penstock.compiler import signing
    from penstock.files import canonical_json

    manifest = json.loads(members(source)["manifest.json"])
    manifest["toolchain"] |= change
    signed = canonical_json(manifest).encode()
    signature = json.dumps(signing.sign(signed)).encode()
    return rewrite(source, target, {"manifest.json": signed, "signature.json": signature})


def test_another_torch_or_processor_is_refused(tiny_executable: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.penstock"
    made_elsewhere(tiny_executable, path, {"torch": "2.0.0"})
    with pytest.raises(ExecutableError, match=r"torch=2\.0\.0"):
        Executable.open(path)
    manifest = json.loads(members(tiny_executable)["manifest.json"])
    features = [*manifest["toolchain"]["processor_features"], "avx1024"]
    made_elsewhere(tiny_executable, path, {"processor_features": features})
    with pytest.raises(ExecutableError, match="features this machine lacks: avx1024"):
        Executable.open(path)


def test_the_signing_key_is_private_and_must_stay_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from penstock.compiler import signing

    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    signature = signing.sign(b"data")
    assert signing.verifies(b"data", signature)
    assert not signing.verifies(b"other", signature)
    key = tmp_path / "penstock" / "signing.key"
    assert key.stat().st_mode & 0o777 == 0o600
    key.chmod(0o644)
    with pytest.raises(ExecutableError, match="chmod 600"):
        signing.sign(b"data")


NO_COMPILATION = """
import sys, penstock
from penstock.hardware.process import prepare_process, loaded_openmp
prepare_process()
r = penstock.train(executable=sys.argv[1], data={"path": sys.argv[2]}, run=sys.argv[3],
                   train={"steps": 3, "tensorboard": False})
assert r.values["compiled"]
loaded = [m for m in sys.modules if m.startswith(("torch._inductor.codecache", "torch._inductor.compile_fx",
          "torch._dynamo.convert_frame", "penstock.compiler.graphs"))]
import torch._dynamo.utils as u
assert not u.counters["inductor"] and not u.counters["aot_autograd"] and not u.counters["stats"], u.counters
assert not loaded, loaded
assert len(loaded_openmp()) == 1, loaded_openmp()
print("trained")
"""


def test_training_from_an_executable_compiles_nothing_and_needs_no_compiler(
    tiny_executable: Path, dataset_folder: Path, tmp_path: Path
) -> None:
    arguments = [str(tiny_executable), str(dataset_folder), str(tmp_path / "run")]
    environment = {**os.environ, "PATH": str(tmp_path), "CC": "/nonexistent", "CXX": "/nonexistent"}
    result = subprocess.run(
        [sys.executable, "-c", NO_COMPILATION, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        check=False,
    )
    assert "trained" in result.stdout, result.stderr


def test_without_a_compiler_compile_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dataset_folder: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ExecutableError, match=r"no C\+\+ compiler"):
        penstock.compile(
            model={"preset": "gpt2-tiny", "hidden_size": 72, "heads": 2},
            data={"sequence_length": 16},
            executable=str(tmp_path / "x.penstock"),
            compile={"cache": str(tmp_path / "cache")},
        )
    summary = penstock.train(
        model={"preset": "gpt2-tiny"},
        data={"path": str(dataset_folder), "sequence_length": 16},
        compile={"cache": str(tmp_path / "cache")},
        run=str(tmp_path / "run"),
        train={"steps": 2},
    )
    assert not summary.values["compiled"]


def test_kernels_are_reused_by_content(tiny_executable: Path, tmp_path: Path) -> None:
    again = penstock.compile(
        model={"preset": "gpt2-tiny", "layers": 5},
        batch={"micro": 4},
        data={"sequence_length": 64},
        precision={"compute": "fp32"},
        executable=str(tmp_path / "again.penstock"),
    )
    assert again.reused
    assert again.seconds < 5


def test_inspect_shows_what_is_inside(tiny_executable: Path) -> None:
    values = penstock.inspect(tiny_executable).json()
    assert values["kind"] == "executable"
    assert {"block_forward", "block_backward", "head_train"} <= values["kernels"].keys()
    assert "graphs/block_backward.json" in values["members"]
