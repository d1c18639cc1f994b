# `make demo` and `make test` install what they need into .venv; they change nothing else on the machine.
# The first of these that exists, runs, and has a version that pyproject.toml allows.
PYTHONS := python3 python3.13 python3.12 python3.11 python3.14
PYTHON ?= $(shell for python in $(PYTHONS); do $$python -c '$(ALLOWED)' 2>/dev/null && echo $$python && break; done)
ALLOWED := import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))
VENV := .venv
BIN := $(VENV)/bin
RUN ?= demo
# Selects tests on Slurm or Docker: `make test-slurm ONLY='and not slow'` runs the quick ones.
ONLY ?=
# How long `make fuzz` runs, and for which readers; empty means all.
SECONDS ?= 120
READERS ?=
# Gives one test at a time to a free process, so the slow tests, which come first, are spread over all processes.
DEALT := --dist load --maxschedchunk 1
# `make lock LOCK=--upgrade` takes the newest releases; without it, only changes of pyproject.toml have an effect.
LOCK ?=
PIP := -m pip install --quiet --disable-pip-version-check
# Without this, each process that the tests start, and there are many, compiles the code again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test test-fast test-long fuzz test-slurm test-docker lint format docs docs-check wheel lock newest clean

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

demo: $(VENV)/.installed  ## Train a tiny GQA model on the Python standard library, and generate text
	$(BIN)/fiddlehead pretrain --factory tiny log.name=$(RUN) --yes
	$(BIN)/fiddlehead generate $(RUN) --prompt "def "

test: $(VENV)/.installed-dev  ## Run the test suite (three processes, because tests often wait for jobs)
	$(BIN)/python -m pytest -n 3 $(DEALT) -m "not long"

test-fast: $(VENV)/.installed-dev  ## Run the tests that take less than ten seconds
	$(BIN)/python -m pytest -n 3 $(DEALT) -m "not slow and not long"

test-long: $(VENV)/.installed-dev  ## Run longer versions of the tests: ten kills, more processes, more layouts
	$(BIN)/python -m pytest -n 2 $(DEALT) -m long

fuzz: $(VENV)/.installed-dev  ## Read randomly damaged files, for SECONDS=120 in all; READERS="index tokens" selects readers
	$(BIN)/python -m tests.fuzz --seconds $(SECONDS) $(READERS)

# The sandboxes are always removed at the end; the exit code is that of pytest.
test-slurm test-docker: SHELL := /bin/bash
test-slurm: $(VENV)/.installed-dev  ## Start a Slurm cluster and run the tests on it: with accounting, then without
	@trap 'tests/sandbox/slurm.sh purge' EXIT; \
	settings="$$(tests/sandbox/slurm.sh start)" && eval "$$settings" && \
	$(BIN)/python -m pytest -m "slurm $(ONLY)"
	@trap 'tests/sandbox/slurm.sh purge' EXIT; export SLURM_SANDBOX_ACCOUNTING=0; \
	settings="$$(tests/sandbox/slurm.sh start)" && eval "$$settings" && \
	$(BIN)/python -m pytest -m "slurm $(ONLY)" -k "accounting or states"

test-docker: $(VENV)/.installed-dev  ## Start a Docker engine and run the tests on it
	@trap 'tests/sandbox/docker.sh purge' EXIT; \
	settings="$$(tests/sandbox/docker.sh start)" && eval "$$settings" && \
	$(BIN)/python -m pytest -m "docker $(ONLY)"

lint: $(VENV)/.installed-dev  ## Check format, lint, types and the direction of imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: $(VENV)/.installed-dev  ## Rewrite the code in the format that `make lint` checks
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/.installed-dev  ## Build the site of the documentation: site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "Documentation of version $$($(BIN)/python -c 'import fiddlehead; print(fiddlehead.__version__)')"
	@echo "Look at it:  $(BIN)/python -m http.server --directory site"

docs-check: docs $(VENV)/node_modules/axe-core  ## Examine the site with axe-core, light and dark; needs npm and Chromium (minutes)
	$(BIN)/python docs/check_pages.py site --axe $(VENV)/node_modules/axe-core/axe.min.js

$(VENV)/node_modules/axe-core:
	npm install --silent --no-save --no-package-lock --prefix $(VENV) axe-core@4.11.4

wheel: $(VENV)/.installed-dev  ## Build dist/*.whl and the source archive
	$(BIN)/python -m build --no-isolation

# The lock is for all Python versions and platforms, with a hash for each file of a release on PyPI.
COMPILE = $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes $(LOCK) \
	--excludes requirements/cuda.txt --extra tensorboard --no-emit-package torch --custom-compile-command "make lock" \
	pyproject.toml requirements/build.in requirements/torch.txt
lock: | $(VENV)/bin/python  ## Write requirements/lock*.txt, which the tests and the image install, from pyproject.toml
	$(BIN)/python $(PIP) uv
	$(COMPILE) --output-file requirements/lock.txt
	$(COMPILE) --extra dev --extra docs --constraints requirements/lock.txt --output-file requirements/lock-dev.txt

# A package that is outdated right after installation is held back by a bound of ours or of another package.
newest: NEWEST := .venv-newest
newest:  ## Run `make test-fast` with the newest releases that pyproject.toml allows, in .venv-newest
	rm -rf $(NEWEST)
	$(MAKE) VENV=$(NEWEST) $(NEWEST)/bin/python
	$(NEWEST)/bin/python $(PIP) --editable '.[dev,docs]'
	touch $(NEWEST)/.installed $(NEWEST)/.installed-dev
	@echo "Held back:" && $(NEWEST)/bin/python -m pip list --disable-pip-version-check --outdated
	$(MAKE) VENV=$(NEWEST) test-fast

clean:  ## Remove the results of make, but not runs
	rm -rf $(VENV) .venv-newest dist site

$(VENV)/bin/python:
	@[ -n "$(PYTHON)" ] || { echo "None of $(PYTHONS) is Python 3.11 to 3.14: make PYTHON=/path/to/python"; exit 1; }
	@$(PYTHON) -c '$(ALLOWED)' || { echo "$(PYTHON) is not Python 3.11 to 3.14"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# PyTorch comes last: its dependencies are then already installed, in the versions of the lock.
INSTALL = $(BIN)/python $(PIP) --no-deps --require-hashes --requirement $< && \
	$(BIN)/python $(PIP) --requirement requirements/torch.txt && \
	$(BIN)/python $(PIP) --no-deps --no-build-isolation --editable . && \
	$(BIN)/python -m pip check --disable-pip-version-check

$(VENV)/.installed: requirements/lock.txt requirements/torch.txt pyproject.toml | $(VENV)/bin/python
	$(INSTALL)
	touch $@

$(VENV)/.installed-dev: requirements/lock-dev.txt requirements/torch.txt pyproject.toml | $(VENV)/bin/python
	$(INSTALL)
	touch $@ $(VENV)/.installed
