# Everything runs in .venv. It is set up on first use, and again when requirements-dev.txt or pyproject.toml changes.
# `make set-up GPU=1` adds what TensorFlow needs on NVIDIA's GPUs, some GB; docs/gpu.md says which driver it wants.
IS_USABLE := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))
PYTHON ?= $(shell for name in python3.11 python3.12 python3; do \
	if $$name -c '$(IS_USABLE)' 2>/dev/null; then echo $$name; break; fi; done)
BIN := .venv/bin
SET_UP := .venv/.set-up
SET_UP_GPU := .venv/.set-up-gpu
TEST_WORKERS ?= 2
# Errors only: pip and setuptools have many notices for those who make packages.
QUIETLY := --quiet --quiet --disable-pip-version-check --no-input

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help set-up run test test-long test-all test-gpu lint format lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-10s %s\n", $$1, $$2}' Makefile

set-up: $(SET_UP) $(if $(GPU),$(SET_UP_GPU)) ## create .venv and install the project into it, editable; GPU=1: for GPUs

$(SET_UP): requirements-dev.txt pyproject.toml
	@test -x $(BIN)/python || test "$(PYTHON)" || { echo "make: needs Python 3.11 or 3.12: install it" >&2; exit 1; }
	@test -x $(BIN)/python || { echo "$(PYTHON) makes .venv"; $(PYTHON) -m venv .venv; }
	@echo "installs the packages of requirements-dev.txt into .venv: some minutes the first time"
	@$(BIN)/python -m pip install $(QUIETLY) --require-hashes -r requirements-dev.txt
	@echo "installs this project into .venv"
	@$(BIN)/python -m pip install $(QUIETLY) --no-deps --no-build-isolation --editable .
	@touch $@
	@echo ".venv is ready"

$(SET_UP_GPU): $(SET_UP) requirements-gpu.txt
	@echo "installs the packages of requirements-gpu.txt into .venv: some GB"
	@$(BIN)/python -m pip install $(QUIETLY) --require-hashes -r requirements-gpu.txt
	@touch $@

run: $(SET_UP) ## run the whole pipeline on the digits of scikit-learn
	$(BIN)/python pipeline/run.py quickstart

IN_PROCESSES := --numprocesses $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder

test: $(SET_UP) ## run the tests of less than about half a minute, in two processes; TEST_WORKERS=4: in four
	$(BIN)/python -m pytest $(IN_PROCESSES)

test-long: $(SET_UP) ## run those that take longer and that CI runs too
	$(BIN)/python -m pytest -m "long and not slow" $(IN_PROCESSES)

test-all: $(SET_UP) ## run all tests
	$(BIN)/python -m pytest -m ""

test-gpu: $(SET_UP) ## run the tests that need a GPU, after `make set-up GPU=1`
	$(BIN)/python -m pytest -m gpu -rs tests/gpu

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
lock: COMPILE = $(BIN)/pip-compile --quiet --generate-hashes --strip-extras --allow-unsafe \
	--no-emit-index-url --no-emit-find-links --no-emit-trusted-host --no-emit-options $(UPGRADE)
lock: GPU_EXTRA = import tomllib; \
	print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["gpu"], sep="\n")
lock: $(SET_UP) ## lock the dependencies of pyproject.toml in requirements.txt, requirements-dev.txt and requirements-gpu.txt
	$(COMPILE) --all-build-deps --output-file requirements.txt pyproject.toml
	$(COMPILE) --all-build-deps --output-file requirements-dev.txt --extra dev --constraint requirements.txt pyproject.toml
	$(BIN)/python -c '$(GPU_EXTRA)' | $(COMPILE) --output-file requirements-gpu.txt --constraint requirements.txt -

clean: ## remove .venv and caches; keep runs/
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
