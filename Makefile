# Everything runs in .venv. It is set up on first use, and again when requirements-dev.txt or pyproject.toml changes.
IS_USABLE := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))
PYTHON ?= $(shell for name in python3.11 python3.12 python3; do \
	if $$name -c '$(IS_USABLE)' 2>/dev/null; then echo $$name; break; fi; done)
BIN := .venv/bin
SET_UP := .venv/.set-up
# Errors only: pip and setuptools have many notices for those who make packages.
QUIETLY := --quiet --quiet --disable-pip-version-check --no-input

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help set-up run test test-all lint format lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-10s %s\n", $$1, $$2}' Makefile

set-up: $(SET_UP) ## create .venv from requirements-dev.txt and install the project into it, editable

$(SET_UP): requirements-dev.txt pyproject.toml
	@test -x $(BIN)/python || test "$(PYTHON)" || { echo "make: needs Python 3.11 or 3.12: install it" >&2; exit 1; }
	@test -x $(BIN)/python || { echo "$(PYTHON) makes .venv"; $(PYTHON) -m venv .venv; }
	@echo "installs the packages of requirements-dev.txt into .venv: some minutes the first time"
	@$(BIN)/python -m pip install $(QUIETLY) --require-hashes -r requirements-dev.txt
	@echo "installs this project into .venv"
	@$(BIN)/python -m pip install $(QUIETLY) --no-deps --no-build-isolation --editable .
	@touch $@
	@echo ".venv is ready"

run: $(SET_UP) ## run the whole pipeline on the digits of scikit-learn
	$(BIN)/python pipeline/run.py quickstart

test: $(SET_UP) ## run all tests except the slow ones
	$(BIN)/python -m pytest

test-all: $(SET_UP) ## run all tests
	$(BIN)/python -m pytest -m ""

lint: $(SET_UP) ## check style, format and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(SET_UP) ## fix style and format in place
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# Keeps the locked versions if pyproject.toml allows them; `make lock UPGRADE=--upgrade` selects the newest versions.
# The package indexes and pip options of this machine are not written to the lock files.
lock: export CUSTOM_COMPILE_COMMAND = make lock
lock: COMPILE = $(BIN)/pip-compile --quiet --generate-hashes --strip-extras --allow-unsafe --all-build-deps \
	--no-emit-index-url --no-emit-find-links --no-emit-trusted-host --no-emit-options $(UPGRADE)
lock: $(SET_UP) ## lock the dependencies of pyproject.toml in requirements.txt and requirements-dev.txt
	$(COMPILE) --output-file requirements.txt pyproject.toml
	$(COMPILE) --output-file requirements-dev.txt --extra dev --constraint requirements.txt pyproject.toml

clean: ## remove .venv and caches; keep runs/
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
