"""The rules of the house, as tests."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_the_train_step_fits_on_a_screen() -> None:
    import inspect

    from penstock.training.step import train_step

    assert len(inspect.getsource(train_step).splitlines()) <= 60


def test_every_module_imports_without_the_test_tools() -> None:
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in sorted((ROOT / "penstock").rglob("*.py"))
        # What `transformers` computes needs transformers, and is loaded for it alone.
        if path.name not in ("__main__.py", "generic.py")
    ]
    code = f"""
import importlib, sys
for name in ("transformers", "pytest", "hypothesis", "psutil"):
    sys.modules[name] = None
for name in {modules!r}:
    importlib.import_module(name)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=120)
