"""The checks `make check` runs find what they are there to find."""

import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def house() -> ModuleType:
    """tools/house_check.py, as a module."""
    spec = importlib.util.spec_from_file_location("house_check", ROOT / "tools" / "house_check.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_package_keeps_the_rules_of_the_house(house: ModuleType) -> None:
    found = [b for path in sorted((ROOT / "penstock").rglob("*.py")) for b in house.breaches(path)]
    assert found == []


@pytest.mark.parametrize(
    ("text", "breach"),
    [
        ("x = 1\n" * 301, "301 lines"),
        ("def f():\n" + "    x = 1\n" * 60, "f has 61 lines"),
        ("def f():\n    # TODO: later\n    pass\n", "without an issue"),
        ("import os\nx = os.environ['A']\n", "reads the environment"),
        ("import os\nx = os.getenv('A')\n", "reads the environment"),
        ("from os import environ\n", "reads the environment"),
        ("print(1)\n", "calls print"),
        ("eval('1')\n", "calls eval"),
        ("block_size = 1\n", "another project's word"),
    ],
)
def test_each_breach_is_found(
    text: str, breach: str, house: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(house, "ROOT", tmp_path)
    path = tmp_path / "penstock" / "module.py"
    path.parent.mkdir()
    path.write_text(text)
    found = list(house.breaches(path))
    assert len(found) == 1, found
    assert breach in found[0]


def test_a_linked_task_is_no_breach(
    house: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(house, "ROOT", tmp_path)
    path = tmp_path / "module.py"
    path.write_text("# TODO(#12): later\n")
    assert list(house.breaches(path)) == []


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    """Check the import contracts of the repository, or of a copy of it."""
    return subprocess.run(
        [str(BIN / "lint-imports"), "--no-cache"],
        cwd=folder,
        env={"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_imports_go_down_only() -> None:
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("console.py", "from penstock.config import schema", "Layers import downwards only"),
        ("data/loader.py", "from penstock.models import layers", "Layers import downwards only"),
        ("config/load.py", "import torch", "What plans and configures imports no torch"),
        ("hardware/target.py", "import torch", "What plans and configures imports no torch"),
        ("training/step.py", "import transformers", "Only the Hugging Face modules may know"),
        (
            "training/trainer.py",
            "from penstock.compiler import build",
            "What runs an executable imports no tracer and no compiler",
        ),
    ],
)
def test_a_planted_import_is_caught(module: str, line: str, contract: str, tmp_path: Path) -> None:
    for path in (ROOT / "penstock").rglob("*.py"):
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text())
    planted = tmp_path / "penstock" / module
    planted.write_text(f"{planted.read_text()}\n{line}\n")
    settings = (ROOT / "pyproject.toml").read_text()
    (tmp_path / "pyproject.toml").write_text(settings[settings.index("[tool.importlinter]") :])
    done = lint_imports(tmp_path)
    assert done.returncode == 1, done.stdout
    assert re.search(rf"{re.escape(contract)}.* BROKEN", done.stdout), done.stdout


def _name(requirement: str) -> str:
    return re.split(r"[<>=!~\[; ]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def test_every_dependency_is_pinned_within_its_bounds() -> None:
    from packaging.requirements import Requirement

    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if line)
    pins = {_name(name): version for name, version in pins.items()}
    project = PROJECT["project"]
    extras = project["optional-dependencies"].values()
    wanted = [*project["dependencies"], *(text for extra in extras for text in extra)]
    for text in wanted:
        requirement = Requirement(text)
        assert requirement.specifier, text
        assert pins[_name(requirement.name)] in requirement.specifier, text
    for version in pins.values():
        assert "+" not in version
    # Twelve, and two for the files of other systems: h5py and pyarrow. Reading data people have
    # already prepared is no extra.
    assert len(project["dependencies"]) <= 14


def test_the_installed_closure_is_pinned() -> None:
    from importlib.metadata import distribution

    from packaging.requirements import Requirement

    pinned = {_name(line) for line in (ROOT / "constraints.txt").read_text().split()}
    todo, seen = ["penstock"], set()
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        for text in distribution(name).requires or []:
            requirement = Requirement(text)
            marker = requirement.marker
            extras = ["dev"] if name == "penstock" else [""]
            wanted = marker is None or any(marker.evaluate({"extra": extra}) for extra in extras)
            # torch pins its own CUDA libraries, which differ from build to build.
            if wanted and (name != "torch" or _name(requirement.name) in pinned):
                todo.append(_name(requirement.name))
    assert seen - {"penstock"} <= pinned | {"setuptools"}, seen - pinned


def test_repository_files_name_no_index_and_no_path_of_a_machine() -> None:
    for name in (
        "Makefile",
        "constraints.txt",
        "pyproject.toml",
        ".ci/run",
        ".pre-commit-config.yaml",
    ):
        text = (ROOT / name).read_text()
        assert not re.search(r"index-url|find-links|/root/|/home/|/work/", text), name


def test_continuous_integration_runs_make_test() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    assert "make test" in script.read_text()
