# SPDX-License-Identifier: Apache-2.0
# make demo    set up, build, and run the main job: decode the shipped model and compare unmasking rules
# make test    set up, build, and run every test
# make check   lint, types and the quick tests: two cases of each, the CUDA kernels on the host among them
# make bench   the benchmarks, each beside its baseline
# make gpu     on a machine with a GPU, with the torch that PYTHON has: build, prove, measure (under ten minutes);
#              with ARGS=--dry-run on any machine: whether that would work
#
# Setting up means: a virtual environment in .venv (or PYTHON=… for one of your own), torch, the tools, the build.
# Each step runs again only when what it depends on has changed.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
export PIP_DISABLE_PIP_VERSION_CHECK = 1
# Threads without work sleep: on a busy machine, those that spin take the processors from those that work.
export OMP_WAIT_POLICY ?= PASSIVE
# glibc keeps what a forward has freed for the next one: python/dlmkernels/host_memory.py.
export MALLOC_MMAP_THRESHOLD_ ?= 33554432
export MALLOC_TRIM_THRESHOLD_ ?= 536870912

# Pinned, and installed first: an unpinned torch, or one drawn in by another package, may bring gigabytes of CUDA
# libraries. TORCH= keeps whatever torch the interpreter has.
TORCH ?= torch==2.13.0
VENV := .venv
ifdef PYTHON
PY := $(PYTHON)
else
PY := $(VENV)/bin/python
endif
RUN := PATH="$(abspath $(dir $(PY))):$$PATH"
STAMPS := build/stamps
SOURCES := $(shell find csrc cmake -type f) CMakeLists.txt setup.py pyproject.toml

.PHONY: setup demo test check bench gpu format clean

setup: $(STAMPS)/package

$(VENV)/bin/python:
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, this is " + sys.version)'
	python3 -m venv $(VENV)

$(STAMPS)/torch: | $(PY)
	@mkdir -p $(STAMPS)
	$(if $(TORCH),$(PY) -m pip install -q "$(TORCH)")
	@touch $@

$(STAMPS)/tools: pyproject.toml constraints.txt $(STAMPS)/torch
	$(PY) -m pip install -q -c constraints.txt $(shell python3 scripts/requirements.py dev)
	@touch $@

$(STAMPS)/package: $(SOURCES) $(STAMPS)/tools
	$(RUN) $(PY) -m pip install -q --no-build-isolation --no-deps -e .
	@touch $@

demo: setup
	$(PY) -m dlmkernels demo $(ARGS)

# A worker a core, a thread a worker, a file at a time (native tests one by one: tests/conftest.py).
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest tests -n auto --dist loadfile --no-loadscope-reorder

test: setup
	$(RUN) $(PYTEST) $(ARGS)

check: setup
	$(RUN) $(PY) -m ruff check .
	$(RUN) $(PY) -m ruff format --check .
	$(RUN) $(PY) -m mypy
	$(RUN) $(PYTEST) -m "not slow" --sample 2 $(ARGS)

bench: setup
	$(RUN) $(PY) -m pytest benchmarks --benchmark-only $(ARGS)

gpu:
	$(RUN) $(or $(PYTHON),python3) scripts/gpu.py $(ARGS)

format: setup
	$(RUN) $(PY) -m ruff check --fix .
	$(RUN) $(PY) -m ruff format .
	$(RUN) clang-format -i $$(git ls-files 'csrc/*.h' 'csrc/*.cpp')

clean:
	rm -rf build dist python/*.egg-info python/dlmkernels/*.so
