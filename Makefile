PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# CI also runs the long tests, which need all extras; a developer asks for them with SLOW=1.
LONG := $(or $(CI),$(SLOW))
MARKS := $(if $(LONG),not gpu and not timing,not slow and not gpu and not timing)
export HF_HUB_OFFLINE ?= 1
# One more than cores: tests often wait for a process that they have started.
WORKERS ?= $(shell $(PYTHON) -c 'import os; print(os.cpu_count() + 1)')

.PHONY: help setup demo test lint bench bench-setup clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

setup: $(VENV)/.installed ## create .venv and install newllm with its development tools

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("newllm needs Python 3.11 or newer, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else 0'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

$(VENV)/.extras: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,all]'
	touch $@

demo: setup ## train the main job on the embedded corpus (two minutes), then evaluate it
	$(BIN)/python train.py experiment=first_run

test: setup $(if $(LONG),$(VENV)/.extras) ## run the tests (SLOW=1 adds the long ones)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -q -m "$(MARKS)"

lint: setup ## check format, lint, spelling and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/codespell README.md CONTRIBUTING.md docs conf newllm tests bench train.py evaluate.py
	$(BIN)/mypy newllm

bench: setup ## measure speed side by side, write bench/results and docs/benchmarks.md (ONLY="training infini" names some)
	$(BIN)/python -m bench $(ONLY)

bench-setup: ## install the peers that bench compares with into bench/.venv-peers
	$(PYTHON) -m bench.setup_peers

clean: ## remove runs, caches and the environment
	rm -rf outputs .cache $(VENV) bench/.venv-peers .pytest_cache .mypy_cache .ruff_cache .hypothesis
