# Everything here sets itself up: a fresh clone needs Python 3.11 or later and make, nothing else.
PYTHON ?= python3
TORCH_INDEX ?=
DEMO_EPISODES ?= 40000
DEMO := build/demo
BIN := .venv/bin

.PHONY: help demo test test-all attack lint types layers docs bench clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  TORCH_INDEX=URL   package index to take torch from (a GPU build, say)"
	@echo "  PYTHON=python3.x  the Python that makes .venv"

.venv/installed: pyproject.toml constraints.txt
	@echo "== installing into .venv: a few minutes"
	$(PYTHON) -m venv .venv
	$(if $(TORCH_INDEX),$(BIN)/pip install --quiet -c constraints.txt --index-url $(TORCH_INDEX) torch)
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

demo: export DEMOTOOLS_DATA := $(DEMO)/data
demo: .venv/installed  ## record the bot, train on it, measure success: all under build/demo
	@echo "== 1. record the expert bot"
	test -d $(DEMO)/data/GoToLocal.zarr || $(BIN)/demotools generate GoToLocal --episodes $(DEMO_EPISODES)
	@echo "== 2. a small twin"
	$(BIN)/demotools shrink --episodes 1000
	$(BIN)/demotools list
	@echo "== 3. learn from the full store"
	$(BIN)/trainer run bc_small_cpu.toml -o $(DEMO)/run --overwrite
	@echo
	@echo "The learning curve is $(DEMO)/run/curve.png. Three commands to try next:"
	@echo "  $(BIN)/demotools info $(DEMO)/data/GoToLocal-small.zarr"
	@echo "  $(BIN)/trainer evaluate $(DEMO)/run/last.pt --policy bot"
	@echo "  $(BIN)/trainer recipes"

test: lint types layers  ## lint, types, import layers, doctests, tests
	$(BIN)/pytest

test-all: lint types layers  ## the same, the slow tests, and demotools on the newest and oldest versions
	$(BIN)/nox --session newer-python lower-bounds
	$(BIN)/pytest -m 'slow or not slow'

attack: .venv/installed  ## attack every promise for about an hour: kills, full disks, lies
	$(BIN)/python -m tests.attack

lint: .venv/installed  ## ruff: lint and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed  ## mypy, strict
	$(BIN)/mypy

layers: .venv/installed  ## the import layers (pyproject.toml)
	$(BIN)/lint-imports

docs: .venv/installed  ## the site of docs/, links checked, in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "the site is build/site/index.html; $(BIN)/mkdocs serve shows it with its search"

bench: .venv/installed  ## install what the benchmarks compare with
	$(BIN)/pip install --quiet -c constraints.txt -e '.[bench]'
	@echo "now: $(BIN)/python benchmarks/bench_rollouts.py (or another of benchmarks/)"

clean:  ## remove what make made: .venv and build
	rm -rf .venv build
