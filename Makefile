# `make demo` and `make test` need Python 3.10 or newer and nothing else: the environment is made in $(VENV).
PYTHON ?= python3
VENV   ?= .venv

# Without an NVIDIA GPU, Linux gets the CPU build of torch by name, so that nothing can pull CUDA packages in.
# Others say what they want: `make test TORCH=torch==2.13.0`, or another index of wheels by `TORCH_INDEX=URL`.
TORCH_VERSION ?= 2.13.0
GPU := $(shell command -v nvidia-smi 2>/dev/null)
TORCH ?= torch==$(TORCH_VERSION)$(if $(GPU),,$(if $(filter Linux,$(shell uname -s)),+cpu))
TORCH_INDEX ?=
CPU_INDEX ?= https://download.pytorch.org/whl/cpu
PIP_EXTRA_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
STAMP := $(VENV)/.installed
DEV_STAMP := $(VENV)/.installed-dev

DEMO_ARGS ?= --kv-cache h2o --kv-cache.budget 128 --prompt "def " --max-new-tokens 200
PYTEST_ARGS ?= -n logical --maxprocesses 8 --dist loadgroup

.DEFAULT_GOAL := help
.PHONY: help env demo test lint wheel clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' Makefile
	@echo "  variables: PYTHON=$(PYTHON) VENV=$(VENV) TORCH=$(TORCH) TORCH_INDEX=$(TORCH_INDEX) PYTEST_ARGS='$(PYTEST_ARGS)'"

env: $(STAMP)  ## the environment alone

# Made anew from nothing whenever pyproject.toml changes.
$(STAMP): pyproject.toml
	rm -rf "$(VENV)"
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make ... PYTHON=python3.12")'
	$(PYTHON) -m venv "$(VENV)"
	@echo "Installing $(TORCH) in $(VENV)"
	@$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(PIP_EXTRA_ARGS) "$(TORCH)" \
	  || { echo "Not there; trying PyTorch's own index, $(CPU_INDEX)"; \
	       $(PIP) --index-url $(CPU_INDEX) $(PIP_EXTRA_ARGS) "$(TORCH)"; } \
	  || { echo >&2; echo "$(TORCH) could not be installed. Name another index of wheels with TORCH_INDEX=URL, or take" >&2; \
	       echo "what your package index has, on Linux often with gigabytes of CUDA: TORCH=torch==$(TORCH_VERSION)" >&2; \
	       exit 1; }
	$(PIP) $(PIP_EXTRA_ARGS) "pip>=22.3"
	$(PIP) $(PIP_EXTRA_ARGS) -e ".[test]"
	@touch "$@"

$(DEV_STAMP): $(STAMP)
	$(PIP) $(PIP_EXTRA_ARGS) -e ".[dev]"
	@touch "$@"

demo: $(STAMP)  ## generate text with the shipped model and the h2o cache
	$(BIN)/litgpt_kv generate demo $(DEMO_ARGS)

test: $(STAMP)  ## all tests
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(DEV_STAMP)  ## ruff, as the pre-commit hooks run it
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

wheel: $(STAMP)  ## dist/litgpt_kv-*.whl
	$(BIN)/python -m pip --disable-pip-version-check wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	@ls -l dist

clean:  ## remove the environment and everything built
	rm -rf "$(VENV)" dist .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
