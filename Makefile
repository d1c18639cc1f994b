# `make demo` and `make test` install what they need into .venv; nothing else on the machine is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN ?= demo
# Which of the tests on Slurm or Docker: `make test-slurm ONLY='and not slow'` runs the quick ones.
ONLY ?=
# For how long `make fuzz` damages files, and of which readers; none are all.
SECONDS ?= 120
READERS ?=
# One test at a time to whichever process is free: the slow ones, which come first, are then spread over all of them.
DEALT := --dist load --maxschedchunk 1

.PHONY: help demo test test-fast test-long fuzz test-slurm test-docker lint format wheel clean

help:  ## What can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

demo: $(VENV)/.installed  ## Train a tiny GQA model on the Python standard library, and let it write
	$(BIN)/fiddlehead pretrain --factory tiny log.name=$(RUN) --yes
	$(BIN)/fiddlehead generate $(RUN) --prompt "def "

test: $(VENV)/.installed-dev  ## The test suite, in three processes, as they often wait for jobs
	$(BIN)/python -m pytest -n 3 $(DEALT) -m "not long"

test-fast: $(VENV)/.installed-dev  ## Without the tests that take more than ten seconds
	$(BIN)/python -m pytest -n 3 $(DEALT) -m "not slow and not long"

test-long: $(VENV)/.installed-dev  ## What `make test` holds in small: ten kills, more processes, more layouts
	$(BIN)/python -m pytest -n 2 $(DEALT) -m long

fuzz: $(VENV)/.installed-dev  ## Damage files at random and read them, for SECONDS=120 in all; READERS="index tokens" are some
	$(BIN)/python -m tests.fuzz --seconds $(SECONDS) $(READERS)

# The sandboxes are removed at the end, however it ends; the exit code is that of pytest.
test-slurm test-docker: SHELL := /bin/bash
test-slurm: $(VENV)/.installed-dev  ## The tests on a real Slurm cluster, which it starts: with accounting, then without
	@trap 'tests/sandbox/slurm.sh purge' EXIT; \
	settings="$$(tests/sandbox/slurm.sh start)" && eval "$$settings" && \
	$(BIN)/python -m pytest -m "slurm $(ONLY)"
	@trap 'tests/sandbox/slurm.sh purge' EXIT; export SLURM_SANDBOX_ACCOUNTING=0; \
	settings="$$(tests/sandbox/slurm.sh start)" && eval "$$settings" && \
	$(BIN)/python -m pytest -m "slurm $(ONLY)" -k "accounting or states"

test-docker: $(VENV)/.installed-dev  ## The tests on a real Docker engine, which it starts
	@trap 'tests/sandbox/docker.sh purge' EXIT; \
	settings="$$(tests/sandbox/docker.sh start)" && eval "$$settings" && \
	$(BIN)/python -m pytest -m "docker $(ONLY)"

lint: $(VENV)/.installed-dev  ## Format, lint, types and the direction of imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: $(VENV)/.installed-dev  ## Rewrite the code as `make lint` wants it
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

wheel: $(VENV)/.installed-dev  ## Build dist/*.whl and the source archive
	$(BIN)/python -m build

clean:  ## Remove what make made, but no runs
	rm -rf $(VENV) dist

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(f"Python 3.11 or 3.12 is needed, not {v[0]}.{v[1]}: make PYTHON=python3.12" if v not in ((3, 11), (3, 12)) else 0)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@ $(VENV)/.installed
