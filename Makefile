# Everything works on a fresh machine: each target first makes the environment it needs in .venv.
# The default is a CPU build of torch. For a GPU, say which one, for example:
#   make run TORCH=torch TORCH_INDEX=https://download.pytorch.org/whl/cu130

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PROMPT ?= Question: A box holds 12 apples and 5 of them are red. How many are not red?\nAnswer:

# Only on Linux are the CPU builds marked as such.
ifeq ($(shell uname -s),Linux)
TORCH ?= torch==2.13.0+cpu
else
TORCH ?= torch==2.13.0
endif
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
PIP_TORCH_ARGS ?= --index-url $(TORCH_INDEX) --retries 1

.PHONY: run test test-all lint format index clean

run: $(VENV)/.core
	$(BIN)/moekit run babel "$$(printf '$(PROMPT)')"

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m "not slow and not gpu"

test-all: $(VENV)/.all
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

lint: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

index: $(VENV)/.dev
	$(BIN)/python -m moekit.core.registry

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_TORCH_ARGS) --no-deps "$(TORCH)"
	touch $@

$(VENV)/.core: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.core
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

$(VENV)/.all: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --editable ".[dev,eval]"
	touch $@
