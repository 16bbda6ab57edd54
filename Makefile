# Two commands do everything from a bare machine with Python 3.11 or newer: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.set-up
TYPES := build/types/uniter

.PHONY: setup demo test test-slow pins lint types mapping docs clean
.DEFAULT_GOAL := setup

setup: $(STAMP)

# Made again only when what it depends on changed; `PYTHON=python3.12 make setup` chooses the interpreter.
$(STAMP): pyproject.toml constraints.txt extract/install.py
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}; name another with PYTHON=...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,demo]'
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m uniter.extract.install
	@touch $(STAMP)

# What is installed now becomes what `make setup` installs from now on. PyTorch itself says which of NVIDIA's packages it needs.
pins: setup
	{ sed '/^[^#]/,$$d' constraints.txt; $(BIN)/python -m pip freeze --exclude-editable | grep -viE '^(nvidia|cuda|triton|detectron2)'; } > build/pins
	mv build/pins constraints.txt

demo: setup
	$(BIN)/python demo/demo.py --out demo-output

# Two processes of one thread each: the tests are many and small, and threads that share two cores wait for each other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test: setup
	$(PYTEST)

test-slow: setup
	$(PYTEST) -m "slow or not slow"

lint: setup types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The documentation as pages in build/docs, links checked; needs no network. Open build/docs/index.html.
docs: setup mapping
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

types: setup mapping
	$(BIN)/mypy

# What reads the code without importing it (mypy, the API reference) cannot see through the editable finder: it is shown the mapping of
# pyproject.toml as folders.
mapping:
	@mkdir -p $(TYPES) && ln -sfn $(CURDIR)/extract $(CURDIR)/datasets $(CURDIR)/model $(CURDIR)/cli $(TYPES)/

clean:
	rm -rf build dist demo-output *.egg-info
