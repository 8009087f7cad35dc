# Everything a newcomer needs: `make demo`, `make test`. Both set up .venv by themselves and may be repeated.

# The first Python on the path that is new enough; choose another with `make PYTHON=/path/to/python3.12 ...`.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; exit; }; done; echo python3)
VENV := .venv
READY := $(VENV)/.ready
INSTALLED := $(VENV)/.installed
DOCS_VENV := .venv-docs
DOCS_READY := $(DOCS_VENV)/.ready
RUN := runs/demo

.DEFAULT_GOAL := help
PYTEST := $(VENV)/bin/python -m pytest -q $(if $(CI),--durations=20)
# A file of tests stays with one process: what it makes and compiles serves all of its tests.
SPREAD := --maxprocesses 8 --dist loadfile --no-loadscope-reorder
# The slow tests start programs and wait for them: one process more than there are cores does other tests meanwhile.
CORES := $(shell nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
# Where it is set, as in some containers, every process would compile all of its Python anew.
unexport PYTHONDONTWRITEBYTECODE
.PHONY: help demo test test-all test-slow test-default-flags lint docs clean

help:
	@echo 'make demo    set up .venv, train on the embedded data from tags alone, evaluate, draw'
	@echo 'make test    set up .venv, run the tests: about five minutes on two cores, less once what they compile is kept'
	@echo 'make test-all   those and the slow ones: killed runs, several processes, every method, every form'
	@echo 'make test-slow  the slow ones alone'
	@echo 'make test-default-flags  the tests of the pure functions, compiled as users have it'
	@echo 'make lint    set up .venv, run the linter and the type checker'
	@echo 'make docs    set up .venv-docs, build the documentation as a site in site/'
	@echo 'make clean   remove .venv, the caches, the site and the run of the demo'
	@echo 'All but help, docs and clean install the package too: .venv/bin/lcrf lists its programs.'
	@echo 'PYTHON=/path/to/python3.12 chooses the Python (3.11 or newer) that .venv is made with.'

demo: $(INSTALLED)
	@echo 'Training on the embedded set from tags alone: about three minutes on two cores. The scores come last.'
	$(VENV)/bin/python -m experiments.train --config=experiments/configs/textures.py --workdir=$(RUN)
	$(VENV)/bin/python -m experiments.evaluate --checkpoint=$(RUN) --split=val --crf

test: $(INSTALLED)
	$(PYTEST) -m "not slow" -n auto $(SPREAD)

test-slow: $(INSTALLED)
	$(PYTEST) -m slow -n $$(( $(CORES) + 1 )) $(SPREAD)

test-all: test test-slow

test-default-flags: $(INSTALLED)
	LCRF_TEST_DEFAULT_FLAGS=1 $(PYTEST) -m "pure and not slow" -n auto $(SPREAD)

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

# Its environment has no JAX: the reference is read from the sources. What is built fetches nothing.
docs: $(DOCS_READY)
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict
	@echo 'site/index.html opens in any browser; its search needs a server: python3 -m http.server --directory site'

$(DOCS_READY): docs/tools/requirements.txt
	$(PYTHON) -m venv --clear $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r docs/tools/requirements.txt
	@touch $@

clean:
	rm -rf $(VENV) $(DOCS_VENV) site $(RUN) .cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info

# The stamp is written last: an interrupted or failed installation starts over, a finished one is not repeated.
$(READY): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "expected Python 3.11 or newer, got '$(PYTHON)': $$($(PYTHON) --version 2>&1)"; \
	  echo 'install a newer Python and name it: make PYTHON=/path/to/python3.12 ...'; exit 1; }
	@echo 'Making $(VENV) and installing JAX, Flax and what else requirements.txt names: about 1 GB, one to three minutes the first time.'
	$(PYTHON) -m venv --clear $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

# The package itself, from here: what is edited counts at once. It brings the command $(VENV)/bin/lcrf.
$(INSTALLED): $(READY) setup.cfg pyproject.toml
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@
