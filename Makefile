# Two commands do everything: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test test-all lint check format docs bench clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Penstock needs Python 3.11 or newer") if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(STAMP)

demo: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" sh recipes/demo/run.sh

test: setup lint
	$(BIN)/python -m pytest -m 'not slow and not peer and not gpu'

test-all: setup check
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff format --check penstock tests tools benchmarks
	$(BIN)/ruff check penstock tests tools benchmarks
	$(BIN)/lint-imports --no-cache
	$(BIN)/python tools/house_check.py

check: lint
	$(BIN)/pyright --pythonpath $(BIN)/python

format: setup
	$(BIN)/ruff format penstock tests tools benchmarks
	$(BIN)/ruff check --fix penstock tests tools benchmarks

docs: setup
	$(BIN)/python tools/write_docs.py

bench: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/generation.py

clean:
	rm -rf build
