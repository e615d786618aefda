# `make help` lists the targets. The first call makes .venv and installs everything there; later
# calls skip that until pyproject.toml or constraints.txt changes.

PYTHON ?= python3
WORKERS ?= 2
PYTEST_ARGS ?=

SHELL := /bin/bash
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
LOG := $(VENV)/install.log

.PHONY: help install demo test test-slow matrix lint docs bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile
	@echo "PYTHON=$(PYTHON) makes $(VENV) (after a change of it: make clean), WORKERS=$(WORKERS) test processes"

install: $(STAMP) ## make .venv and install the package, its extras and the tools

demo: $(STAMP) ## train a small language model twice (LSTM, reversible LSTM) and compare them
	@$(BIN)/python -m recipes.ptb.demo

test: $(STAMP) ## run the fast tests and the doctests
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not gpu" \
	    -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

# pytest exits with 5 when it selects no test; that is no failure here.
test-slow: $(STAMP) ## run the slow tests
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow and not gpu" --timeout 1800 \
	    -n $(WORKERS) --dist worksteal $(PYTEST_ARGS) || [ $$? -eq 5 ]

matrix: $(STAMP) ## try every callback with what Lightning users combine it with, and note the results
	@OMP_NUM_THREADS=1 REVFLIP_MATRIX=1 $(BIN)/python -m pytest tests/compatibility \
	    --ignore tests/compatibility/test_table.py -n $(WORKERS) --timeout 1800 $(PYTEST_ARGS)

lint: $(STAMP) ## check style, types and the direction of imports
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

docs: $(STAMP) ## build the documentation into site/, offline, and check it in a browser
	@OMP_NUM_THREADS=1 NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@OMP_NUM_THREADS=1 $(BIN)/python -m tools.check_site

bench: $(STAMP) ## measure layers and models against those of torch, and checkpointing
	@$(BIN)/python -m benchmarks.reversible_layer
	@$(BIN)/python -m benchmarks.language_model
	@$(BIN)/python -m benchmarks.language_model --long
	@$(BIN)/python -m benchmarks.flipout layers evolution

clean: ## remove the environment, builds and caches, keep runs/
	rm -rf $(VENV) build dist site .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A .venv that is only half made does not answer `pip --version` and is made anew.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) \
	    else "Python >= 3.10 is needed, for example: make PYTHON=python3.12 ...")'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 \
	    || { echo "Making $(VENV) with $$($(PYTHON) --version)"; $(PYTHON) -m venv --clear $(VENV); } \
	    || { echo "No venv could be made. On Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@echo "Installing into $(VENV), the full log is $(LOG)"
	@set -o pipefail; \
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off \
	    -e '.[recipes,dev,docs]' -c constraints.txt 2>&1 | tee $(LOG) \
	    | awk '/^(Collecting|Processing) / {n = split($$2, part, "/"); name = part[n]; \
	               sub(/-[0-9].*|[<>=!~;[].*/, "", name); printf "%s ", name; fflush()} \
	           /^Installing collected/ {printf "\nCopying files ...\n"; fflush()}' \
	    || { tail -n 30 $(LOG); exit 1; }
	@touch $@
