# Every target makes its own virtual environment; nothing else is needed than Python >= 3.11.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed

.PHONY: help demo test test-all bench bench-gpu lint format clean

help:
	@echo "make demo    train a tiny model on made-up preferences and compare modes (about two minutes)"
	@echo "make test    the tests"
	@echo "make test-all    the tests with the full matrices of settings"
	@echo "make bench   speed-ups beside their ideals on the CPU; BENCH_ARGS=--quick for a few minutes"
	@echo "make bench-gpu   kernels, models, steps, speed on a GPU with the Python at hand, under eight minutes; DRY_RUN=1 on any machine"
	@echo "make lint    format check, lint, types, import layers"

# torch first and pinned: an open range would pull the CUDA build on a machine without GPU.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,peft,plot,trl]"
	touch $(READY)

# One thread: tensors this small gain nothing from more.
demo: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/kvpref demo --output outputs/demo

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2

# The last -m counts, so this one runs what `make test` leaves out, too.
test-all: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 -m "full or not full"

bench: $(READY)
	$(BIN)/python benchmarks/sweeps.py $(BENCH_ARGS)

# About ten minutes.
census: $(READY)
	$(BIN)/python benchmarks/census.py --json benchmarks/results/census.json
	$(BIN)/python benchmarks/census.py --task image --json benchmarks/results/census_images.json
	$(BIN)/python benchmarks/census_page.py

# The Python at hand: a GPU machine brings its own torch, and may reach no package index.
bench-gpu: $(if $(DRY_RUN),$(READY))
	$(if $(DRY_RUN),$(BIN)/python,$(PYTHON)) benchmarks/gpu.py $(if $(DRY_RUN),--dry-run)

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
