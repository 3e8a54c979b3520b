PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BASE := $(VENV)/.base
STAMP := $(VENV)/.installed
# -n 2 pays for itself only where there are two cores to share.
WORKERS ?= 2

.PHONY: demo test test-all check format clean docs

# The demo needs none of the tools and extras of development, which take as long again to install.
$(BASE): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	touch $(BASE)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $(BASE) $(STAMP)

demo: $(BASE)  ## install, run the quickstart study, print the verdict and the report's path
	$(BIN)/maquette compare quickstart

test: $(STAMP)  ## the test suite, CPU only, no network
	$(BIN)/python -m pytest -n $(WORKERS) -m 'not exhaustive'

test-all: $(STAMP)  ## with the tests that take half a minute each for a rarer case
	$(BIN)/python -m pytest -n $(WORKERS)

check: $(STAMP)  ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(STAMP)  ## the pages of the methods, from their cards, studies and results
	$(BIN)/python -m maquette.cards docs/methods results

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache
