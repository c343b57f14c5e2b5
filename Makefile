# `make demo` and `make test` need nothing but Python 3.11 or newer with pip, and make: each prepares .venv
# once (again only when pyproject.toml or constraints.txt changes) and then does its job.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
READY_DEV := $(VENV)/.ready-dev
READY_MUTANTS := $(VENV)/.ready-mutants
ARGS ?=
# Tests compile more than they compute, each on one core: several processes share them.
SHARED := --numprocesses auto --maxprocesses 8 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help demo figures test test-all test-isa test-versions test-types mutants parity exactness bench bench-attention bench-optimizers bench-models lint format lock clean

help:  ## Show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 26

demo: $(READY)  ## Watch overfitting happen and be cured, in JAX and in PyTorch (ARGS="--help" for options)
	$(RUN) -m examples.overfit $(ARGS)

figures: $(READY)  ## Make the pictures and the tables of the examples that README shows
	$(RUN) -m examples.overfit --out docs/overfit
	$(RUN) -m examples.uncertainty --out docs/uncertainty

test: $(READY)  ## Run the tests, without the slow ones
	$(RUN) -m pytest $(SHARED) -m "not slow" $(ARGS)

test-all: $(READY)  ## Run every test, and each property on twenty times as many examples
	PROPERTIES=thorough $(RUN) -m pytest $(SHARED) $(ARGS)

mutants: $(READY_MUTANTS)  ## Plant a defect at a time in the core and see it caught (ARGS="FILE ... --every 10" for less)
	$(RUN) -m tests.mutants $(ARGS)

test-isa: $(READY)  ## Every promise of equal bits under every instruction set of this CPU, as a table
	$(RUN) -m parity_tests.instruction_sets --jobs 2 $(ARGS)

test-versions: $(READY_DEV)  ## Run the tests on each supported Python and JAX (ARGS="-s floor -- --cases 2" for a part)
	$(RUN) -m nox $(ARGS)

test-types: $(READY_DEV)  ## Run the tests with every annotation checked at run time
	$(RUN) -m pytest $(SHARED) -p tests.types_plugin -m "not slow" tests parity_tests $(ARGS)

parity: $(READY)  ## Compare JAX and PyTorch, and write a report (ARGS="--quick" for less)
	$(RUN) -m parity_tests $(ARGS)

exactness: $(READY)  ## How far each optimizer is from PyTorch's after each of 1,000 steps (ARGS="--quick" for 100)
	$(RUN) -m parity_tests.exactness $(ARGS)

bench: $(READY_DEV)  ## Race dropout against the libraries' own: tables, times, pictures (ARGS="--quick" to try)
	$(RUN) -m benchmarks.dropout_speed --dtypes float32 bfloat16 $(ARGS)
	$(RUN) -m benchmarks.shared_masks $(ARGS)
	$(RUN) -m benchmarks.overhead $(ARGS)
	$(RUN) -m benchmarks.transformer_step $(ARGS)
	$(RUN) -m benchmarks.torch_speed $(ARGS)

bench-attention: $(READY_DEV)  ## What dropout costs in attention, in time and memory (ARGS="--quick" to try)
	$(RUN) -m benchmarks.attention $(ARGS)

bench-optimizers: $(READY_DEV)  ## What each optimizer costs beside optax's, at 100 M parameters (ARGS="--quick" to try)
	$(RUN) -m benchmarks.optimizers $(ARGS)

bench-models: $(READY_DEV)  ## What the compilers for TPU and GPU expect, where they are installed
	$(RUN) -m benchmarks.tpu_model $(ARGS)
	$(RUN) -m benchmarks.gpu_model $(ARGS)

lint: $(READY_DEV)  ## Check style and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/basedpyright

format: $(READY_DEV)  ## Let ruff format and fix
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

lock: $(READY_DEV) $(READY_MUTANTS)  ## Write the installed versions to constraints.txt
	@{ sed -n '/^#/p' constraints.txt; \
	   $(RUN) -m pip freeze --exclude-editable | sed 's/+cpu$$//'; } > constraints.new
	@mv constraints.new constraints.txt

clean:  ## Remove .venv and everything that was built
	rm -rf $(VENV) build dist outputs .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(RUN):
	@$(PYTHON) -c 'import sys; sys.exit("regjax needs Python 3.11 or newer; this is %d.%d. Name another one: make PYTHON=python3.11" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

$(READY): pyproject.toml constraints.txt | $(RUN)
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[examples,test]'
	@touch $@

$(READY_DEV): pyproject.toml constraints.txt | $(READY)
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

$(READY_MUTANTS): pyproject.toml constraints.txt | $(READY)
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[mutants]'
	@touch $@
