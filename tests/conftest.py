"""What tests share: real data, private user folders, one small compiled executable."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

install_import_hook(["penstock.models", "penstock.inference"], "beartype.beartype")

from penstock.hardware.process import prepare_process  # noqa: E402 - the hook comes first

ROOT = Path(__file__).resolve().parent.parent

prepare_process()

# `make test` says the same of the same code every time, however slow the machine is; `make test-all`
# looks for new examples (--hypothesis-profile=default).
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


@pytest.fixture(scope="session", autouse=True)
def user_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keys of the tests' own; a cache beside the repository, so that kernels compile once."""
    before = {name: os.environ.get(name) for name in ("XDG_CONFIG_HOME", "XDG_CACHE_HOME")}
    os.environ["XDG_CONFIG_HOME"] = str(ROOT / ".cache" / "config")
    os.environ["XDG_CACHE_HOME"] = str(ROOT / ".cache")
    yield
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real data."""
    path = Path(os.environ.get("PENSTOCK_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"no real data at {path}: set PENSTOCK_TEST_DATA")
    return path


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of real text: forty modules of the standard library."""
    from penstock.data.sources.stdlib import list_stdlib

    folder = tmp_path_factory.mktemp("corpus")
    files = [file for file in list_stdlib() if "/" not in file.id and 4000 < file.size < 40000]
    for file in files[:40]:
        (folder / file.id).write_bytes(Path(file.path).read_bytes())
    return folder


@pytest.fixture(scope="session")
def dataset_folder(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus, prepared with a vocabulary of 512 for sequences of 64."""
    import penstock

    path = tmp_path_factory.mktemp("data") / "dataset"
    penstock.prepare(
        source={"path": str(corpus)},
        tokenizer={"train": True, "vocab_size": 512},
        data={"path": str(path), "sequence_length": 64},
    )
    return path


TINY = {"preset": "gpt2-tiny"}


@pytest.fixture(scope="session")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of 530 lines of 1 to 40 words, a line a row."""
    import penstock

    folder = tmp_path_factory.mktemp("lines")
    counts = np.random.default_rng(0).integers(1, 40, 530).tolist()
    (folder / "lines.txt").write_text("".join(f"{'go on ' * n}{i}\n" for i, n in enumerate(counts)))
    penstock.prepare(
        source={"path": str(folder / "lines.txt"), "documents": "line"},
        tokenizer={"train": True, "vocab_size": 300},
        data={
            "path": str(folder / "dataset"),
            "sequence_length": 48,
            "packing": "single::truncate_right",
            "splits": [0.9, 0.1, 0],
        },
    )
    return folder / "dataset"


@pytest.fixture(scope="session")
def tiny_executable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """gpt2-tiny in fp32, 4 × 64 tokens, compiled."""
    import penstock

    path = tmp_path_factory.mktemp("executable") / "tiny.penstock"
    penstock.compile(
        model=TINY,
        batch={"micro": 4},
        data={"sequence_length": 64},
        precision={"compute": "fp32"},
        executable=str(path),
    )
    return path


@pytest.fixture(scope="session")
def dropout_executable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """gpt2-tiny in bf16 with dropout, 4 × 64 tokens, compiled."""
    import penstock

    path = tmp_path_factory.mktemp("executable") / "dropout.penstock"
    penstock.compile(
        model={**TINY, "dropout": 0.1},
        batch={"micro": 4},
        data={"sequence_length": 64},
        precision={"compute": "bf16"},
        executable=str(path),
    )
    return path


@pytest.fixture(scope="session")
def trained_run(
    tiny_executable: Path, dataset_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run folder of gpt2-tiny after three steps."""
    import penstock

    path = tmp_path_factory.mktemp("runs") / "run"
    penstock.train(
        executable=tiny_executable,
        data={"path": dataset_folder},
        run=path,
        train={"steps": 3, "report": False, "tensorboard": False},
    )
    return path
