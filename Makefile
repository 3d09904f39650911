# `make reproduce` and `make test` work on a fresh machine: each makes .venv, installs requirements.lock, and runs.
PYTHON ?= python3
PRESET ?= smoke
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.installed
# the inner loops of attention and of what is asked about it, compiled once here rather than in the first run
COMPILE := import torch; from msnlan.attention.operator import patch_attention as f; from msnlan.correlation.strips import Strips, largest; \
           x = torch.rand(1, 4, 24, 24, requires_grad=True); \
           [f(x, x, x, backend=b, weighting=w).sum().backward() for b, w in (('whole', 'softmax'), ('whole', 'sparsemax'), ('numba', 'softmax'))]; \
           largest(Strips(x.detach(), [x.detach()], 3, 1., True), 1)

.PHONY: help setup reproduce test test-all browser lab bench gpu readme notebooks book lock clean

help:            ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

$(READY): requirements.lock settings.ini setup.py
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v >= (3, 11) else f"Python 3.11 or newer is needed, found {v[0]}.{v[1]}: make PYTHON=python3.11")'
	@echo "Installing into $(VENV) (about two minutes, 2 GB) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -r requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@$(BIN)/python -m compileall -q -j 0 $(VENV)/lib >/dev/null || true   # here once, rather than in each process where PYTHONDONTWRITEBYTECODE is set
	@$(BIN)/python -c "$(COMPILE)"
	@touch $(READY)

setup: $(READY)  ## the environment in .venv, nothing else

reproduce: $(READY)  ## train, evaluate, draw, tabulate: PRESET=smoke (default), benchmarks, ...
	@$(BIN)/msnlan reproduce $(PRESET)

test: $(READY)  ## everything that is checked on each change
	@$(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile --durations=12 tests

test-all: $(READY) browser  ## the long checks too
	@$(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile --durations=25 --all tests

browser:         ## Debian's Chromium for the browser tests (as root); without it they are skipped
	@command -v chromium >/dev/null || { test "$$(id -u)" = 0 && command -v apt-get >/dev/null && apt-get update -qq && \
	   apt-get install -y -qq --no-install-recommends chromium; } || echo "No Chromium here: the browser tests are skipped."

lab: $(READY)  ## JupyterLab in the same environment
	@$(BIN)/jupyter lab nbs

bench: $(READY)  ## time and memory of the attention operator
	@$(BIN)/msnlan bench

gpu:             ## all that a GPU has to show, in ten minutes and resumable; the environment as it is, no network
	@$(if $(wildcard $(READY)),$(BIN)/python,$(PYTHON)) -m msnlan.benchmarks.gpu

readme: $(READY)  ## write README.md from nbs/index.ipynb, and the page over all reports
	@$(BIN)/python tests/readme.py --write
	@$(BIN)/python -c "from pathlib import Path; from msnlan.reproduce.overview import write_overview; write_overview(Path('reports'))"

notebooks: $(READY)  ## run the reading notebooks and keep their pictures and tables
	@$(BIN)/python nbs/_book/outputs.py

book: $(READY)   ## notebooks and API as pages to read offline: _docs/book/contents.html
	@$(BIN)/python nbs/_book/build.py

lock: $(READY)  ## write requirements.lock from the environment as it is
	@{ echo "# Exact versions of a working environment (Python 3.11, Linux); made by 'make lock', installed by 'make reproduce' and 'make test'."; \
	   $(BIN)/python -m pip freeze --exclude-editable --disable-pip-version-check | sed 's/+cpu//; s/ @ file:.*//; s/^triton==.*/triton>=3.6,<4; platform_system == "Linux"/'; } > requirements.lock

clean:           ## what runs left behind; the environment stays
	@rm -rf runs .pytest_cache .hypothesis
