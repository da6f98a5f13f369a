# Needs Python 3.11, 3.12 or 3.13 and make; everything else goes into .venv. Paths stay relative, so that a checkout
# may lie under a folder with spaces in its name.

# An interpreter of your choice: make venv PYTHON=/path/to/python3.12
PYTHON ?=
# Arguments for pytest, by default one process a core: make test ARGS="-x tests/unit". A process that dies ends the run:
# with another in its place pytest-xdist may wait for ever for what it had already done.
SPREAD := -n auto --dist loadfile --max-worker-restart 0
ARGS ?= $(SPREAD)

# What `make bench` runs: those without arguments of their own that take minutes, not hours.
BENCHMARKS := startup write claim register sharing transfer boundary_command extract

BIN := .venv/bin
INSTALLED := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help venv demo test soak lint types imports check bench clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' Makefile

venv: $(INSTALLED) ## create .venv and install embstore and its tools into it

# pip older than 25.1 does not know --group. Resemblyzer is there for its weights alone, facenet-pytorch for its networks,
# insightface for the tests: what they depend on is not needed, or would put old versions in the place of ours.
$(INSTALLED): pyproject.toml constraints.txt
	@if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
		suits='import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'; \
		for python in "$(PYTHON)" python3 python3.12 python3.11 python3.13 none; do \
			if "$$python" -c "$$suits" 2>/dev/null; then break; fi; \
			if [ -n "$$python" ] && [ "$$python" = "$(PYTHON)" ]; then python=none; break; fi; \
		done; \
		if [ "$$python" = none ]; then \
			echo 'No Python 3.11, 3.12 or 3.13 with its venv module was found$(if $(PYTHON), as "$(PYTHON)").' >&2; \
			echo 'Install one (on Debian and Ubuntu: apt install python3 python3-venv), or name it: make venv PYTHON=/path/to/python3.12' >&2; \
			exit 1; \
		fi; \
		echo "Creating .venv with $$("$$python" --version)"; \
		"$$python" -m venv --clear .venv; \
	fi
	@echo "Installing embstore and its dependencies into .venv (PyTorch is among them: this takes minutes)"
	@$(BIN)/python -m pip install -qq -c constraints.txt "pip>=25.1"
	@$(BIN)/python -m pip install -qq -c constraints.txt --group dev -e .
	@$(BIN)/python -m pip install -qq -c constraints.txt --no-deps resemblyzer facenet-pytorch insightface
	@touch $(INSTALLED)

demo: $(INSTALLED) ## embed the sample speech and ask the database who sounds like whom
	@PATH="$(CURDIR)/$(BIN):$$PATH" examples/demo.sh

test: $(INSTALLED) ## run the tests on a real PostgreSQL, which comes along
	$(BIN)/python -m pytest $(ARGS)

soak: $(INSTALLED) ## every fault at every point, and the queue against its model, at length
	EMBSTORE_TEST_SOAK=1 $(BIN)/python -m pytest $(SPREAD) -o faulthandler_timeout=7200 tests/crash \
		tests/integration/test_queue_model.py tests/integration/test_sharing_injection.py \
		tests/unit/test_fuzz.py tests/unit/test_unpickle.py

lint: $(INSTALLED) ## style
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

types: $(INSTALLED) ## static types
	$(BIN)/python -m mypy

imports: $(INSTALLED) ## that imports run downward only
	$(BIN)/lint-imports

check: lint types imports ## lint, types and imports

bench: $(INSTALLED) ## run the benchmarks of the main jobs; benchmarks/README.md has the others
	$(foreach script,$(BENCHMARKS),$(BIN)/python benchmarks/$(script).py &&) true

clean: ## remove caches and build outputs; .venv stays
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
