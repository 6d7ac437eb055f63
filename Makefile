# Two commands for everybody: `make demo` and `make test`. Each makes .venv if
# it is missing, installs what it needs, and runs. Needs Python 3.11+ and make.

PYTHON ?= python3
BACKENDS ?= jax tensorflow
# Extra arguments for pip; continuous integration pins a small torch with it.
PIP_ARGS ?=
DEMO_ARGS ?=
# Processes of a test run.
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
# "jax,tensorflow", and the mark that says they are installed.
comma := ,
EXTRAS := $(subst $() ,$(comma),$(strip $(BACKENDS)))
INSTALLED := $(VENV)/.test-$(subst $() ,-,$(strip $(BACKENDS)))

.PHONY: demo test lint bench clean

demo: $(VENV)/.demo
	KERAS_BACKEND=$${KERAS_BACKEND:-jax} TF_CPP_MIN_LOG_LEVEL=3 \
		$(BIN)/keras-upcycle demo $(DEMO_ARGS)

test: $(INSTALLED) lint
	@set -e; for backend in $(BACKENDS); do \
		echo "== tests on $$backend"; \
		KERAS_BACKEND=$$backend TF_CPP_MIN_LOG_LEVEL=3 \
			$(BIN)/python -m pytest -n $(JOBS) --dist loadfile \
			--no-loadscope-reorder; \
	done

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The figures of README and benchmarks/README: ratios, in one process a
# backend. Some hours; BACKENDS="jax tensorflow torch" for all of them.
bench: $(INSTALLED)
	$(BIN)/python -m benchmarks --backends $(BACKENDS)

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed. Received: \
		$$($(PYTHON) --version). Try: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip

# What is installed follows pyproject.toml: a change there installs again.
# setuptools warns of every editable installation, in a frame of asterisks.
PIP_INSTALL := PYTHONWARNINGS="ignore:Editable installation" \
	$(BIN)/pip install --quiet
$(VENV)/.demo: pyproject.toml | $(BIN)/pip
	@echo "Installing into $(VENV): a minute or two."
	$(PIP_INSTALL) $(PIP_ARGS) -e ".[jax,demo]"
	@touch $@

# One call for the tests' tools and all backends asked for.
$(INSTALLED): pyproject.toml | $(BIN)/pip
	@echo "Installing into $(VENV): a minute or two."
	$(PIP_INSTALL) $(PIP_ARGS) -e ".[demo,dev,$(EXTRAS)]"
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache runs
