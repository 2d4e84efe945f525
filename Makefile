# Two commands for everyone: `make demo` and `make test`. Both make .venv by themselves.
SHELL := /bin/bash
PYTHON ?= $(shell for python in python3 python3.12 python3.11 python3.13; do \
  $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$python; break; }; done)
TORCH_INDEX ?=
RUN_DIR ?= runs/demo
DEMO_FLAGS ?=

bin := .venv/bin
pip := $(bin)/pip --disable-pip-version-check
index := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.PHONY: help demo test test-unit test-all soak lint format clean

help:
	@echo "make demo      train a tokenizer, a base model and a chat model here, let it practise, show and serve it"
	@echo "               TORCH_INDEX=URL  take torch from another index (a smaller CPU build)"
	@echo "               DEMO_FLAGS='--corpus.corpus PATH'  use other text; see ray_jobs/speedrun.py demo --help"
	@echo "make test      lint, types, unit tests, and one real-Ray test per promise"
	@echo "make test-all  everything that runs by itself; make soak: the long fault tests"
	@echo "make clean     delete .venv and caches; runs/ stays"

demo: .venv/installed
	@$(bin)/python ray_jobs/speedrun.py demo --run-dir $(RUN_DIR) $(DEMO_FLAGS)

test: lint test-unit
	@$(bin)/python -m pytest tests/integration tests/e2e -m "not slow and not soak and not gpu"

test-unit: .venv/installed-dev
	@OMP_NUM_THREADS=1 $(bin)/python -m pytest tests/unit -m "not slow" -n logical --maxprocesses 8 --dist loadfile

test-all: .venv/installed-dev
	@$(bin)/python -m pytest tests -m "slow or gpu"

soak: .venv/installed-dev
	@$(bin)/python -m pytest tests -m soak --timeout 7200

lint: .venv/installed-dev
	@$(bin)/ruff format --check nanochat ray_jobs tests
	@$(bin)/ruff check nanochat ray_jobs tests
	@$(bin)/pyrefly check

format: .venv/installed-dev
	@$(bin)/ruff format nanochat ray_jobs tests
	@$(bin)/ruff check --fix nanochat ray_jobs tests

.venv/installed: pyproject.toml
	@./prerequisites.sh "$(PYTHON)"
	@test -x $(bin)/python || "$(PYTHON)" -m venv .venv
	@echo "installing into .venv: about 1.8 GB with the CPU build of torch, 6 GB with CUDA; minutes, once"
	@$(pip) install -qq $(index) -e .
	@touch $@

.venv/installed-dev: .venv/installed
	@$(pip) install -qq $(index) -e .[dev]
	@touch $@

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -not -path './runs/*' -prune -exec rm -rf {} +
