# `make` alone lists the targets. Everything runs in .venv, which the first target that needs it creates.

PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
# For instance PIP_ARGS="--extra-index-url ..." with the index that pytorch.org names for CPU or CUDA wheels of torch.
PIP_ARGS ?=
PORT ?= 8000
BIN := .venv/bin
PY := $(BIN)/python
# One thread a process: runs are repeatable, and two test workers do not fight for two cores.
export OMP_NUM_THREADS := 1

.DEFAULT_GOAL := help
.PHONY: help book serve test test-all learn check exercises golden classroom gpu pins clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1|\2/' | column -t -s '|' 2>/dev/null \
		|| grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST)

.venv/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer was not found: install it, or name it with make PYTHON=..."; exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv .venv || { echo "could not create .venv; on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	@echo "Installing the pinned versions into .venv (a few minutes the first time)"
	@$(PY) -m pip install -q --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e ".[dev]"
	@touch $@

book: .venv/.installed ## run every chapter, build the pages, print where they are
	@$(PY) book/build.py

serve: book ## show the built pages at http://localhost:8000 (PORT=...)
	@echo "http://localhost:$(PORT)/"
	@$(PY) -m http.server $(PORT) --bind 127.0.0.1 --directory _build/html

test: book ## pass all tests: package, notebooks, exercises, built pages
test-all: book ## the same, with the tests that take minutes (weekly in CI)
test-all: SELECTION := -m ""
test test-all:
	$(PY) -m pytest -n 2 --dist loadscope $(SELECTION) --nbval-lax --nbval-cell-timeout=120 tests book exercises solutions

learn: .venv/.installed ## copy exercise 01 to my_work/ and open it (EXERCISE=NN for another)
	@$(BIN)/moe-course start $(or $(EXERCISE),01)

check: .venv/.installed ## format, lint, types, derived files in sync, no stray outputs (under a minute)
	$(BIN)/ruff format --check --quiet . || { echo "run: $(BIN)/ruff format ."; exit 1; }
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy
	$(PY) -m moe_course.grading.derive --check
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml

exercises: .venv/.installed ## derive the exercise and solution notebooks from their masters
	$(PY) -m moe_course.grading.derive

golden: .venv/.installed ## run the chapters again and store their golden outputs
	$(PY) book/golden.py

classroom: .venv/.installed ## export the course without solutions and filed answers: make classroom OUT=folder
	@$(PY) -m moe_course.grading.classroom "$(OUT)"

# On a GPU machine as it is: its own python3 (or PYTHON=...), nothing installed; peers count where they can be imported.
gpu: GPU_PYTHON := $(if $(filter file,$(origin PYTHON)),python3,$(PYTHON))
gpu: ## check and time the kernels on an NVIDIA GPU, in under 8 minutes: make gpu [RECORDS=folder] [PYTHON=...]
	@PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" $(GPU_PYTHON) benchmarks/gpu_suite.py --records "$(or $(RECORDS),moe_course/data/records)"

pins: .venv/.installed ## do the pins resolve without this machine's pip configuration? (a dry run)
	$(PY) -m pip --isolated $(PIP_ARGS) install --dry-run --ignore-installed --quiet -c constraints.txt ".[dev]"

clean: ## remove the built pages and the environment, never my_work/
	rm -rf _build .venv
