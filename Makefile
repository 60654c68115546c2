# Every target sets itself up: a virtual environment in .venv (VENV=...) with Python 3.11 or newer (PYTHON=...).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO_OUT ?= demo
DEMO_FLAGS ?=
MUTATION_FLAGS ?=
# What `make smoke` installs: the checkout, or a wheel that `make dist` built.
WHEEL ?= .
# Processes the test suite is spread over; 0: one, in order.
WORKERS ?= 2
# Tests see eight CPU devices, so that sharding is exercised on any machine.
TEST_ENV := JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=8

# Flags for runs that are mostly compiling, which need not be done well (as in tests/conftest.py).
QUICK := --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false

.PHONY: demo test lint types docs docs-links pages parity multiprocess notebooks notebooks-full dist smoke extras \
	debug-pretrain gpu-rehearsal gpu-bundle mutation coverage lowest audit licences clean

$(VENV)/.installed: setup.py pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

# The original needs torch (CPU build where there is one) and none of its declared requirements to be imported.
$(VENV)/.parity: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet 'torch==2.13.0'
	$(BIN)/python -m pip install --quiet --no-deps 'cellplm==0.1.0.post2'
	touch $@

# The site needs nothing that tests or training do.
$(VENV)/.docs: setup.py pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	touch $@

demo: $(VENV)/.installed  ## embed bundled cells with the bundled model, compare, draw
	$(BIN)/cellplm demo --out $(DEMO_OUT) $(DEMO_FLAGS)

test: $(VENV)/.installed  ## the test suite, but for what needs torch or processes that train
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m 'not parity and not multiprocess'

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tools/plain_words.py --quiet --limit 1.5

types: $(VENV)/.installed
	$(BIN)/pyright

docs: $(VENV)/.docs  ## the site in docs/_build/html; every warning is an error, links within the site are checked
	JAX_PLATFORMS=cpu $(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html

pages: $(VENV)/.installed  ## open the built site, and a report of every command, in Chromium: width, contrast, both themes; skipped without it
	JAX_PLATFORMS=cpu XLA_FLAGS="$(QUICK)" $(BIN)/python tools/check_pages.py --reports $(wildcard docs/_build/html demo/report.html)

docs-links: $(VENV)/.docs  ## follow the links to other sites; needs the internet
	JAX_PLATFORMS=cpu $(BIN)/python -m sphinx -W --keep-going -q -b linkcheck docs docs/_build/links

parity: $(VENV)/.parity  ## the original, run live beside ours
	JAX_PLATFORMS=cpu XLA_FLAGS=--xla_backend_optimization_level=3 $(BIN)/python -m pytest -m parity tests

multiprocess: $(VENV)/.installed  ## the same run as 1, 2 and 4 processes; resumed on others; killed, and told to stop
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -m multiprocess tests

notebooks: $(VENV)/.parity  ## every notebook runs from top to bottom, in a reduced setting
	$(BIN)/python tools/build_notebooks.py --fast

notebooks-full: $(VENV)/.parity  ## run them in full and write docs/notebooks/*.ipynb
	$(BIN)/python tools/build_notebooks.py

debug-pretrain: $(VENV)/.installed  ## the pretraining program, end to end, in seconds: prepare, train, look
	rm -rf runs/debug runs/debug-corpus
	$(BIN)/cellplm prepare cellplm_jax/resources/pbmc3k.h5ad --out runs/debug-corpus --workers 0
	$(BIN)/cellplm info runs/debug-corpus --verify
	$(BIN)/python launch/pretrain.py --config=configs/pretrain.py:debug \
		--corpus=runs/debug-corpus --workdir=runs/debug

gpu-rehearsal: $(VENV)/.installed  ## every stage of the run on a GPU, small and on the CPU; with the original where it is installed
	$(BIN)/python benchmarks/gpu/run.py --rehearse --out gpu-rehearsal

gpu-bundle: $(VENV)/.installed  ## what a machine with a GPU and no network needs for that run, in .gpu-bundle
	PYTHON=$(abspath $(BIN))/python tools/gpu_bundle.sh

dist: $(VENV)/.installed  ## source distribution, and the wheel made from it, in dist/; checked to be complete
	rm -rf dist build
	$(BIN)/python -m build --outdir dist . >/dev/null
	$(BIN)/python tools/check_dist.py dist

smoke:  ## install, load and embed with another Python: make smoke PYTHON=python3.13 VENV=.venv313 (WHEEL=dist/....whl)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet '$(WHEEL)[train]'
	cd / && $(abspath $(BIN))/python $(abspath tools/smoke.py)

extras: smoke  ## every extra resolves there; nothing more is installed
	for extra in $$($(BIN)/python -c 'from importlib.metadata import metadata; \
			print(*metadata("cellplm-jax").get_all("Provides-Extra"))'); do \
		$(BIN)/python -m pip install --quiet --dry-run "$(WHEEL)[$$extra]" && echo "extra $$extra resolves" || exit 1; \
	done

mutation: $(VENV)/.installed  ## change the code of losses, attention, masking and latent: do the tests notice? An hour
	$(BIN)/python -m pip install --quiet --editable '.[mutation]'
	$(BIN)/python tools/mutation.py $(MUTATION_FLAGS) --out benchmarks/faults/mutation.md

coverage: $(VENV)/.installed  ## which lines `make test` runs, also in the processes that it starts
	$(BIN)/python -m pip install --quiet 'coverage>=7.10' 'pytest-cov>=7'
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m 'not parity and not multiprocess' \
		--cov=cellplm_jax --cov-report=term:skip-covered

lowest:  ## install the lowest versions that setup.py allows, and use them
	$(PYTHON) -m venv $(VENV)-lowest
	$(VENV)-lowest/bin/python -m pip install --quiet 'uv>=0.9'
	$(VENV)-lowest/bin/python -m uv pip install --quiet --python $(VENV)-lowest/bin/python --upgrade \
		--resolution lowest-direct --editable '.[train,eval,cpu]'
	JAX_PLATFORMS=cpu $(VENV)-lowest/bin/python -W ignore tools/smoke_lowest.py

audit: $(VENV)/.installed  ## known weaknesses of everything that is installed; needs the internet
	$(PYTHON) -m venv $(VENV)-audit
	$(VENV)-audit/bin/python -m pip install --quiet 'pip-audit>=2.10'
	$(BIN)/python tools/licences.py --list > $(VENV)-audit/installed.txt
	$(VENV)-audit/bin/pip-audit --strict --disable-pip --no-deps --requirement $(VENV)-audit/installed.txt

licences: $(VENV)/.parity  ## docs/licences.md, from what is installed
	$(BIN)/python tools/licences.py

clean:
	rm -rf $(VENV) $(VENV)-lowest $(VENV)-audit demo runs build dist docs/_build *.egg-info .pytest_cache .ruff_cache
