# Every command of the project. Each sets up what it needs in .venv and says so; nothing outside the package index is used.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INPUTS := pyproject.toml constraints.txt Makefile
ARGS ?=
# Compiler for aarch64: what newer ones make needs a newer glibc than JetPack 6 has.
CROSS_GXX ?= g++-12-aarch64-linux-gnu

export PIP_ROOT_USER_ACTION := ignore

.PHONY: help check test test-full runtimes nvcc cross-tools gpu-test demo format clean

help: ## Show the commands
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

check: $(VENV)/.test-installed ## Lint, types and layering, without tests
	@$(BIN)/ruff check --quiet . && $(BIN)/ruff format --check --quiet .
	@$(BIN)/mypy
	@said=$$(PYTHONPATH=src $(BIN)/lint-imports --no-cache 2>&1) || { echo "$$said"; exit 1; }

test: check runtimes ## Lint, types, layering and the quick tests: what CI runs
	@$(BIN)/python -m pytest -n 2 -m "not gpu and not slow" $(ARGS)

test-full: check runtimes nvcc ## The same and the tests that take minutes
	@$(BIN)/python -m pytest -n 2 -m "not gpu" $(ARGS)

gpu-test: ## On a machine with a GPU: build for it, GPU tests, sanitizers, benchmark (ARGS="build test" for some)
	@PYTHON=$(PYTHON) benchmarks/gpu_machine.sh $(ARGS)

cross-tools: ## Install what tests of the aarch64 build need (Debian and Ubuntu, as root)
	@command -v qemu-aarch64-static >/dev/null && ls /usr/bin/aarch64-linux-gnu-g++* >/dev/null 2>&1 || { \
		install="apt-get install --quiet --yes --no-install-recommends $(CROSS_GXX) qemu-user-static"; \
		$$install >/dev/null || { apt-get update --quiet >/dev/null && $$install >/dev/null; }; }

runtimes: $(VENV)/.test-installed # TensorRT's runtimes for tests, into build/tensorrt
	@$(BIN)/python tests/tensorrt_tools/runtimes.py

nvcc: $(VENV)/.test-installed # the CUDA compiler, from wheels where the machine has none
	@command -v nvcc >/dev/null || test -x /usr/local/cuda/bin/nvcc || $(PIP) install --quiet --constraint constraints.txt '.[nvcc]'

demo: $(VENV)/.demo-installed ## Export, verify and ask a small trained model about pictures it has never seen
	@$(BIN)/mmm-export demo $(ARGS)

format: $(VENV)/.test-installed ## Format the code and mend what lint can mend
	@$(BIN)/ruff check --fix-only --quiet . && $(BIN)/ruff format .

clean: ## Remove the environment and what the commands wrote
	rm -rf $(VENV) build dist demo-output .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis

$(VENV)/.%-installed: $(INPUTS)
	@echo "Setting up $(VENV) for 'make $*' (once; downloads PyTorch and more, which can take minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "error: $(PYTHON) cannot make a virtual environment; install python3-venv, or set PYTHON=..." >&2; exit 1; }
	@$(PIP) install --quiet --constraint constraints.txt --editable '.[$*]'
	@touch $@
