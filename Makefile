# Every command of this project. `make quickstart` and `make test` set up all they need on a fresh machine.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CONSTRAINTS ?= constraints/cpu.txt

.PHONY: help quickstart ladder test check test-unit test-gpu test-distributed test-slurm slurm study bench bench-gpu gpu-suite ui clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

quickstart: $(VENV)/.installed  ## tokenize the bundled plays, train a small XDLM, evaluate, sample, plot
	PATH="$(abspath $(BIN)):$$PATH" bash tools/quickstart.sh

ladder: $(VENV)/.installed  ## many small runs on the bundled text, their scaling law, report and MLflow page
	PATH="$(abspath $(BIN)):$$PATH" bash tools/ladder.sh

study: $(VENV)/.installed  ## likelihood against few-step generation: 5 noises and an autoregressive twin, 3 seeds
	$(PIP) install --quiet --constraint $(CONSTRAINTS) --editable ".[scorer]"
	PATH="$(abspath $(BIN)):$$PATH" bash tools/study.sh

test: check test-unit test-distributed  ## everything that CI runs

check: $(VENV)/.installed-dev  ## style, types, import contracts, spelling, recipes: seconds
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell
	$(BIN)/hadolint Dockerfile
	$(BIN)/shellcheck tools/*.sh slurm/*.sh
	@for recipe in $$(grep -L '^sweep:' examples/*.yaml); do $(BIN)/python -m xdlm_megatron show-config $$recipe > /dev/null || exit 1; done
	@for sweep in $$(grep -l '^sweep:' examples/*.yaml); do $(BIN)/python -m xdlm_megatron sweep $$sweep --dry-run > /dev/null || exit 1; done

test-unit: $(VENV)/.installed-dev  ## proofs of the maths and unit tests
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not distributed and not slurm"

test-gpu: $(VENV)/.installed-dev  ## the kernels on this machine's GPU
	$(BIN)/python -m pytest -m gpu

test-distributed: $(VENV)/.installed-dev  ## layouts, kills and resumes on gloo
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m distributed

test-slurm: $(VENV)/.installed-dev slurm  ## the scripts of slurm/ and sweeps on a real Slurm
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slurm

slurm:  ## Slurm's programs, which root installs by apt-get
	@missing=; for program in slurmctld slurmd srun munged; do command -v $$program > /dev/null || missing=yes; done; \
	  if [ "$$missing" = yes ] && [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
	    apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends slurm-wlm munge > /dev/null; fi || \
	  echo "apt-get cannot install Slurm, see above" >&2

bench: $(VENV)/.installed-dev  ## measure what benchmarks/results/ claims
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/loss_reference.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/checkpoint_save.py > benchmarks/results/cpu/checkpoint_save.md
	$(BIN)/python -m tests.distributed.layouts > benchmarks/results/cpu/layouts.md
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/head_loss.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/head_loss.py --tokens 2048 --dtypes bfloat16 --name head_loss_bfloat16
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/head_loss.py --tokens 2048 --uniform-ratio 0 --impls logits fused summed \
		--name head_loss_mask_noise
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/kernel_nelbo.py --vocab 32768 131072
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/kernel_posterior.py --tokens 256
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/sampling.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/sampling.py --layers 12 --hidden 768 --vocab 50258 \
		--name sampling_paper_small

bench-gpu:  ## the kernels' tables on one GPU, the build first: under 8 minutes, then it stops and says what is missing
	$(firstword $(wildcard $(BIN)/python) $(PYTHON)) benchmarks/gpu_suite.py --minutes 7.75 \
	  --only kernel_nelbo head_loss kernel_posterior

gpu-suite:  ## what this package does on one GPU: parity, FP8, speed, memory, a report; under 9 minutes, no network
	$(firstword $(wildcard $(BIN)/python) $(PYTHON)) benchmarks/gpu_suite.py $(ARGS)

ui: $(VENV)/.installed  ## MLflow's page over the local store, http://127.0.0.1:5000
	$(PIP) install --quiet --constraint $(CONSTRAINTS) --editable ".[ui]"
	$(BIN)/mlflow ui --backend-store-uri sqlite:///runs/mlflow.db

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than Python 3.11; name a newer one: make PYTHON=python3.12 ..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: setup.py $(CONSTRAINTS) | $(VENV)/bin/python
	$(PIP) install --quiet --constraint $(CONSTRAINTS) --editable .
	@touch $@

$(VENV)/.installed-dev: setup.py $(CONSTRAINTS) | $(VENV)/bin/python
	$(PIP) install --quiet --constraint $(CONSTRAINTS) --editable ".[dev,slurm]"
	@touch $@ $(VENV)/.installed

clean:  ## forget the environment and the caches; runs and data stay
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
