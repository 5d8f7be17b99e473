# `make help` lists the targets. Only Python 3.11+ and make are needed; everything else is
# installed, in exactly the versions of requirements.lock, into .venv.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
JOBS ?= $(shell getconf _NPROCESSORS_ONLN)
PORT ?= 8000

# One thread per kernel: notebooks run side by side, and two threads in each would only queue.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM = false
export PYTHONHASHSEED = 0
export PYDEVD_DISABLE_FILE_VALIDATION = 1
# The notebooks need Jupyter's own figure backend.
unexport MPLBACKEND

files = $(shell find $(1) -type f -not -path '*/__pycache__/*' -not -name '.*' 2>/dev/null)
NOTEBOOKS := $(sort $(wildcard notebooks/[0-9]*.ipynb))
PACKAGE := $(call files,compresskit)
PAGES := _config.yml _toc.yml $(NOTEBOOKS) $(call files,book)

.PHONY: help book serve lab test check notebooks models results bench clean distclean

help: ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

book: _build/.book ## build the book, run every notebook, print the first page's path
	@echo "The book is built. Its first page: $(CURDIR)/_build/html/index.html"

serve: book ## build the book and serve it on http://localhost:8000 (PORT=...)
	$(BIN)/python -m http.server --bind 127.0.0.1 --directory _build/html $(PORT)

lab: $(STAMP) ## open the notebooks in JupyterLab
	$(BIN)/jupyter lab notebooks

PYTEST := $(BIN)/python -m pytest

test: $(STAMP) lint book ## everything: lint, unit tests, notebooks, structure, the built pages
	$(PYTEST) tests compresskit notebooks -n $(JOBS) --dist loadfile --max-worker-restart=0 \
	  -p tests.notebook_cost --nbval --nbval-current-env \
	  --nbval-sanitize-with tests/nbval_sanitize.cfg --nbval-cell-timeout 300 \
	  --cov --cov-report=term

check: $(STAMP) lint ## lint and the fast tests, in under a minute
	$(PYTEST) -n $(JOBS) -m "not slow and not site"

.PHONY: lint
lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

notebooks: $(STAMP) ## run every notebook again and store its text outputs
	$(BIN)/python book/_tools/execute.py --jobs $(JOBS) --inplace $(NOTEBOOKS)

models: $(STAMP) ## train the book's small models again
	$(BIN)/python -m compresskit.recipes.train all

results: $(STAMP) ## run the long experiments again, into book/results
	$(BIN)/python book/_tools/results.py

bench: $(STAMP) ## print the speed of the parts that must be fast
	@for file in tests/bench/bench_*.py; do $(BIN)/python "$$file"; done

clean: ## remove what was built
	rm -rf _build

distclean: clean ## and the environment
	rm -rf $(VENV)

# The stamp is the last thing written, so an interrupted installation is done again.
$(STAMP): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3"; exit 1; }
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install -q -c requirements.lock torch
	$(BIN)/python -m pip install -q --no-deps -r requirements.lock
	$(BIN)/python -m pip install -q --no-deps --no-build-isolation -e .
	@touch $@

# What the notebooks import and read. The cache of their outputs knows only their cells, so it
# is dropped when any of this changes.
_build/.library: $(PACKAGE) $(call files,book/results) requirements.lock
	@mkdir -p _build
	rm -rf _build/.jupyter_cache
	@touch $@

# Always from nothing: a page that was written with a warning must not pass the second time, and a
# page that was removed must go. The outputs come from the cache, so this takes seconds a chapter.
_build/.book: $(STAMP) _build/.library $(PAGES)
	@rm -rf $@ _build/html _build/.doctrees
	$(BIN)/python book/_tools/execute.py --jobs $(JOBS) --cache _build/.jupyter_cache $(NOTEBOOKS) book/index.md
	$(BIN)/jupyter-book build . -W -n --keep-going --all || { rm -rf _build/html _build/.doctrees; exit 1; }
	@touch $@
