# Every target makes and reuses .venv by itself. `make test PYTHON=python` uses the environment
# that is active now instead, and installs nothing into it. ARGS goes to the commands of fastattn
# and bench: `make demo ARGS='--steps 50'`. Tests take SEED, of their random numbers, and THREADS.
BASE_PYTHON ?= python3

ifdef PYTHON
READY :=
INTEGRATIONS_READY :=
DOCS_READY :=
else
override PYTHON := .venv/bin/python
READY := .venv/.ready
INTEGRATIONS_READY := .venv-integrations/.ready
DOCS_READY := .venv-docs/.ready
integrations examples: override PYTHON := .venv-integrations/bin/python
docs: override PYTHON := .venv-docs/bin/python
endif

SEED ?= 0
THREADS ?= 1
PICTURES ?= docs/pictures

# A worker per core, each with one thread for torch. A test that hangs in native code ends its worker
# (a signal would not reach it), and worksteal, unlike loadgroup, goes on with a new one.
PYTEST = OMP_NUM_THREADS=$(THREADS) $(PYTHON) -m pytest -n auto --dist worksteal \
	--timeout 300 --timeout-method thread --seed $(SEED)

# What compares numbers. PyTorch computes them otherwise on another processor.
NUMERIC = tests/flash tests/generation tests/kernels tests/losses tests/models tests/nn tests/ops tests/patching

.PHONY: help setup demo picture test proofs numeric quick integrations examples docs versions lint compiled bench clean

help: ## Show this list.
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile | expand -t 12

setup: $(READY) ## Make .venv and install fastattn into it with everything for development.

.venv/.ready: pyproject.toml constraints.txt
	@$(BASE_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
		{ echo 'fastattn needs Python 3.10 or newer: make setup BASE_PYTHON=/path/to/python' >&2; exit 1; }
	@echo 'Installing into .venv; with a GPU build of torch this downloads gigabytes, once.'
	$(BASE_PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY) ## Train a small language model beside plain PyTorch.
	$(PYTHON) -m fastattn demo $(ARGS)

picture: $(READY) ## Draw README's picture anew: the demo's two trainings.
	$(PYTHON) -m fastattn demo --part evidence --out $(PICTURES) $(ARGS)
	rm -r $(PICTURES)/evidence-model

test: $(READY) ## Run the CPU suite: without Triton's interpreter, then with it.
	@failed=0; \
	env -u TRITON_INTERPRET $(PYTEST) -m 'not kernels and not proof' || failed=1; \
	env TRITON_INTERPRET=1 $(PYTEST) -m kernels || failed=1; \
	exit $$failed

proofs: $(READY) ## Compile and execute whole kernels as for a GPU, and check machine code and planted faults.
	env -u TRITON_INTERPRET $(PYTEST) -m proof tests/machine tests/compiled

# CI, which has little time, asks with WHICH='not slow' for a part of them.
WHICH ?= slow or not slow
PROCESSOR ?= ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE

numeric: $(READY) ## Run what compares numbers as on a processor without vector instructions.
	@failed=0; export $(PROCESSOR); \
	env -u TRITON_INTERPRET $(PYTEST) -m 'not kernels and ($(WHICH))' $(NUMERIC) || failed=1; \
	env TRITON_INTERPRET=1 $(PYTEST) -m 'kernels and ($(WHICH))' $(NUMERIC) || failed=1; \
	exit $$failed

quick: $(READY) ## Run the tests that take no more than 90 seconds together.
	@failed=0; \
	env -u TRITON_INTERPRET $(PYTEST) -m 'not kernels and not slow and not proof' || failed=1; \
	env TRITON_INTERPRET=1 $(PYTEST) -m 'kernels and not slow' || failed=1; \
	exit $$failed

# Other libraries change often: they have an environment of their own, and no other command needs them.
.venv-integrations/.ready: pyproject.toml constraints.txt
	$(BASE_PYTHON) -m venv .venv-integrations
	.venv-integrations/bin/python -m pip install --quiet -c constraints.txt -e '.[test,examples,timm]'
	@touch $@

integrations: $(INTEGRATIONS_READY) ## Run the tests with Hugging Face's libraries, and write their table.
	@failed=0; \
	env -u TRITON_INTERPRET $(PYTEST) -m 'not kernels' tests/integrations \
		--table docs/hugging-face.md || failed=1; \
	env TRITON_INTERPRET=1 $(PYTEST) -m kernels tests/integrations || failed=1; \
	exit $$failed

# Those of other libraries are left out where PYTHON names an environment without the extra `examples`.
examples: $(INTEGRATIONS_READY) ## Run every program of docs/examples, and say which were left out and why.
	OMP_NUM_THREADS=$(THREADS) $(PYTHON) -m pytest tests/test_examples.py --every-example \
		--durations 0 -v -m 'not kernels'
	OMP_NUM_THREADS=$(THREADS) $(PYTHON) docs/examples/debugger.py

.venv-docs/.ready: pyproject.toml constraints.txt
	$(BASE_PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	@touch $@

docs: $(DOCS_READY) ## Build the site of docs in build/site, without a warning, and check its links and its search.
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict
	$(PYTHON) -m pytest -q tests/site

versions: ## Run a smoke part with the oldest, the pinned and the newest PyTorch and Triton.
	$(BASE_PYTHON) .ci/versions.py $(ARGS)

lint: $(READY) ## Check style, formatting and types.
	$(PYTHON) -m ruff check
	$(PYTHON) -m ruff format --check
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(PYTHON) -m pyright \
		--pythonpath "$$($(PYTHON) -c 'import sys; print(sys.executable)')"

compiled: $(READY) ## Compile every kernel for every target and check its machine code.
	$(PYTHON) -m bench.compiled $(ARGS)

bench: $(READY) ## Time every op beside its contenders.
	$(PYTHON) -m bench $(ARGS)

clean: ## Remove .venv and everything that builds and tests leave behind.
	rm -rf .venv .venv-docs .venv-integrations .venv-versions build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
