VENV ?= .venv
PYTHON ?=
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# NNCF's compiled extension belongs to the environment that it was compiled with
export TORCH_EXTENSIONS_DIR ?= $(abspath $(VENV))/torch_extensions

.PHONY: help demo test test-slow check audit style docs clean

help:
	@echo "make demo       quantize a small network on digits, everything from training to the deployed files"
	@echo "make test       quick tests"
	@echo "make test-slow  tests that train for real"
	@echo "make check      ruff, mypy, and whether docs/config.md is up to date"
	@echo "make audit      known vulnerabilities of the installed dependencies (needs the network)"
	@echo "make style      format the sources"
	@echo "make docs       write docs/config.md anew"
	@echo "Each makes the virtual environment $(VENV) first, where it is missing (PYTHON=... chooses the interpreter)."

$(INSTALLED): pyproject.toml .ci/install
	PYTHON="$(PYTHON)" .ci/install $(VENV)
	@touch $@

demo: $(INSTALLED)
	$(BIN)/nncf-mpq run configs/digits_resnet.json

test: $(INSTALLED)
	$(BIN)/python -m pytest -q -m "not slow"

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -q -m slow

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/nncf-mpq config docs | diff docs/config.md -

audit: $(INSTALLED)
	$(BIN)/python -m pip install --quiet pip-audit
	$(BIN)/python -m pip_audit --skip-editable

style: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(INSTALLED)
	$(BIN)/nncf-mpq config docs > docs/config.md

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
