# Every target sets itself up: all it needs is Python 3.11 to 3.13 and a package index.
#   make demo     decode a long prompt with the small model, policy by policy
#   make bench    time the PyTorch backend beside dense attention
#   make test     run this project's tests
# Stamps in $(VENV) make a second call start at once.

PYTHON ?= python3
VENV ?= .venv
# PyTorch is optional. Tests run array code on it, and compare the small model with its training code.
# Triton's interpreter runs the kernels on the CPU.
# `make test TORCH=` goes without; those tests are then skipped with the reason.
TORCH ?= torch triton
PYTEST_ARGS ?= -n 2
DEMO_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# The matrices here are small: threads of a BLAS wait for each other longer than they compute, and on a
# busy machine many times longer.
export OPENBLAS_NUM_THREADS ?= 1
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-oldest-transformers bench lint types docs conformance wheel clean help conformance-seeds conformance-matrix

help:
	@echo "make demo | test | bench | lint | types | docs | conformance | wheel | clean"

demo: $(VENV)/.base
	$(BIN)/sparse-dlm-attn decode $(DEMO_ARGS)

test: $(VENV)/.dev
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# The other end of the range of transformers, in an environment of its own; `make test` has the newest.
OLDEST ?= 4.51.3
test-oldest-transformers: $(VENV)-oldest/.ready
	$(VENV)-oldest/bin/python -m pytest tests/transformers $(PYTEST_ARGS)

$(VENV)-oldest/.ready: pyproject.toml constraints.txt
	@echo "Installing transformers $(OLDEST) into $(VENV)-oldest ..."
	@$(PYTHON) -m venv $(VENV)-oldest
	@grep -v '^transformers==' constraints.txt > $(VENV)-oldest/constraints.txt
	@$(VENV)-oldest/bin/python -m pip install --quiet --disable-pip-version-check \
	  --constraint $(VENV)-oldest/constraints.txt --editable '.[conformance]' torch \
	  'transformers==$(OLDEST)' pytest-timeout
	@touch $@

# Two threads, as the figures state; medians of turns, on a machine that does nothing else.
bench: $(VENV)/.dev
	OMP_NUM_THREADS=2 $(BIN)/python -m pytest benchmarks -q -s

lint: $(VENV)/.dev types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/numpydoc lint $$(find sparse_dlm_attn reference backends benchmarks/sparse_dlm_attn_benchmarks conformance \
	  models/sparse_dlm_attn_small_model integrations -name '*.py')

types: $(VENV)/.dev
	$(BIN)/mypy

docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

conformance: $(VENV)/.dev
	$(BIN)/sparse-dlm-attn conformance --backend reference --profile quick

# Other problems in each of many runs: `make conformance-seeds SEEDS=20 WORKERS=16 BACKENDS="reference torch"`.
SEEDS ?= 20
WORKERS ?= 2
BACKENDS ?= reference
SEED_ARGS ?= --profile ci
conformance-seeds: $(VENV)/.dev
	mkdir -p build/seeds
	seq $(SEEDS) | OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 xargs -P $(WORKERS) -I% sh -c '$(BIN)/sparse-dlm-attn \
	  conformance $(addprefix --backend ,$(BACKENDS)) $(SEED_ARGS) --workers 1 --seed % \
	  --report build/seeds/%.json > build/seeds/%.log || { echo seed % failed, see build/seeds/%.log; exit 1; }'

# The page of the documentation that shows which clause holds where.
conformance-matrix: $(VENV)/.dev
	$(BIN)/sparse-dlm-attn conformance --backend reference --backend torch --profile ci --share 0.1 --workers 2 \
	  --report docs/conformance-matrix.md

# Through the source distribution, so that a file missing from it shows.
wheel: $(VENV)/.dev
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist .

clean:
	rm -rf $(VENV) $(VENV)-oldest build dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { \
	  echo "Python 3.11, 3.12 or 3.13 is needed; $(PYTHON) is not one of them." \
	       "Name another: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "Creating $(VENV) ..."
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "$(PYTHON) cannot create virtual environments; on Debian install python3-venv." >&2; exit 1; }

# Stamps are renewed when the dependencies or entry points change; sources are installed editable.
$(VENV)/.base: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing sparse_dlm_attn into $(VENV) ..."
	@$(PIP) --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.base
	@echo "Installing what tests, lint and documentation need into $(VENV) ..."
	@$(PIP) --editable '.[dev]' $(TORCH)
	@touch $@
