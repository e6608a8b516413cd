# Every target makes its own virtual environment; nothing else is needed than Python >= 3.11.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed

.PHONY: help demo test lint format clean

help:
	@echo "make demo    train a tiny model on made-up preferences and compare modes (about two minutes)"
	@echo "make test    the tests"
	@echo "make lint    format check, lint, types, import layers"

# torch first and pinned: an open range would pull the CUDA build on a machine without GPU.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,peft,plot]"
	touch $(READY)

# One thread: tensors this small gain nothing from more.
demo: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/kvpref demo --output outputs/demo

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist *.egg-info outputs
