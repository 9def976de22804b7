# `make demo` and `make test` work from a bare clone: the first call makes .venv and fills it with the tested versions.
# With a Python you already have, and nothing installed: make test VENV= PYTHON=python
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
MARKERS ?= not slow and not gpu
PYTEST_ARGS ?=

ifeq ($(strip $(VENV)),)
PY := $(PYTHON)
INSTALLED :=
else
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
endif

.DEFAULT_GOAL := help
.PHONY: help install demo test lint format bench docs clean

help:  ## Show this list
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 10

install: $(INSTALLED)  ## Make .venv and install the package with everything the other targets need

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --disable-pip-version-check -q -e '.[math,peft,test,dev]' -c constraints.txt
	touch $@

demo: $(INSTALLED)  ## Train a tiny diffusion LM with SFT, then TraceRL; leaves runs/demo/
	$(PY) recipes/tracerl_math.py

test: $(INSTALLED)  ## Run the tests; slow ones too with MARKERS='not gpu'
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(JOBS) -m '$(MARKERS)' $(PYTEST_ARGS)

lint: $(INSTALLED)  ## Check style and formatting
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(INSTALLED)  ## Repair style and formatting
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: $(INSTALLED)  ## Run the benchmarks: decoding, then TraceRL steps
	OMP_NUM_THREADS=1 $(PY) benchmarks/decode.py
	OMP_NUM_THREADS=1 $(PY) benchmarks/train_step.py
	OMP_NUM_THREADS=1 $(PY) benchmarks/rounds_memory.py
	OMP_NUM_THREADS=1 $(PY) benchmarks/decode_full.py

docs: $(INSTALLED)  ## Build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

clean:  ## Remove what the other targets made, runs/ excepted
	rm -rf .venv build dist site *.egg-info .pytest_cache .ruff_cache
