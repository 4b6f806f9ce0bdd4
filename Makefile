# make demo and make test do all the set-up on a fresh machine: Python 3.11+, make and git are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done
DEMO_ARGS ?=
MUTANTS_ARGS ?= --sample 16
# One process for each core; a choice of tests given on the command line runs in one.
PYTEST_ARGS ?= --numprocesses auto --maxprocesses 4 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help setup demo test journeys test-matrix check format bench mutants docs clean

help:
	@echo "make demo    train, fine-tune, save, reload and question a small trimodal model (report in out/demo)"
	@echo "make test    the test suite, without the journeys and slow tests"
	@echo "make journeys  what users do from end to end, each step a process of its own, then the tests marked slow; some twelve minutes"
	@echo "make test-matrix  a core of the suite on other releases (MATRIX=newest: one set)"
	@echo "make check   lint, format, types and layout tests, in seconds"
	@echo "make format  rewrite the files as make check wants them"
	@echo "make bench   benchmarks (tables; figures as JSON in out/bench)"
	@echo "make mutants how many random changes of the code the tests notice; an hour or more (MUTANTS_ARGS='--sample 5')"
	@echo "make docs    build the documentation site into site/, warnings are errors"
	@echo "make setup   create .venv and install the pinned versions; the targets above call it"
	@echo "make clean   remove caches, builds and out/ (keeps .venv)"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Chorus needs Python 3.11 or newer, found " + sys.version.split()[0] + "; try make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: setup
	$(BIN)/chorus-moe demo $(DEMO_ARGS)

test: setup
	$(BIN)/python -m pytest --ignore=tests/journeys -m 'not slow' $(PYTEST_ARGS)

journeys: setup
	$(BIN)/python -m pytest tests/journeys --numprocesses auto --maxprocesses 4 --dist loadfile
	$(BIN)/python -m pytest --ignore=tests/journeys -m slow --numprocesses auto --maxprocesses 4 --dist loadfile

test-matrix: setup
	.ci/matrix $(MATRIX)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layout.py

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	@mkdir -p out/bench
	@# Compression asks the demo's model.
	@test -d out/demo/merged || $(MAKE) demo
	@set -e; for program in sparse_layer routing_options train_step decode upcycle router_reward adaptive_experts alignment deep_experts token_exit moe_vs_dense multitask lifelong prune_merge distillation long_context early_exit draft_and_verify layer_skip serving feature_cache memory_tokens federated owned_banks scaling process_memory placement compression self_supervised; do \
		$(BIN)/python -m benchmarks.$$program --json out/bench/$$program.json; \
	done

mutants: setup
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt --editable '.[mutants]'
	$(BIN)/python -m benchmarks.mutants $(MUTANTS_ARGS)

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean:
	rm -rf out site build dist chorus_moe.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
