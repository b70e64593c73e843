# Every target does its own set-up; `make help` lists them.
.DEFAULT_GOAL := help
SHELL := /bin/bash

PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3 python; do \
	command -v $$p >/dev/null 2>&1 && $$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
BENCH := .venv-bench
BENCH_READY := $(BENCH)/.ready
TWO := -n 2 --dist loadfile
ARGS ?=

.PHONY: help setup train test test-all test-gpu lint types contracts check bench bench-gpu bench-setup fix clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(READY): requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed and none was found on PATH. Install it, or name it: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

setup: $(READY) ## create .venv, install requirements.lock and the package

train: setup ## train a NaViT on the demonstration set, or on SHARDS='...{000..099}.tar' VAL='...tar'
	$(BIN)/navit train $(if $(SHARDS),pairs --shards '$(SHARDS)',demo) $(if $(VAL),--val '$(VAL)') $(ARGS)

# Two processes, a file of tests each: as many as the smallest machine we test on has cores. They
# compare with what a CPU gives, so a GPU that is there is hidden from them.
test: setup ## the fast tests (no GPU, no network)
	CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest $(TWO) $(ARGS)

test-all: setup ## all tests, the slow ones too
	CUDA_VISIBLE_DEVICES= TEST_PROFILE=all $(BIN)/python -m pytest $(TWO) -m "not gpu" $(ARGS)

test-gpu: setup ## the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

contracts: setup
	$(BIN)/lint-imports

check: lint types contracts test ## lint, types, import contracts and the fast tests

bench: setup ## paired benchmarks; tables on screen, JSON under benchmarks/results/
	$(if $(wildcard $(BENCH_READY)),$(BENCH)/bin,$(BIN))/python -m benchmarks $(ARGS)

bench-gpu: setup ## the benchmarks of training steps on a CUDA device
	$(if $(wildcard $(BENCH_READY)),$(BENCH)/bin,$(BIN))/python -m benchmarks gpu gpu_programs gpu_mix gpu_loss $(ARGS)

bench-setup: $(BENCH_READY) ## create .venv-bench, where `make bench` finds other packers to compare with

$(BENCH_READY): requirements-bench.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed and none was found on PATH. Install it, or name it: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-bench.lock
	$(BENCH)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

fix: setup ## format and apply the linter's safe fixes
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

clean: ## remove the environment, caches and generated data (not runs/)
	rm -rf $(VENV) $(BENCH) build data *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
