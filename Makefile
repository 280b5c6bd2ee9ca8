# Two commands do everything on a machine with Python >= 3.10 and a C compiler:
#
#   make demo    learn CartPole on all cores (writes demo-output/)
#   make test    lint, types, C tests, Python tests (under 15 minutes on 2 cores)
#
# Both make .venv, install into it and build the extensions in place; a second run finds the stamps in .venv and starts at
# once. Others: build, lint, types, ctest, soak, chaos, bench, dist, clean.
#
# Variables: PYTHON (the interpreter that .venv is made with), TORCH (what the PyTorch tests run with; `make test TORCH=`
# does without), TEST_PROCESSES (tests run in so many processes; 0: in one that a debugger can follow), PYTEST_ARGS, DEMO_ARGS,
# BENCH_ARGS, CHAOS_ARGS (--seconds 600 --seed N).

PYTHON ?= python3
TORCH ?= torch==2.13.0
TEST_PROCESSES ?= 2
PYTEST_ARGS ?=
DEMO_ARGS ?=
BENCH_ARGS ?=
CHAOS_ARGS ?=

comma := ,
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
SOURCES := setup.py $(shell find zray -name '*.pyx' -o -name '*.pxd' -o -name '*.h' -o -name '*.py') zray/_store_core.c

.PHONY: demo test build lint types ctest pytest soak chaos bench dist clean
.DELETE_ON_ERROR:

demo: build
	$(BIN)/zray demo $(DEMO_ARGS)

test: lint types pytest

pytest: build $(VENV)/.stamp-test $(VENV)/.stamp-torch
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile $(PYTEST_ARGS)

build: $(VENV)/.stamp-build $(VENV)/.stamp-install

lint: $(VENV)/.stamp-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: build $(VENV)/.stamp-test
	$(BIN)/mypy

# They compile the store alone, under sanitizers; `pytest` runs them as well.
ctest: build $(VENV)/.stamp-test
	$(BIN)/python -m pytest tests/store

soak: build $(VENV)/.stamp-test
	$(BIN)/python -m pytest -m soak --timeout 0 $(PYTEST_ARGS)

chaos: build $(VENV)/.stamp-test
	$(BIN)/python -m tests.chaos $(CHAOS_ARGS)

bench: build $(VENV)/.stamp-test
	$(BIN)/zray microbenchmark $(BENCH_ARGS)

dist: $(VENV)/.stamp-test
	rm -rf dist
	$(BIN)/python -m build

clean:
	rm -rf $(VENV) build dist demo-output *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find zray \( -name '*.so' -o -name '__pycache__' \) -prune -exec rm -rf {} +
	for made in $$(find zray -name '*.c'); do \
	  for source in "$${made%.c}.py" "$${made%.c}.pyx"; do if [ -f "$$source" ]; then rm -f "$$made"; fi; done; done

# --- stamps: each is touched when its step has succeeded, so a broken-off run takes up where it stopped ---

$(VENV)/.stamp-venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "zray needs Python >= 3.10; try 'make PYTHON=python3.12'" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install "pip>=24" "setuptools>=77" "cython>=3.1"
	@touch $@

# The extensions are built beside their sources, and the editable installs below find them there (ZRAY_BUILT: they would compile them anew).
$(VENV)/.stamp-build: $(VENV)/.stamp-venv $(SOURCES)
	$(BIN)/python setup.py -q build_ext --inplace --parallel 2
	@touch $@

# "compat" puts one directory on the path; the default is an import hook, for which every interpreter pays 10 ms. setuptools
# means to drop the mode some day: then the default has to do.
define editable
ZRAY_BUILT=1 $(PIP) install --no-build-isolation --config-settings editable_mode=compat -e $(1) \
  || ZRAY_BUILT=1 $(PIP) install --no-build-isolation -e $(1)
endef

$(VENV)/.stamp-install: $(VENV)/.stamp-venv pyproject.toml setup.py | $(VENV)/.stamp-build
	$(call editable,'.[demo]')
	@touch $@

$(VENV)/.stamp-test: $(VENV)/.stamp-install
	$(call editable,'.[demo$(comma)test]')
	@touch $@

$(VENV)/.stamp-torch: $(VENV)/.stamp-venv
	@if [ -z "$(TORCH)" ]; then echo "PyTorch left out: the tests that need it skip"; \
	elif $(PIP) install "$(TORCH)"; then :; \
	else echo "PyTorch ($(TORCH)) cannot be installed here: the tests that need it skip"; fi
	@touch $@
