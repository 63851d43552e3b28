# moe-audit: `make demo` and `make test` do their own set-up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
# A file stays in one process: its tests share a cluster or ranks. In the order of tests/conftest.py, the long ones first.
SIDE_BY_SIDE := --numprocesses 2 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help install demo check test test-all clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

install: $(STAMP)  ## create .venv and install pinned dependencies

# torch goes first and by its exact pin: resolved along with the rest, an unpinned torch may pull another build.
# Compiled on all cores, which pip does on one; and not at import, as where PYTHONDONTWRITEBYTECODE is set every process
# would compile everything again. Some packages hold files that are no valid Python, so its status says nothing.
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "moe-audit needs Python 3.11 or newer; $(PYTHON) is older. Name another: make PYTHON=python3.12 install"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) "$$(grep '^torch==' constraints.txt)"
	$(PIP_INSTALL) --constraint constraints.txt --editable '.[dev]'
	@$(BIN)/python -m compileall -q -q -j 0 -x '/tests/' $(VENV)/lib audit cluster jobs || true
	@touch $@

demo: $(STAMP)  ## audit the embedded model on this machine; results in runs/demo
	$(BIN)/moe-audit run configs/demo.yaml --out runs/demo

check: $(STAMP)  ## ruff and strict mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: check  ## lint, types and every behaviour at small sizes
	$(BIN)/python -m pytest $(SIDE_BY_SIDE)

test-all: check  ## the same with the full grids of families, sizes and seeds
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) --full

clean:  ## remove the virtual environment and caches; runs stay
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache *.egg-info
