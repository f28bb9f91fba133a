# Thin: every target is one or two commands that work without make too.

CONFIG ?= examples/home/pipeline.toml
# The first Python on PATH that starts, is new enough and has wheels of everything; PYTHON=... chooses another.
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3.14 python3 python; do \
	"$$python" -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 15))' \
	2>/dev/null && echo "$$python" && break; done)
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help setup all test lint docs lock clean

help: ## show this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' Makefile | expand -t 16

setup: $(BIN)/pipeline ## install the locked libraries; build llama.cpp and Ollama once per machine
	@$(BIN)/pipeline setup

all: setup ## fine-tune, quantize, deploy and check the example, or CONFIG=my/pipeline.toml
	@$(BIN)/pipeline run "$(CONFIG)"

test: lint ## set up, lint, and run all tests
	@$(BIN)/pipeline setup --dev
	@$(BIN)/python -m pytest --numprocesses 2 --no-loadscope-reorder

lint: setup ## ruff, mypy, the direction of the imports, and whether the documentation is what the code says
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/python -m docs.generate --check

docs: setup ## write the generated parts of the documentation anew
	@$(BIN)/python -m docs.generate

lock: setup ## resolve requirements.lock anew, and print what changed
	@$(BIN)/python -m pipeline.setup.lock

clean: ## remove the virtual environment and what tools left here; runs and the machine's cache stay
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis

# Only what a lock names enters the environment, the first packages included (pipeline/setup/libraries.py).
$(BIN)/pipeline: pyproject.toml requirements.lock third_party/bootstrap.lock
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 to 3.14 with the venv module is on PATH;" \
	"install one (on Debian: python3 and python3-venv) or name it: make PYTHON=/path/to/python3" >&2; exit 2; }
	@test ! -x $(BIN)/python || $(BIN)/python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 15))' || \
	{ echo "error: .venv has a Python that is not 3.11 to 3.14; \`make clean\` removes it" >&2; exit 2; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip --default-pip >/dev/null 2>&1 || \
	"$(PYTHON)" -m venv --clear .venv
	@$(BIN)/python -m pipeline.setup.libraries
	@touch $@
