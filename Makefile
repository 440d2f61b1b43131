# make demo   set up, then a real search on this machine without a GPU
# make demo-inference   as demo, for serving
# make test   set up, then all tests (installs and starts a development Slurm; needs root for that)
# make gpu    measure on one real GPU within ten minutes; docs/gpu.md
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_RESULTS ?= results/demo
INFERENCE_RESULTS ?= results/demo-inference
GPU_PYTHON ?= $(BIN)/python
GPU_RESULTS ?= results/gpu
GPU_OPTIONS ?=
PIP := $(BIN)/python -m pip --disable-pip-version-check install -qq --constraint constraints.txt

.PHONY: demo demo-inference test gpu browser lint format slurm-up slurm-down clean

demo: $(VENV)/.worker
	@echo "make demo: finding the fastest of 6 layouts of a tiny GPT-3 on two processes; about a minute"
	$(BIN)/hptool search-train --model gpt3/tiny --cluster local --results $(DEMO_RESULTS) --resume \
	  --tp 1,2 --pp 1,2 --vpp 1 --cp 1 --mbs 1,2 --recompute none \
	  --limit-search-runs 6 --max-steps-per-run 20 --max-minutes-per-run 2

demo-inference: $(VENV)/.worker
	@echo "make demo-inference: finding the fastest way to serve a tiny GPT-3 on up to two processes; about a minute"
	$(BIN)/hptool search-inference --model gpt3/tiny --cluster local --results $(INFERENCE_RESULTS) --resume \
	  --workload 32:16,96:16 --tp 1,2 --pp 1,2 --batch-sizes 1,2,4,8,16 --max-ttft-ms 150

test: $(VENV)/.dev browser
	@echo "make test: unit, numerics, local and Slurm tests; about 40 minutes on two cores"
	@# What is in tests/gpu needs a GPU: make gpu.
	$(BIN)/python -m pytest --ignore=tests/worker --ignore=tests/gpu
	@# Apart, because ranks are forked from the process of these tests, and forking a large one is slow.
	$(BIN)/python -m pytest tests/worker

# Another interpreter brings torch and all else along: nothing is installed for it.
gpu: $(if $(filter $(BIN)/python,$(GPU_PYTHON)),$(VENV)/.worker)
	$(GPU_PYTHON) -m tests.gpu --output $(GPU_RESULTS) $(GPU_OPTIONS)

# The report is looked at in a real browser.
browser:
	@command -v chromium >/dev/null || { echo "installing Chromium from Debian, for the tests of the report"; \
	  { apt-get update && apt-get install -y --no-install-recommends chromium; } > $(VENV)/chromium.log 2>&1 \
	  || { tail -n 5 $(VENV)/chromium.log >&2; exit 1; }; }

# What CI checks before the tests.
lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

slurm-up:
	@cluster/dev-slurm/up

slurm-down:
	@cluster/dev-slurm/down

clean: slurm-down
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "hptool needs Python 3.11 or newer; set PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) \
	  || { rm -rf $(VENV); echo "making $(VENV) failed; on Debian: apt-get install python3-venv" >&2; exit 1; }

$(VENV)/.worker: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing hptool, torch and megatron-core into $(VENV); about a minute"
	@$(PIP) --editable '.[worker]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt $(VENV)/.worker
	@echo "installing what tests and linters need; some 20 seconds"
	@$(PIP) --editable '.[worker,dev]'
	@touch $@
