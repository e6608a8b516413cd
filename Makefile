# Every target makes its own virtual environment; nothing else is needed than Python >= 3.11.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed

.PHONY: help demo test test-all bench bench-gpu docs docs-check docs-run lint format clean

help:
	@echo "make demo    train a tiny model on made-up preferences and compare modes (about two minutes)"
	@echo "make test    the tests"
	@echo "make test-all    the tests with the full matrices of settings"
	@echo "make bench   speed-ups beside their ideals on the CPU, and what planning costs; BENCH_ARGS=--quick for a few minutes"
	@echo "make bench-gpu   kernels, models, steps, speed on a GPU with the Python at hand, under eight minutes; DRY_RUN=1 on any machine"
	@echo "make docs    the documentation site in build/site; warnings are errors"
	@echo "make docs-run    every code block of the site, the long ones too"
	@echo "make docs-check    every page, link and picture of build/site in headless Chromium"
	@echo "make lint    format check, lint, types, import layers, the documentation site"

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
	$(BIN)/python benchmarks/planning.py $(filter --quick --dry-run,$(BENCH_ARGS))

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
	$(MAKE) docs

# Reads the source and imports nothing of it. The variable keeps the theme's advertisement out.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

docs-run: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 -m "full or not full" tests/docs

# Needs Chromium: CHROMIUM=path, where it is not on the PATH.
docs-check: docs
	$(BIN)/python -m pip install --quiet --constraint constraints.txt playwright
	$(BIN)/python docs/hooks/open_pages.py $(if $(CHROMIUM),--chromium $(CHROMIUM))

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist *.egg-info outputs
