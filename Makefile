# `make demo` and `make test` require Python 3.11 or newer with pip, and make. Each creates .venv on its first
# run, and updates it after a change of pyproject.toml or constraints.txt.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
READY_DEV := $(VENV)/.ready-dev
READY_MUTANTS := $(VENV)/.ready-mutants
READY_DOCS := $(VENV)/.ready-docs
READY_BROWSER := $(VENV)/.ready-browser
READY_DIST := $(VENV)/.ready-dist
ARGS ?=
# Tests spend most time in compilation, which uses one core: several processes share them.
SHARED := --numprocesses auto --maxprocesses 8 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help demo figures test test-all test-isa test-versions test-types test-docs test-zoo mutants parity exactness bench bench-attention bench-optimizers bench-models bench-device bench-scale compare docs docs-serve dist lint format lock clean

help:  ## Show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 26

demo: $(READY)  ## Show overfitting and its remedies, in JAX and in PyTorch (ARGS="--help" for options)
	$(RUN) -m examples.overfit $(ARGS)

figures: $(READY)  ## Write the pictures and tables of the examples in README
	$(RUN) -m examples.overfit --out docs/overfit
	$(RUN) -m examples.uncertainty --out docs/uncertainty

test: $(READY)  ## Run the tests, without the slow ones
	$(RUN) -m pytest $(SHARED) -m "not slow" --sampled $(ARGS)

test-all: $(READY)  ## Run every test, with twenty times as many examples of each property
	PROPERTIES=thorough $(RUN) -m pytest $(SHARED) $(ARGS)

mutants: $(READY_MUTANTS)  ## Plant defects in the core, one at a time, and run its tests (ARGS="FILE ... --every 10" for fewer)
	$(RUN) -m tests.mutants $(ARGS)

test-isa: $(READY)  ## Check every promise of equal bits under every instruction set of this CPU
	$(RUN) -m parity_tests.instruction_sets --jobs 2 $(ARGS)

test-versions: $(READY_DEV)  ## Run the tests on each supported Python and JAX (ARGS="-s floor -- --cases 2" for fewer)
	$(RUN) -m nox $(ARGS)

test-types: $(READY_DEV)  ## Run the tests with every annotation checked at run time
	$(RUN) -m pytest $(SHARED) -p tests.types_plugin -m "not slow" tests parity_tests $(ARGS)

test-docs: $(READY_BROWSER)  ## Build the documentation and test it in Chromium or Chrome, which must be installed
	rm -rf docs/_build/html  # Sphinx keeps stale pages
	@$(MAKE) docs ARGS=
	$(RUN) -m pytest $(SHARED) tests/browser $(ARGS)

test-zoo: $(READY_DEV)  ## Test models of transformers, timm and torchvision, in an environment of their own (ARGS="-k bert" for fewer)
	$(RUN) -m nox -s zoo -- $(ARGS)

parity: $(READY)  ## Compare JAX and PyTorch, and write a report (ARGS="--quick" for a short run)
	$(RUN) -m parity_tests $(ARGS)

exactness: $(READY)  ## Measure the deviation of each optimizer from PyTorch's over 1,000 steps (ARGS="--quick" for 100)
	$(RUN) -m parity_tests.exactness $(ARGS)

bench: $(READY_DEV)  ## Compare the time of dropout with other libraries (ARGS="--quick" for a short run)
	$(RUN) -m benchmarks.dropout_speed --dtypes float32 bfloat16 $(ARGS)
	$(RUN) -m benchmarks.shared_masks $(ARGS)
	$(RUN) -m benchmarks.overhead $(ARGS)
	$(RUN) -m benchmarks.transformer_step $(ARGS)
	$(RUN) -m benchmarks.torch_speed $(ARGS)
	$(RUN) -m benchmarks.torch_random_speed $(ARGS)

bench-attention: $(READY_DEV)  ## Measure time and memory of attention with dropout (ARGS="--quick" for a short run)
	$(RUN) -m benchmarks.attention $(ARGS)

bench-optimizers: $(READY_DEV)  ## Compare each optimizer with Optax's, at 100 M parameters (ARGS="--quick" for a short run)
	$(RUN) -m benchmarks.optimizers $(ARGS)

bench-models: $(READY_DEV)  ## Estimate dropout on TPUs and GPUs with their compilers, if installed
	$(RUN) -m benchmarks.tpu_model $(ARGS)
	$(RUN) -m benchmarks.gpu_model $(ARGS)
	$(RUN) -m benchmarks.attention_kernel $(ARGS)
	$(RUN) -m benchmarks.gpu_kernels $(ARGS)

bench-device: $(READY_DEV)  ## Check results and times on a GPU or a TPU, for which JAX must be installed
	$(RUN) -m benchmarks.device_check $(ARGS)

bench-scale: $(READY_DEV)  ## Measure growth with elements, sites, leaves and devices (ARGS="--quick" for a short run)
	$(RUN) -m benchmarks.scale $(ARGS)

compare: $(READY_DEV)  ## Check each cell of the comparison with other libraries
	$(RUN) -m benchmarks.comparison $(ARGS)

docs: $(READY_DOCS)  ## Build the documentation into docs/_build/html; a warning is an error
	$(RUN) -m sphinx -W --keep-going -d docs/_build/doctrees docs docs/_build/html $(ARGS)

docs-serve: docs  ## Build the documentation and serve it at http://localhost:8000
	$(RUN) -m http.server --bind localhost --directory docs/_build/html 8000

dist: $(READY_DIST)  ## Build the distributions into dist, check them, and test them in clean environments
	$(RUN) -m distributions $(ARGS)

lint: $(READY_DEV)  ## Check style, types, workflows and issue forms
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/basedpyright
	$(VENV)/bin/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(VENV)/bin/check-jsonschema --builtin-schema vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(VENV)/bin/check-jsonschema --builtin-schema vendor.github-issue-forms $(filter-out %/config.yml,$(wildcard .github/ISSUE_TEMPLATE/*.yml))

format: $(READY_DEV)  ## Format the code and apply automatic fixes
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

lock: $(READY_DEV) $(READY_MUTANTS) $(READY_DOCS) $(READY_BROWSER) $(READY_DIST)  ## Write the installed versions to constraints.txt
	@{ sed -n '/^#/p' constraints.txt; \
	   $(RUN) -m pip freeze --exclude-editable | sed 's/+cpu$$//'; } > constraints.new
	@mv constraints.new constraints.txt

clean:  ## Remove .venv and all build products
	rm -rf $(VENV) build dist docs/_build outputs .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(RUN):
	@$(PYTHON) -c 'import sys; sys.exit("PYTHON must be Python 3.11 or newer; got %d.%d. Run: make PYTHON=python3.11" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

$(READY): pyproject.toml constraints.txt | $(RUN)
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[examples,test]'
	@touch $@

# An environment has the extra of its name.
$(READY_DEV) $(READY_MUTANTS) $(READY_DOCS) $(READY_BROWSER) $(READY_DIST): $(VENV)/.ready-%: pyproject.toml constraints.txt | $(READY)
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	@touch $@

$(READY_BROWSER): | $(READY_DOCS)
