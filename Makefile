# Every target makes its own environment in .venv; nothing needs to be installed by hand but Python >= 3.11.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# `make docs GALLERY=0` does not run the tutorials.
GALLERY ?= 1

.PHONY: demo test env lint bench bench-gpu docs

demo: $(STAMP)
	$(BIN)/python tutorials/01_transfer_regression.py

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist worksteal

env: $(STAMP)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/lint-imports
	$(BIN)/pyright

bench: $(STAMP)
	$(BIN)/python -m benchmarks.run

bench-gpu: $(STAMP)
	$(BIN)/python -m benchmarks.gpu

docs: $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	$(BIN)/python -m sphinx -W --keep-going -b html -D plot_gallery=$(GALLERY) docs docs/_build/html

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "gpntk needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $(STAMP)
