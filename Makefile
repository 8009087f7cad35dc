# Everything a newcomer needs: `make demo`, `make test`. Both set up .venv by themselves and may be repeated.

# The first Python on the path that is new enough; choose another with `make PYTHON=/path/to/python3.12 ...`.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; exit; }; done; echo python3)
VENV := .venv
READY := $(VENV)/.ready
RUN := runs/demo

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow lint clean

help:
	@echo 'make demo    set up .venv, train on the embedded data from tags alone, evaluate, draw'
	@echo 'make test    set up .venv, run the tests'
	@echo 'make test-slow  run the tests of killed runs and several processes, which make test leaves out'
	@echo 'make lint    set up .venv, run the linter'
	@echo 'make clean   remove .venv, the caches and the run of the demo'
	@echo 'PYTHON=/path/to/python3.12 chooses the Python (3.11 or newer) that .venv is made with.'

demo: $(READY)
	$(VENV)/bin/python -m experiments.train --config=experiments/configs/textures.py --workdir=$(RUN)
	$(VENV)/bin/python -m experiments.evaluate --checkpoint=$(RUN) --split=val --crf

test: $(READY)
	$(VENV)/bin/python -m pytest -q -m "not slow" -n auto --maxprocesses 8 --dist loadfile

test-slow: $(READY)
	$(VENV)/bin/python -m pytest -q -m slow

lint: $(READY)
	$(VENV)/bin/ruff check .

clean:
	rm -rf $(VENV) $(RUN) .cache .pytest_cache .ruff_cache .hypothesis build *.egg-info

# The stamp is written last: an interrupted or failed installation starts over, a finished one is not repeated.
$(READY): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "expected Python 3.11 or newer, got '$(PYTHON)': $$($(PYTHON) --version 2>&1)"; \
	  echo 'install a newer Python and name it: make PYTHON=/path/to/python3.12 ...'; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@
