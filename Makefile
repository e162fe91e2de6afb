VENV ?= .venv
PYTHON ?=
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
LEGACY_VENV ?= .venv-legacy
LEGACY_INSTALLED := $(LEGACY_VENV)/.installed

# NNCF's compiled extension belongs to the environment that it was compiled with
export TORCH_EXTENSIONS_DIR ?= $(abspath $(VENV))/torch_extensions

.PHONY: help demo test test-slow test-legacy check audit style docs clean

help:
	@echo "make demo       quantize a small network on digits, everything from training to the deployed files"
	@echo "make test       quick tests"
	@echo "make test-slow  tests that train for real"
	@echo "make test-legacy  tests with NNCF 2.19, in an environment of their own ($(LEGACY_VENV))"
	@echo "make check      ruff, mypy, whether docs/config.md is up to date, and make audit"
	@echo "make audit      known vulnerabilities of the installed dependencies, where that can be asked"
	@echo "make style      format the sources"
	@echo "make docs       write docs/config.md anew"
	@echo "Each makes the virtual environment $(VENV) first, where it is missing (PYTHON=... chooses the interpreter)."

$(INSTALLED): pyproject.toml .ci/install
	PYTHON="$(PYTHON)" .ci/install $(VENV)
	@touch $@

demo: $(INSTALLED)
	$(BIN)/nncf-mpq run configs/digits_resnet.json

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --max-worker-restart 0 -m "not slow"

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -q -m slow

$(LEGACY_INSTALLED): pyproject.toml .ci/install-legacy
	PYTHON="$(PYTHON)" .ci/install-legacy $(LEGACY_VENV)
	@touch $@

test-legacy: export TORCH_EXTENSIONS_DIR = $(abspath $(LEGACY_VENV))/torch_extensions
test-legacy: export NNCF_TORCH_LEGACY_TRACING = 1
test-legacy: $(LEGACY_INSTALLED)
	$(LEGACY_VENV)/bin/python -m pytest -q tests/legacy

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/nncf-mpq config docs | diff docs/config.md -
	.ci/audit $(BIN)/python

audit: $(INSTALLED)
	.ci/audit $(BIN)/python

style: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(INSTALLED)
	$(BIN)/nncf-mpq config docs > docs/config.md

clean:
	rm -rf $(VENV) $(LEGACY_VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
