# make            what there is to make
# PYTHON is the interpreter that .venv is made with (3.11 or later).
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready

help:
	@echo "make demo       tune the bundled model on a bundled clip and edit it (into runs/)"
	@echo "make test       run the tests"
	@echo "make check      format, lint, types, layers and tests: what every commit passes"
	@echo "make format     format the code"
	@echo "make reference  write docs/cli.md, the options of all commands, from their help"
	@echo "make bench      time, memory and operations, held against the last figures and the published work"
	@echo "make miniature  draw the world and train the bundled model anew (hours)"

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet torch -c constraints.txt
	$(BIN)/pip install --quiet -e '.[dev]' -c constraints.txt
	touch $@

setup: $(READY)

demo: $(READY)
	$(BIN)/tuneavideo demo

test: $(READY)
	$(BIN)/pytest -n 2 --dist loadfile

# Without the program's own assertions, which must have no side effects; pytest's are evaluated all the same.
optimised: $(READY)
	$(BIN)/python -O -m pytest tests/test_files.py tests/test_runs.py

check: lint types layers test optimised

lint: $(READY)
	$(BIN)/ruff format --check
	$(BIN)/ruff check

types: $(READY)
	$(BIN)/pyright

layers: $(READY)
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(READY)
	$(BIN)/python -W ignore -m benchmarks

reference: $(READY)
	$(BIN)/python -m tools.cli_reference --write

miniature: $(READY)
	$(BIN)/python -m tools.miniature

.PHONY: help setup demo test optimised check lint types layers format reference bench miniature
