# Everything that needs installing is installed by the first command that needs it, into .venv.
PYTHON ?= python3
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest

.PHONY: demo test test-slow check format bench clean

demo: .venv/installed
	$(BIN)/torchrun -m trainer.main

test: .venv/dev
	$(PYTEST) -m "not slow"

# Long kill-and-resume runs; SFTSTREAM_KILLS and SFTSTREAM_SEED set how many and which.
test-slow: .venv/dev
	$(PYTEST) -m slow

check: .venv/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: .venv/dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Real conversations where SFTSTREAM_REALDATA or ../shared/data has them, else the demo's; BENCH="--rows 2000" and the like.
bench: .venv/bench
	$(BIN)/python benchmarks/pipeline/pipeline.py $(BENCH)

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable .
	touch $@

.venv/dev: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $@

.venv/bench: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[dev,fast,bench]"
	touch $@

clean:
	rm -rf .venv runs
