# The entry points a newcomer needs: demo, test, lint, bench. Each sets up .venv by itself.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo demo-head test lint bench clean
.DEFAULT_GOAL := demo

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[cpu]"
	touch $@

$(VENV)/.dev: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[cpu,torch]" --group dev
	touch $@

demo: $(STAMP)  ## optimize the MNIST CNN of models/ and show what it gained
	$(BIN)/python models/demo.py

demo-head: $(STAMP)  ## give a classifier of the digits 0 to 4 a head for 5 to 9
	$(BIN)/python models/demo_head.py

lint: $(VENV)/.dev  ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p onnxopt

test: lint  ## lint, then the whole test suite
	$(BIN)/python -m pytest -n 2

bench: $(VENV)/.dev  ## measure again; BENCH="--quick" or names of parts for less
	$(BIN)/python benchmarks/run.py $(BENCH)

clean:
	rm -rf $(VENV) build dist out *.egg-info
