# make train | test | test-all | docs | capabilities | lint | format | clean.
# Each makes its environment first, when it is missing or older than what it is
# made from.
#
#   make test PYTHON=python3.12       another interpreter, in its own .venv-*
#   make train ARGS='--config.seed=1' more arguments for the command
#   make test ARGS='-k masks'
#   make test-all                     the slow tail too: what `test` leaves out

PYTHON ?= python3
ARGS ?=

# The default interpreter's environment is .venv, so that a reader knows what
# to activate; any other interpreter has its own.
VENV := .venv$(if $(filter-out python3,$(PYTHON)),-$(notdir $(PYTHON)))
BIN := $(VENV)/bin

.PHONY: help train test test-all docs capabilities lint format clean
.DELETE_ON_ERROR:

help:
	@sed -n 's/^# \{0,1\}//p;/^$$/q' Makefile

# The stamp's name holds what an environment cannot survive: another build of
# Python, or a checkout that moved. (`python3` may mean another one tomorrow.)
NEEDS_VENV := $(filter train test test-all docs capabilities lint format,\
  $(MAKECMDGOALS))
ifneq ($(NEEDS_VENV),)
IDENTITY := $(shell $(PYTHON) -c 'import hashlib, os, sys; \
  key = repr((sys.version, sys.base_prefix, os.getcwd())).encode(); \
  old = sys.version_info[:2] < (3, 11); \
  print("old" if old else hashlib.sha256(key).hexdigest()[:12])' 2>/dev/null)
ifeq ($(IDENTITY),)
$(error no interpreter answers to PYTHON=$(PYTHON); \
  name a Python 3.11 or newer, as in: make $(MAKECMDGOALS) PYTHON=python3.12)
endif
ifeq ($(IDENTITY),old)
$(error PYTHON=$(PYTHON) is older than 3.11; \
  name a newer one, as in: make $(MAKECMDGOALS) PYTHON=python3.12)
endif
endif
INSTALLED := $(VENV)/installed-$(IDENTITY)

# An environment of this very interpreter is brought up to date; any other, or
# one whose installation was cut off, is made again.
$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	@echo "Installing into $(VENV): a minute, the first time."
	@test -f $@ || $(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  --constraint constraints.txt --editable '.[dev]'
	@touch $@

train: $(INSTALLED)
	$(BIN)/python train.py --config=configs/quickstart.py $(ARGS)

test: $(INSTALLED)
	$(BIN)/python -m pytest -n auto $(ARGS)

# What is marked slow, after the rest has passed.
test-all: test
	$(BIN)/python -m pytest -n auto -m slow $(ARGS)

capabilities: $(INSTALLED)
	$(BIN)/python -m tests.attention.capabilities -n auto $(ARGS)

# Notebooks are run, and warnings are errors; the site is site/index.html.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet $(ARGS)
	@echo "Open site/index.html."

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv-* *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
