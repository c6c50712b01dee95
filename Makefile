# Each target installs what it needs into .venv at its first use.
PYTHON ?= python3
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest

.PHONY: demo test test-slow check format bench docs clean

demo: .venv/installed
	$(BIN)/torchrun -m trainer.main

# Two to four files of tests at a time; the tests of a file share fixtures and so a process. A process
# that crashes ends the tests: with another in its place pytest-xdist can wait for ever.
PARALLEL := --numprocesses auto --maxprocesses 4 --dist loadfile --max-worker-restart 0

test: .venv/dev
	$(PYTEST) -m "not slow" $(PARALLEL)

# Long kill-and-resume runs; SFTSTREAM_KILLS sets their number, SFTSTREAM_SEED the random seed.
test-slow: .venv/dev
	$(PYTEST) -m slow $(PARALLEL)

check: .venv/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: .venv/dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Reads the conversations in SFTSTREAM_REALDATA, by default the demo's; BENCH="--rows 2000" passes options.
bench: .venv/bench
	$(BIN)/python benchmarks/pipeline/pipeline.py $(BENCH)

# docs/config.md from the config structs, docs/errors.md from the messages of errors.
docs: .venv/installed
	$(BIN)/python docs/generate_config.py
	$(BIN)/python docs/generate_errors.py

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
