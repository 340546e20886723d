# `make` lists the targets. The environment is .venv, made on first use and again only when
# pyproject.toml or constraints.txt change; its stamp is .venv/.installed.
#
# Settings, all optional:
#   PYTHON=python3.12    interpreter that .venv is made with (3.11 or later)
#   PY=python3           run with this interpreter as it is; .venv is neither made nor used
#   TORCH_INDEX=<url>    package index to take torch from, a CPU-only one for example
#   ARGS="..."           more arguments for the command of the target
#   NAME=, KIND=         of `make new`
PYTHON = python3
PY     = .venv/bin/python
TORCH_INDEX ?=
ARGS   =
KIND   = matrix

# One thread a process: two workers share two cores, and OpenMP threads that spin on a busy machine cost
# several times the work they do.
export OMP_NUM_THREADS ?= 1
export MKL_NUM_THREADS ?= 1

STAMP := .venv/.installed
ifeq ($(PY),.venv/bin/python)
ENV := $(STAMP)
FRAMEWORKS := .venv/.frameworks
SPHINX := .venv/.docs
RELEASE := .venv/.release
else
ENV :=
FRAMEWORKS :=
SPHINX :=
RELEASE :=
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
endif

TYPED := emerging_optimizers $(wildcard tests/reference benchmarks/step)
PYTEST := $(PY) -m pytest
PARALLEL := -n 2 --dist worksteal

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help env demo grid match findings notebooks docs docs-check bench bench-gpu bench-page test check lint format-check types contracts lock audit release-check test-all test-frameworks test-gpu test-kernels coverage mutate new tables fingerprint fingerprint-check format clean clean-env

help: ## list the targets
	@echo "emerging-optimizers: make <target>"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-17s %s\n", $$1, $$2}' Makefile
	@echo "options: PYTHON=python3.12 (for .venv)  PY=python3 (no .venv)  TORCH_INDEX=<url>  ARGS=\"...\""

env: $(ENV) ## make the environment in .venv (the other targets do it by themselves)
	@echo "env: $(PY) is ready"

demo: $(ENV) ## train a small GPT on real text with AdamW, Muon and SOAP and draw the curves
	@echo "demo: a small GPT on real text with AdamW, Muon and SOAP, one after the other"
	$(PY) -m emerging_optimizers.lab train $(ARGS)

grid: $(ENV) ## run the learning-rate grid behind the demo's defaults
	@echo "grid: every optimizer over its learning rates (longer than the demo)"
	$(PY) -m emerging_optimizers.lab grid --resume $(ARGS)

match: $(ENV) ## fit the factors of match="adamw" on three small tasks (40 minutes; needs scikit-learn's digits)
	@echo "match: every optimizer over its factor and AdamW's rate; what the results hold is not trained again"
	$(PY) -m benchmarks.match $(ARGS)

# Each command also leaves its tables, ready for the pages under docs/, in runs/*/tables.md.
findings: $(ENV) ## repeat the experiments of docs/spikes.md and docs/precision.md and renew their figures
	@echo "findings: the spike, eigenbasis and precision experiments, then docs/images"
	$(PY) -m emerging_optimizers.lab spike --out runs/spike --overwrite
	$(PY) -m emerging_optimizers.lab eigenbasis --out runs/eigenbasis --overwrite
	$(PY) -m emerging_optimizers.lab precision --out runs/precision --overwrite
	@for name in warmup sweep aftershock spectra; do cp runs/spike/$$name.png docs/images/spike_$$name.png; done
	@cp runs/eigenbasis/eigenbasis.png docs/images/precision_spike.png
	@cp runs/precision/precision.png docs/images/

bench: $(ENV) ## time a step of every installed optimizer against its floor (half an hour; ARGS="--quick" minutes)
	@echo "bench: optimizer steps on the CPU, every arm in turn; docs/performance.md says how to read it"
	$(PY) -m benchmarks.step run $(ARGS)

bench-gpu: $(ENV) ## the same on a CUDA device, within ten minutes
	@echo "bench-gpu: optimizer steps on the GPU, every arm in turn"
	$(PY) -m benchmarks.step run --device cuda --minutes 8 --patience 60 $(ARGS)

