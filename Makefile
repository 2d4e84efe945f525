# Two commands for everyone: `make demo` and `make test`. Both make .venv by themselves, of the releases in constraints.txt.
SHELL := /bin/bash
PYTHON ?= $(shell for python in python3 python3.12 python3.11 python3.13; do \
  $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$python; break; }; done)
TORCH_INDEX ?=
VENV ?= .venv
RUN_DIR ?= runs/demo
DEMO_FLAGS ?=

bin := $(VENV)/bin
pip := $(bin)/pip --disable-pip-version-check
index := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.PHONY: help demo test test-unit test-all soak audit lint format lock clean

help:
	@echo "make demo      train a tokenizer, a base model and a chat model here, let it practise, show and serve it"
	@echo "               TORCH_INDEX=URL  take torch from another index (a smaller CPU build)"
	@echo "               DEMO_FLAGS='--corpus.corpus PATH'  use other text; see ray_jobs/speedrun.py demo --help"
	@echo "make test      lint, types, unit tests, and one real-Ray test per promise"
	@echo "               make test-unit PYTHON=python3.12 VENV=.venv312  with another Python, beside .venv"
	@echo "make test-all  everything that runs by itself; make soak: the long fault tests"
	@echo "make audit     known vulnerabilities of the releases in constraints.txt"
	@echo "make lock      constraints.txt after a change of pyproject.toml; delete it first to take newer releases of all"
	@echo "make clean     delete .venv and caches; runs/ stays"

demo: $(VENV)/installed
	@$(bin)/python ray_jobs/speedrun.py demo --run-dir $(RUN_DIR) $(DEMO_FLAGS)

test: lint test-unit
	@$(bin)/python -m pytest tests/integration tests/e2e -m "not slow and not soak and not gpu"

test-unit: $(VENV)/installed-dev
	@OMP_NUM_THREADS=1 $(bin)/python -m pytest tests/unit -m "not slow" -n logical --maxprocesses 8 --dist loadfile

test-all: $(VENV)/installed-dev
	@$(bin)/python -m pytest tests -m "slow or gpu"

soak: $(VENV)/installed-dev
	@$(bin)/python -m pytest tests -m soak --timeout 7200

# First a release that is known to be vulnerable: a service that finds nothing wrong with it finds nothing at all.
audit: $(VENV)/installed-dev
	@audit() { $(bin)/pip-audit -s osv --no-deps --disable-pip --progress-spinner off $(AUDIT_FLAGS) -r "$$1"; }; \
	if audit <(echo urllib3==1.24.1) 2>/dev/null | grep -q '^urllib3 *1\.24\.1'; then audit constraints.txt; \
	else echo "not audited: no service of known vulnerabilities can be reached from here"; fi

lint: $(VENV)/installed-dev
	@$(bin)/ruff format --check nanochat ray_jobs tests
	@$(bin)/ruff check nanochat ray_jobs tests
	@$(bin)/pyrefly check

format: $(VENV)/installed-dev
	@$(bin)/ruff format nanochat ray_jobs tests
	@$(bin)/ruff check --fix nanochat ray_jobs tests

lock:
	@test -x $(bin)/python || "$(PYTHON)" -m venv $(VENV)
	@$(pip) install -qq uv
	@$(bin)/uv pip compile -q --universal --python-version 3.11 --all-extras --no-annotate \
	  --custom-compile-command "make lock" --output-file constraints.txt pyproject.toml

$(VENV)/installed: pyproject.toml constraints.txt
	@./prerequisites.sh "$(PYTHON)"
	@test -x $(bin)/python || "$(PYTHON)" -m venv $(VENV)
	@echo "installing into $(VENV): about 1.8 GB with the CPU build of torch, 6 GB with CUDA; minutes, once"
	@$(pip) install -qq $(index) -c constraints.txt -e .
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	@$(pip) install -qq $(index) -c constraints.txt -e .[dev]
	@touch $@

clean:
	rm -rf .venv* .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -not -path './runs/*' -prune -exec rm -rf {} +
