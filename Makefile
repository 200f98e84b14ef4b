# Two commands do everything: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test test-all lint check format docs bench llama-cpp clean

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
	$(BIN)/python -m pytest --hypothesis-profile=default

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

# A peer of the generation benchmark, compiled from its source package in an environment of its own.
llama-cpp:
	$(PYTHON) -m venv build/benchmarks/llama-cpp
	build/benchmarks/llama-cpp/bin/python -m pip install --quiet --disable-pip-version-check gguf==0.19.0
	CMAKE_ARGS=-DGGML_NATIVE=ON build/benchmarks/llama-cpp/bin/python -m pip install --quiet --disable-pip-version-check \
		--no-binary llama-cpp-python llama-cpp-python==0.3.36

clean:
	rm -rf build