bench-page: $(ENV) ## write the results of bench and bench-gpu into docs/performance.md
	$(PY) -m benchmarks.step render $(ARGS)

notebooks: $(ENV) ## execute the notebooks of examples/ in place
	@echo "notebooks: each in a kernel of its own (minutes)"
	$(PY) examples/execute.py examples/*/*.ipynb

docs: $(SPHINX) ## build the documentation as a site, site/index.html; a warning is an error
	@echo "docs: a minute or two; the notebooks are executed, the pages of the optimizers are made from the code"
	@$(PY) -c "import sphinx, myst_nb, pydata_sphinx_theme, mmdr" 2>/dev/null || { \
	  echo "docs: $(PY) needs the extra 'docs': $(PY) -m pip install -c constraints.txt -e '.[docs]'"; exit 1; }
	$(PY) -m sphinx -W --keep-going -q -b html -d build/docs docs site $(ARGS)

docs-check: $(SPHINX) ## build the site anew and look at it: links, titles, pictures, and in a Chromium where there is one
	$(PYTEST) tests/test_site.py $(ARGS)

test: check ## everything CI runs: check, then the tests that are not slow
	@echo "test: pytest, two workers of one thread each"
	$(PYTEST) $(PARALLEL) -m "not slow" $(ARGS)

check: lint format-check types contracts ## the static part: lint, format, types, import contracts

lint: $(ENV)
	@echo "lint: ruff"
	@$(PY) -m ruff check .

format-check: $(ENV)
	@echo "format: ruff (make format mends it)"
	@$(PY) -m ruff format --check .

types: $(ENV)
	@echo "types: mypy --strict over $(TYPED) (the first run reads torch: half a minute)"
	@$(PY) -m mypy $(TYPED)

contracts: $(ENV)
	@echo "contracts: import-linter"
	@$(PY) -c "from importlinter.cli import lint_imports_command as lint; lint()" --no-logo

lock: ## write requirements-dev.lock again: the packages of development, docs and releases with their hashes (needs uv)
	@uv pip compile pyproject.toml --extra lab --extra dev --extra docs --extra release --universal --python-version 3.11 --generate-hashes \
	  -c constraints.txt --no-emit-package torch --no-header --no-annotate -q \
	  | awk '/^[a-z]/ {keep = $$0 !~ /^(cuda|nvidia|triton)/} keep' > requirements-dev.lock

audit: $(ENV) ## ask whether a package of requirements-dev.lock has a known vulnerability (needs the network)
	@$(PY) -m tests.audit

release-check: $(RELEASE) ## build dist/, look into wheel and sdist, use each in a clean environment (needs an index)
	@TORCH_INDEX="$(TORCH_INDEX)" $(PY) -m tests.release $(ARGS)

test-all: check audit $(FRAMEWORKS) ## like test, with the slow sweeps and the examples of every framework
	@echo "test-all: pytest with the slow sweeps"
	$(PYTEST) $(PARALLEL) $(ARGS)

test-frameworks: $(FRAMEWORKS) ## every block and line of docs/frameworks.md and its examples (timm where it is installed)
	$(PYTEST) tests/integrations $(ARGS)

# In coverage.py's words: the files of all processes are combined by pytest-cov.
coverage: $(ENV) ## the tests that are not slow, and how many lines and branches they run (fails below 95 % of either)
	@echo "coverage: pytest, two workers of one thread each; what is never run is listed by file"
	$(PYTEST) $(PARALLEL) -m "not slow" --cov --cov-report=term-missing:skip-covered $(ARGS)
	@$(PY) -m tests.covered

mutate: $(ENV) ## break lines of engine/, linalg/ and distributed/ at random and see whether a test fails (an hour)
	@echo "mutate: 100 mutants in a copy, one after the other; ARGS=\"--count 20 --seed 7\" takes others"
	nice -n 10 $(PY) -m tests.mutate $(ARGS)

new: $(ENV) ## start an optimizer: make new NAME=cautious_muon [KIND=elementwise]
	@$(PY) -m tests.new_optimizer "$(NAME)" "$(KIND)"
	@$(PY) -m tests.tables

tables: $(ENV) ## write what follows from entries.py: the tables of optimizers, the imports for type checkers
	@$(PY) -m tests.tables

fingerprint: $(ENV) ## record twenty steps of every optimizer bit for bit, before a rebuild (runs/fingerprint.pt)
	@$(PY) -m tests.fingerprint record

fingerprint-check: $(ENV) ## compare with what `make fingerprint` has recorded on this machine
	@$(PY) -m tests.fingerprint check

# One process, since workers would share one device. pytest-timeout may be missing from a machine that was
# set up by others, so a setting that pytest does not know is no error here.
test-gpu: $(ENV) ## the tests that need a CUDA device (PY=python3 runs with the machine's own torch)
	@$(PY) -c "import torch as t; print('test-gpu: torch', t.__version__, 'on', t.cuda.get_device_name() \
	  if t.cuda.is_available() else 'a machine without a CUDA device: every test will be skipped')"
	$(PYTEST) -m gpu -W "ignore::pytest.PytestConfigWarning" $(ARGS)

test-kernels: $(ENV) ## the triton kernels interpreted on the CPU, and compiled for devices that are not here (needs triton)
	TRITON_INTERPRET=1 $(PYTEST) tests/linalg/test_syrk.py $(ARGS)
	$(PYTEST) tests/linalg/test_syrk.py -k compiles $(ARGS)

format: $(ENV) ## format the code and mend what ruff can mend
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

clean: ## remove caches and build output (the environment and runs/ stay)
	rm -rf build dist site docs/generated jupyter_execute .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -path './.venv*' -prune -o -name __pycache__ -prune -exec rm -rf {} +

clean-env: ## remove the environment
	rm -rf .venv

# --- the environment ----------------------------------------------------------------------------------

# The stamp does not count when .venv lost its interpreter, or has another than the one asked for.
ifeq ($(realpath .venv/bin/python),)
.PHONY: $(STAMP)
else ifeq ($(origin PYTHON),command line)
ifneq ($(shell .venv/bin/python -V 2>&1),$(shell $(PYTHON) -V 2>&1))
.PHONY: $(STAMP)
REMAKE := yes
endif
endif

# Bytecode is compiled now, as pip does it: where Python may not write it later (PYTHONDONTWRITEBYTECODE), every command
# would compile torch again, up to ten seconds.
# With TORCH_INDEX, torch is taken from there and nothing else is: such an index often carries old copies of
# other packages. The second step finds torch installed and leaves it.
UV  := UV_FIND_LINKS="$${UV_FIND_LINKS:-$(PIP_FIND_LINKS)}" .venv/bin/uv pip install -p .venv --compile-bytecode -c constraints.txt
PIP := .venv/bin/python -m pip install --disable-pip-version-check -c constraints.txt
UV_TORCH  := $(if $(TORCH_INDEX),$(UV) --default-index "$(TORCH_INDEX)" --no-deps torch &&)
PIP_TORCH := $(if $(TORCH_INDEX),$(PIP) --index-url "$(TORCH_INDEX)" --no-deps torch &&)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "env: Python 3.11 or later is needed, and '$(PYTHON)' is: $$($(PYTHON) -V 2>&1 | head -n 1)"; \
	  echo "env: name another one with  make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@if [ -n "$(REMAKE)" ] || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then \
	  echo "env: making .venv with $$($(PYTHON) -V)"; $(PYTHON) -m venv --clear .venv; fi
	@echo "env: installing the library, the lab and the tools into .venv (torch is the large one)"
	@if .venv/bin/python -m pip install --quiet --disable-pip-version-check uv && \
	    $(UV_TORCH) $(UV) -e '.[lab,dev]'; \
	  then :; \
	else \
	  echo "env: uv is not available or failed (its message is above): going on with pip, which is slower"; \
	  $(PIP_TORCH) $(PIP) -e '.[lab,dev]'; \
	fi
	@touch $@

# An extra that one target needs.
.venv/.frameworks .venv/.docs .venv/.release: $(STAMP)
	@echo "env: installing the extra '$(@:.venv/.%=%)'"
	@$(UV) -e '.[lab,dev,$(@:.venv/.%=%)]' || $(PIP) -e '.[lab,dev,$(@:.venv/.%=%)]'
	@touch $@
