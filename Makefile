# make paper   sets everything up and regenerates the paper (PROFILE=quick, the default, or full)
# make test    sets everything up, lints, and runs all tests but the slow ones (make test-all: those too)
#              JOBS: one-thread notebooks side by side, default as many as there are cores
PROFILE ?= quick
PYTHON  ?= python3
JOBS    ?= all

VENV    := .venv
ifeq ($(OS),Windows_NT)
BIN     := $(VENV)/Scripts
else
BIN     := $(VENV)/bin
endif
READY   := $(VENV)/.ready
EXTRAS  := notebooks,batch,export,imagenet,dev
export PATH := $(abspath $(BIN)):$(PATH)
export MPLBACKEND := Agg
export PYTHONUNBUFFERED := 1

.PHONY: help setup paper reference test test-all smoke lab share lint readme
.DEFAULT_GOAL := help

help: ## what each word does
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 11

setup: $(READY) ## the environment in .venv (done by every other word when needed)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"Python 3.11 or newer is needed, $(PYTHON) is {v.major}.{v.minor}: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

paper: $(READY) ## regenerate every table, figure and rendered notebook (PROFILE=quick or full)
	$(BIN)/snakemake --workflow-profile profiles/local --cores $(JOBS) --config profile=$(PROFILE)

reference: $(READY) ## the next unfinished runs of the reference, side by side, until all are done or it is stopped
	mkdir -p data/runs && if [ -d data/runs_kept ]; then cp -Rn data/runs_kept/. data/runs/; fi
	$(BIN)/snakemake --workflow-profile profiles/local --cores $(JOBS) --config profile=full --keep-going reference

test: $(READY) ## lint, types and all tests but the slow ones, in two processes; the ten slowest are printed
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow" --durations=10

test-all: $(READY) ## the slow tests too: whole test sets, every network, long fuzzing
	$(BIN)/python -m pytest -n 2 --dist worksteal --durations=10

smoke: $(READY) ## every notebook on tiny slices, written to a temporary folder
	out=$$(mktemp -d) && HQ_OUT=$$out $(BIN)/snakemake --workflow-profile profiles/local --cores $(JOBS) --forceall --config profile=smoke && rm -rf $$out

lab: $(READY) ## JupyterLab on the notebooks
	$(BIN)/jupyter lab notebooks/00_map.ipynb

share: $(READY) ## one folder of self-contained HTML pages with an index, ready to send (PROFILE=quick or full)
	$(BIN)/python -m hq_lib.results.share $(PROFILE)

lint: $(READY) ## ruff on library, tests and notebooks; pyright on the library
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright

readme: $(READY) ## write the numbers of README.md and docs/ from the committed rows
	$(BIN)/python -m hq_lib.studies.overview
