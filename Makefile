# `make` alone lists the targets. Each makes .venv on first use, and again when pyproject.toml or constraints.txt change.

PYTHON    ?= python3
DEMO_ARGS ?=
PICTURES_ARGS ?=
STARTER_ARGS ?=
TEST_ARGS ?= -n 2 --dist loadfile

VENV  := .venv
BIN   := $(VENV)/bin
READY := $(VENV)/.ready
STOCK := .venv-stock/.ready

.DEFAULT_GOAL := help
.PHONY: help demo pictures starter test check clean

help: ## list the targets
	@echo "make TARGET [PYTHON=python3.12]"
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(READY) ## train, evaluate and search the built-in scenes; writes runs/demo/report.html (DEMO_ARGS="--steps 100")
	$(BIN)/muco demo --output runs/demo $(DEMO_ARGS)

pictures: $(READY) ## search 1,541 real pictures (Debian, Ubuntu); writes runs/pictures/found.html and serves the search
	$(BIN)/python examples/pictures/pictures.py $(PICTURES_ARGS)

starter: $(READY) ## train the starter again from nothing (hours); writes runs/starter (STARTER_ARGS="--set trainer.max_steps=100")
	$(BIN)/python examples/pictures/starter.py $(STARTER_ARGS)

test: $(READY) $(STOCK) ## the whole test suite, slow tests too, in two processes (TEST_ARGS="-m 'not slow'": the quick ones, in one)
	$(BIN)/python -m pytest $(TEST_ARGS)

check: $(READY) ## lint, formatting, names across files, and that the installed packages fit together
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pip check

clean: ## remove caches and build products; .venv and runs/ stay
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +

# The stamp is written last: an interrupted installation is done again.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "MuCo needs Python 3.11 or newer, and '$(PYTHON)' is not: try 'make PYTHON=python3.12 ...'." >&2; exit 1; }
	@echo "Installing into $(VENV); the first time this takes some minutes."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

# A second environment with torchvision and without muco, in which the stock library must load what we save.
$(STOCK): $(READY) tests/support/make_stock_environment.sh
	@bash tests/support/make_stock_environment.sh $(VENV) .venv-stock
	@touch $@
