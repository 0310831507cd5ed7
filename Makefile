# Two commands from nothing: `make demo` and `make test`.
# Each creates .venv, installs what is pinned in constraints.txt, and runs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One thread per process: tests run two processes on two cores, and ranks of a gloo group are processes of their own.
# A fixed hash seed, so that test ids made of sets are the same in both.
TEST := OMP_NUM_THREADS=1 PYTHONHASHSEED=0 $(BIN)/python -m pytest
# The covering set; PYTEST_ARGS adds to it: make test PYTEST_ARGS="-k tokenizer"
COVERING := -m "not slow and not gpu" -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: help install demo test test-all check lint format types clean

help:  ## what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(VENV)/.installed  ## .venv with everything, at the pinned versions

# Redone only when what it depends on changes; the stamp is written last, so a broken installation is tried again.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
		f"megalith needs Python 3.11 or newer, this is {sys.version.split()[0]}: make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: install  ## corpus to trained GPT to its text, on this machine, in a few minutes
	$(BIN)/megalith demo $(DEMO_ARGS)

test: install  ## the covering set, under ten minutes on two cores
	$(TEST) $(COVERING) $(PYTEST_ARGS)

# By stealing, because the table of tests/parity is one file and half of all the work.
test-all: install  ## every test, the slow ones too; the log goes to benchmarks/results/test-all.txt
	@mkdir -p benchmarks/results
	@bash -o pipefail -c '$(TEST) -n 2 --dist worksteal $(PYTEST_ARGS) 2>&1 | tee benchmarks/results/test-all.txt'

check: lint types test  ## what CI runs

lint: install  ## ruff, and that ruff format has nothing to change
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install  ## rewrite the files as `make lint` wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: install  ## mypy over megalith/
	$(BIN)/mypy

clean:  ## remove .venv and caches (never runs/)
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis megalith.egg-info
