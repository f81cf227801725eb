# tinyft.  `make` alone prints this help.  Every target makes what it needs; none needs the network once installed.
SHELL  := /bin/bash
HERE   := $(patsubst %/,%,$(dir $(abspath $(lastword $(MAKEFILE_LIST)))))
VENV   ?= $(HERE)/.venv
PYTHON ?= python3
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.installed
CUPY   ?= $(HERE)/.venv-cupy
GPU_PY ?= $(PY)
PIP_INSTALL := "$(PY)" -m pip install -q --disable-pip-version-check
TOOLS  := "pytest>=8" "pytest-xdist>=3.5" "ruff>=0.6"
ARGS   ?=
TRAINING := $(addprefix tests/test_,$(addsuffix .py,kernels threads train models methods optim attention packed_kernels))
EMULATED := tests/emulated $(addprefix tests/test_,$(addsuffix .py,ops attention nn optim models llama tensor strict decode adapters formats precision cuda packed_kernels doctor))
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
.PHONY: help install install-peers install-site run real real-assets test test-numpy selftest test-strict test-emulated test-gpu bench-gpu test-peers lessons site audit bench claims base lint clean

help:  ## this help
	@echo "tinyft: fine-tuning of transformers, from scratch"
	@grep -hE '^[a-z-]+:.*## ' "$(HERE)/Makefile" | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 22

$(STAMP): $(HERE)/pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "tinyft needs Python 3.10 or newer; PYTHON=python3.x make ... chooses one")'
	@test -x "$(PY)" || $(PYTHON) -m venv "$(VENV)"
	@echo "installing tinyft into $(VENV) ..."
	@cd "$(HERE)" && $(PIP_INSTALL) --only-binary=numba,llvmlite -e ".[lessons,fast]" $(TOOLS) 2>/dev/null || \
		{ echo "without compiled kernels: pip finds no Numba for this Python and this machine"; $(PIP_INSTALL) -e ".[lessons]" $(TOOLS); }
	@touch "$@"

install: $(STAMP)  ## make the virtual environment .venv and install tinyft in it
	@echo "tinyft is installed. Next:  source .venv/bin/activate   then   tinyft lesson autograd   (or make run)"

run: $(STAMP)  ## the main job: fine-tune the shipped base on a real task, one table, one figure (under 5 minutes)
	@cd "$(HERE)" && "$(VENV)/bin/tinyft" compare $(ARGS)

real: $(STAMP)  ## a real language model learns a task that it cannot do, with LoRA: a table, a figure, answers (under 15 minutes)
	@test -e "$(HERE)/work/real/SmolLM2-135M-Instruct.Q4_1.gguf" || $(MAKE) real-assets
	@cd "$(HERE)" && "$(PY)" -m tinyft.real $(ARGS)

test: $(STAMP)  ## the tests, in two processes
	@cd "$(HERE)" && "$(PY)" -m pytest tests --ignore=tests/peers -n 2 --dist loadfile $(ARGS)

test-numpy: $(STAMP)  ## the tests that train, on the kernels for NumPy alone, as without Numba
	@cd "$(HERE)" && TINYFT_KERNELS=numpy "$(PY)" -m pytest $(TRAINING) $(ARGS)

selftest: $(STAMP)  ## the exercises: the library passes them, every wrong answer is caught and explained
	@cd "$(HERE)" && "$(VENV)/bin/tinyft" selftest $(ARGS)

test-strict: $(STAMP)  ## the same tests on the strict double of CuPy: what CuPy lacks does not get in
	@cd "$(HERE)" && TINYFT_BACKEND=strict "$(PY)" -m pytest tests --ignore=tests/peers $(ARGS)

$(CUPY)/.installed: $(HERE)/pyproject.toml $(HERE)/tests/emulated/requirements.txt
	@test -x "$(CUPY)/bin/python" || $(PYTHON) -m venv "$(CUPY)"
	@echo "installing tinyft and CuPy into $(CUPY) ..."
	@cd "$(HERE)" && "$(CUPY)/bin/python" -m pip install -q --disable-pip-version-check -e . -r tests/emulated/requirements.txt
	@touch "$@"

