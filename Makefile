# make quickstart   sets everything up, trains a memory around SmolLM2-135M on real texts, prints what it is worth
# make test         sets everything up, runs all tests
# make docs         the documentation as a site in out/site
# make bench        every table and plot for this machine, kept under benchmarks/results; make readme puts them into README and docs/measured.md
# make matrix       builds and tests with PyTorch 2.11 to 2.14; needs some 20 GB, ARGS="--help" tells how to need less
# Settings: PYTHON=python3.12, TORCH=torch==2.11.0 (any 2.11 or later), ARGS="--data my-texts" for quickstart.

PYTHON ?= python3
TORCH ?= torch==2.13.0
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
CXX_FILES = $(filter csrc/%,$(SOURCES)) tests/cuda_on_cpu.h
SOURCES := setup.py pyproject.toml longmem_kernels/_version.py $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu')

.PHONY: quickstart test lint format docs bench readme matrix clean

quickstart: $(VENV)/installed
	$(BIN)/longmem quickstart $(ARGS) && $(BIN)/longmem-bench quick --plots out/quickstart

test: $(VENV)/installed
	$(BIN)/python -m pytest tests $(ARGS)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

# The pages and the API reference, as a site in out/site; a broken link or an unknown name ends it. Needs no network.
docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

bench: $(VENV)/installed
	$(BIN)/longmem-bench all --keep benchmarks/results --plots out/bench --minutes 18 $(ARGS)

readme: $(VENV)/installed
	$(BIN)/longmem-bench readme

matrix:
	$(PYTHON) tools/torch_matrix.py $(ARGS)

# PyTorch first and pinned: what follows must not choose another one, and the extension is built against it.
$(VENV)/installed: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip "setuptools>=77" numpy
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[triton,model,bench,test,lint,docs]"
	$(BIN)/python -m longmem_kernels.info
	touch $@

clean:
	rm -rf $(VENV) build out *.egg-info longmem_kernels/_C.*so longmem_kernels/_build.json
