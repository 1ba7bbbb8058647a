# The two commands of a fresh machine: `make demo` and `make test`. Both need only Python >= 3.10
# with pip; they make .venv once, with the versions in requirements/constraints.txt, and reuse it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO := curvlib-out/demo
JOBS ?= 1

.PHONY: help demo test lint examples bench venv clean
.DEFAULT_GOAL := help

help: ## what there is
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

demo: $(STAMP) ## the Hessian spectrum of a small network on handwritten digits, in curvlib-out/demo
	$(BIN)/curvlib spectrum --resume --out $(DEMO)

test: $(STAMP) ## the tests and the doctests, on all cores (and one process more: some tests wait)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest --dist worksteal \
	  -n $$($(BIN)/python -c "import os; print(min(8, (os.cpu_count() or 1) + 1))") $(ARGS)

lint: $(STAMP) ## style, format, types and import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

examples: $(STAMP) ## every example, three minutes each at most, JOBS at a time
	@mkdir -p curvlib-out/logs
	@ls examples/*.py | OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} xargs -P $(JOBS) -I{} sh -c ' \
	  log=curvlib-out/logs/$$(basename {} .py).log; start=$$(date +%s); \
	  timeout 180 $(BIN)/python {} > $$log 2>&1; code=$$?; \
	  echo "== {} ($$(($$(date +%s) - start)) s)"; cat $$log; [ $$code -eq 0 ] || exit 255'

bench: $(STAMP) ## the benchmarks behind the numbers in the README (minutes; installs the peers)
	$(BIN)/python -m pip install --quiet -c requirements/constraints.txt -e '.[bench]'
	@for f in products spectrum estimators mfac pruning rates optimizers influence influence_speed vocabulary compiled scaling depth; do echo "== $$f"; $(BIN)/python benchmarks/$$f.py || exit 1; done

venv: $(STAMP) ## only the environment

clean: ## remove the environment and what the tools leave behind
	rm -rf $(VENV) curvlib-out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -rf .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Torch is named with its exact version in the same command as everything else: a later or wider
# requirement would fetch a second copy of it.
$(STAMP): pyproject.toml requirements/constraints.txt requirements/venv.sh
	PYTHON=$(PYTHON) sh requirements/venv.sh $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  -c requirements/constraints.txt torch==2.13.0 -e '.[dev]'
	@touch $@
