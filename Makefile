# `make demo` and `make test` are the README's two commands; each makes .venv when there is none.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-real test-all check format lint types arrows clean

demo: .venv/ready
	$(BIN)/tta-serve demo

test: .venv/ready
	$(BIN)/pytest -n auto --maxprocesses 4 --dist loadfile -m "not real and not slow and not smoke"
	$(BIN)/pytest -m smoke tests/real

test-real: .venv/ready
	$(BIN)/pytest -m "real or slow"

test-all: test test-real

check: format lint types arrows

format: .venv/ready
	$(BIN)/ruff format --check .

lint: .venv/ready
	$(BIN)/ruff check .

types: .venv/ready
	$(BIN)/mypy

arrows: .venv/ready
	$(BIN)/lint-imports

.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "tta-serve needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group dev --group load --editable .
	touch $@

clean:
	rm -rf .venv
