# Everything here stays inside this folder (pip's own cache aside). `make` alone explains the targets.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test test-slow lint types check format cover clean distclean

help:  ## show this help
	@echo "Meshwright: plan, predict and run distributed JAX training."
	@echo
	@echo "  make TARGET      (needs Python 3.11 or newer with pip and venv; PYTHON=... chooses one)"
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(READY)  ## make .venv and install Meshwright in it, with what its tests need
	@echo "==> ready: $(BIN)/meshwright --help"

demo: $(READY)  ## calibrate this machine, plan, simulate, then train a small GPT on 4 MPI ranks
	@echo "==> the demo: results go to demo/"
	@$(BIN)/python -m experiments.demo

test: $(READY)  ## run the tests that take seconds; ARGS="-k schedule" passes options to pytest
	@echo "==> the tests"
	@$(BIN)/python -m pytest $(ARGS)

test-slow: $(READY)  ## run the tests that take minutes
	@echo "==> the slow tests"
	@$(BIN)/python -m pytest -m slow $(ARGS) || [ $$? -eq 5 ]  # 5: no test is marked so

check: lint types  ## lint and types

lint: $(READY)  ## check style, format and the direction of imports
	@echo "==> style"
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@echo "==> direction of imports"
	@$(BIN)/lint-imports

types: $(READY)  ## check types with mypy --strict
	@echo "==> types"
	@$(BIN)/mypy --strict -p meshwright

format: $(READY)  ## rewrite the code to the project's style
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

cover: $(READY)  ## run the tests and show which lines none of them reaches
	@$(BIN)/coverage erase
	@$(BIN)/coverage run -m pytest $(ARGS)
	@$(BIN)/coverage combine --quiet
	@$(BIN)/coverage report

clean:  ## remove what builds, checks and the demo left; .venv stays
	rm -rf build dist demo validation .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	rm -f .coverage .coverage.* meshwright-fault-*.log
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -exec rm -rf {} +

distclean: clean  ## remove .venv too
	rm -rf $(VENV) *.egg-info

# Made again when the settings change. The stamp comes last, so an install that was cut short starts over.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Meshwright needs Python 3.11 or newer; $(PYTHON) is not. Try: make setup PYTHON=python3.12" >&2; exit 1; }
	@echo "==> making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || \
	  { echo "$(PYTHON) cannot make virtual environments. On Debian: apt install python3-venv" >&2; exit 1; }
	@echo "==> installing Meshwright and its tools into $(VENV)"
	@$(BIN)/python -m pip install --disable-pip-version-check -e ".[dev]"
	@touch $(READY)
