# Everything runs from .venv; the first target that needs it builds it. Another Python or other versions have an
# environment of their own: PYTHON=python3.12 runs from .venv-python3.12, PINS=requirements/oldest.txt from .venv-oldest.
PYTHON ?= python3
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
PINS ?= requirements/python$(VERSION).txt
ifeq ($(PYTHON) $(PINS),python3 requirements/python$(VERSION).txt)
VENV := .venv
else
VENV := .venv-$(basename $(notdir $(PINS)))
endif
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ARGS ?=

.PHONY: help same-python install compress test test-slow older test-bridge test-nemo fakecuda lint format docs clean
.DEFAULT_GOAL := help

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

# The pins go first, so that the torch pip is set up for (CPU or CUDA) is the one everything else is resolved against.
$(STAMP): setup.py $(PINS) | same-python
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -r $(PINS)
	$(BIN)/pip install -c $(PINS) -e '.[dev]'
	touch $@

# Two minor versions of Python in one environment would each see half of its packages.
same-python:
	@[ ! -e $(BIN)/python ] || [ -e $(BIN)/python$(VERSION) ] || { \
		echo "$(VENV) is not of Python $(VERSION) ($(PYTHON)): remove it, or give PYTHON= the one that built it"; exit 1; }

install: $(STAMP)  ## Build .venv

EXPERIMENT := $(or $(patsubst experiment=%,%,$(filter experiment=%,$(ARGS))),smollm2_135m_cpu)

compress: $(STAMP)  ## Fetch, prune and distil SmolLM2-135M on the CPU, or ARGS="experiment=NAME"; ARGS takes overrides too
	$(BIN)/python -m recipes.fetch experiment=$(EXPERIMENT)
	$(BIN)/python -m recipes.compress experiment=$(EXPERIMENT) $(filter-out experiment=%,$(ARGS))

# Files of tests run side by side; much of the time goes into processes that start, one thread each.
test: $(STAMP)  ## Run the tests that are not slow
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n auto --maxprocesses=4 --dist=loadfile -m "not slow" $(ARGS)

test-slow: $(STAMP)  ## Run the slow tests: real Slurm, every case of the plan, compilers
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n auto --maxprocesses=4 --dist=loadfile -m slow $(ARGS)

# transformers 4 beside .venv's torch, as vLLM and others still have it: exported folders load there too.
OLDER := .venv-transformers4
$(OLDER)/bin/python: $(STAMP)
	$(PYTHON) -m venv $(OLDER)
	$(OLDER)/bin/pip install -q --no-deps transformers==4.57.6 huggingface-hub==0.36.0 tokenizers==0.22.1 hf-xet
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
		"$$($(OLDER)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/beside.pth"

older: $(OLDER)/bin/python  ## Build an environment with transformers 4, in which tests load exported folders

# Megatron-Bridge beside .venv's torch and Megatron-Core: it loads the checkpoints that are written for it.
BRIDGE := .venv-bridge
$(BRIDGE)/bin/python: $(STAMP) requirements/bridge.txt
	$(PYTHON) -m venv $(BRIDGE)
	$(BRIDGE)/bin/pip install -q --no-deps -r requirements/bridge.txt
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
		"$$($(BRIDGE)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/beside.pth"
	touch $@

test-bridge: $(BRIDGE)/bin/python  ## Load exported checkpoints in Megatron-Bridge itself, and its own here
	OMP_NUM_THREADS=1 $(BIN)/pytest -q tests/bridge $(ARGS)

# NeMo 2, which cannot share .venv: with it the tests let it load and export what we write, and read what it writes.
NEMO2 := .venv-nemo2
$(NEMO2)/.installed: requirements/nemo2.txt
	$(PYTHON) -m venv $(NEMO2)
	$(NEMO2)/bin/pip install -q -r requirements/nemo2.txt
	touch $@

test-nemo: $(STAMP) $(NEMO2)/.installed  ## Build an environment with NeMo 2, and compare checkpoints with it
	OMP_NUM_THREADS=1 $(BIN)/pytest -q tests/nemo $(ARGS)

# A torch with CUDA (3 GB) that sees devices which compute nothing: tests/fakecuda/device.py says what they count.
FAKECUDA ?= .fakecuda
FAKECUDA_TORCH ?= 2.11.0
$(FAKECUDA)/python: $(STAMP) tests/fakecuda/build.sh tests/fakecuda/runtime.c tests/fakecuda/driver.c
	bash tests/fakecuda/build.sh $(FAKECUDA) $(VENV) $(FAKECUDA_TORCH)

fakecuda: $(FAKECUDA)/python  ## Run the package on CUDA devices that are not there: device errors, waits, kernels
	OMP_NUM_THREADS=1 $(FAKECUDA)/python -m pytest -q tests/fakecuda $(ARGS)

lint: $(STAMP)  ## Check style, format, types and the container file
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint Dockerfile

format: $(STAMP)  ## Rewrite the code in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)  ## Remake docs/configuration.md and check the links of all pages
	$(BIN)/python -m compactlm_nemo.workflow.manual > docs/configuration.md
	@fail=0; for page in *.md docs/*.md slurm/*.md bench/*.md; do \
		[ -e "$$page" ] || continue; \
		for link in $$(grep -oE '\]\([^)# ]+' "$$page" | sed 's/^](//' | grep -vE '^[a-z]+:'); do \
			[ -e "$$(dirname "$$page")/$$link" ] || { echo "$$page: dead link $$link"; fail=1; }; \
		done; \
	done; exit $$fail

clean:  ## Remove environments and caches; runs/ stays
	rm -rf .venv .venv-* $(FAKECUDA) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