test-emulated: $(CUPY)/.installed  ## real CuPy without a GPU, and the tests that matter most on it (wants g++)
	@cd "$(HERE)" && TINYFT_BACKEND=emulated "$(CUPY)/bin/python" -m pytest $(EMULATED) $(ARGS)

# On a device: in .venv, after .venv/bin/pip install -e ".[gpu13]" (or gpu12); or with GPU_PY=python3, whatever Python has CuPy already.
test-gpu bench-gpu: $(if $(filter $(PY),$(GPU_PY)),$(STAMP))

test-gpu:  ## the whole suite on CuPy; fails where there is no device, and names what it skips
	@cd "$(HERE)" && PYTHONPATH="$(HERE)" TINYFT_BACKEND=cupy "$(GPU_PY)" -m pytest tests --ignore=tests/peers -rs $(ARGS)

bench-gpu:  ## tinyft, CuPy and PyTorch on a device, in under ten minutes: tests/benchmarks/results/gpu.md
	@cd "$(HERE)" && PYTHONPATH="$(HERE)" "$(GPU_PY)" tests/benchmarks/gpu.py $(ARGS)

install-peers: $(STAMP)
	@"$(PY)" -c 'import torch' 2>/dev/null || "$(PY)" -m pip install -q --disable-pip-version-check "torch==2.13.0"
	@cd "$(HERE)" && "$(PY)" -c 'import peft, transformers, adapters, gguf, bitsandbytes, sacrebleu' 2>/dev/null || "$(PY)" -m pip install -q --disable-pip-version-check -e "$(HERE)[peers]"

test-peers: install-peers  ## against PyTorch, transformers, PEFT and adapters (installs them)
	@cd "$(HERE)" && HF_HUB_OFFLINE=1 "$(PY)" -m pytest tests/peers $(ARGS)

real-assets: $(STAMP)  ## fetch two real models (180 MB) into work/real, for tests and demonstrations; needs the network once
	@cd "$(HERE)" && "$(PY)" tests/real_assets.py $(ARGS)

lessons: $(STAMP)  ## run every lesson: notebooks with results, and figures, in work/lessons (TINYFT_FAST=1: shorter)
	@cd "$(HERE)" && "$(VENV)/bin/tinyft" lesson --all $(ARGS)

install-site: $(STAMP)
	@"$(PY)" -c 'import furo, myst_nb, sphinx_copybutton' 2>/dev/null || "$(PY)" -m pip install -q --disable-pip-version-check -e "$(HERE)[site]"

site: install-site  ## the book, in work/site: lessons with their results, exercises, annotated sources (installs Sphinx)
	@cd "$(HERE)" && "$(PY)" -m tinyft.learn.book $(ARGS)

audit: $(STAMP)  ## change the library's own formulas, one at a time: the tests must notice
	@cd "$(HERE)" && "$(PY)" tests/audit.py $(ARGS)

bench: $(STAMP)  ## beside PyTorch and its libraries on this CPU: tests/benchmarks/results/cpu.md (installs them; about an hour)
	@"$(PY)" -c 'import torch' 2>/dev/null || "$(PY)" -m pip install -q --disable-pip-version-check "torch==2.13.0"
	@cd "$(HERE)" && "$(PY)" -c 'import peft, jax, autograd, tinygrad' 2>/dev/null || "$(PY)" -m pip install -q --disable-pip-version-check -e "$(HERE)[peers]" jax autograd tinygrad
	@cd "$(HERE)" && "$(PY)" tests/benchmarks/bench.py $(ARGS)

claims: $(STAMP)  ## measure the numbers that the source documents claim: tests/benchmarks/results/claims.md
	@cd "$(HERE)" && PYTHONPATH="$(HERE):$(HERE)/tests/benchmarks" "$(PY)" -m claims $(ARGS)

base: $(STAMP)  ## train the shipped base models from scratch (resumable)
	@cd "$(HERE)" && "$(PY)" -m tinyft.pretrain $(ARGS)

lint: $(STAMP)  ## ruff
	@cd "$(HERE)" && "$(PY)" -m ruff check tinyft tests lessons

clean:  ## remove what was built; the virtual environment and work/ stay
	@cd "$(HERE)" && rm -rf build dist .pytest_cache .hypothesis .ruff_cache *.egg-info && find . -name __pycache__ -not -path './.venv*/*' -exec rm -rf {} +
