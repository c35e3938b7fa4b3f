# Two commands: `make demo` and `make test`. Both set up .venv first, with the tested versions of constraints.txt.
#   make demo     train the demo GPT with flash and with standard attention, and say where the report is
#   make test     every test that needs no GPU
#   make docs     the site, in build/docs/index.html
#   make book     the chapter as a PDF in English and in Chinese, in build/book; needs Chromium and a Chinese font
#   make notebooks   run the chapter's notebooks and write what comes out into them
#   make matrix   the layer's tests with the oldest and the newest versions; downloads two CUDA builds of torch
#   make hub      the kernel repository for the Hugging Face hub, in build/hub
#   make lint     ruff and pyright
#   make bench    attention and a training step against their peers on this CPU, and the compile ledger for GPUs
#   make gpu      on a CUDA GPU: kernels, speed, tiles, training proof, options, memory, tests; MINUTES=13 OUT=folder
# PYTHON=python3.12 make test   takes another interpreter

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

# Waiting OpenMP threads sleep instead of spinning: several times faster where other processes want the cores.
export OMP_WAIT_POLICY := PASSIVE

.PHONY: demo test docs book notebooks hub matrix lint bench gpu clean

demo: $(VENV)/.installed
	$(RUN) -m train parity --config configs/parity_cpu.yaml

test: $(VENV)/.docs
	$(RUN) -m pytest -n auto --dist worksteal

docs: $(VENV)/.docs
	$(RUN) -m sphinx -q -W --keep-going docs build/docs

book: docs
	$(RUN) -m docs.book build/docs build/book

notebooks: $(VENV)/.docs
	$(RUN) docs/notebooks.py

matrix: $(VENV)/.installed
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt nox
	$(VENV)/bin/nox

hub: $(VENV)/.installed
	$(RUN) -m hub.build build/hub

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright

bench: $(VENV)/.installed
	$(RUN) -m benchmarks attention --device cpu --suite quick
	$(RUN) -m benchmarks training --device cpu
	$(RUN) -m benchmarks codegen --out runs

# In the environment that has the CUDA build of torch: this one sets up none.
gpu:
	python -m benchmarks gpu $(if $(MINUTES),--minutes $(MINUTES)) $(if $(OUT),--out $(OUT))

# The stamp is written last: an install that was interrupted starts again.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "flashlayer needs Python 3.11 or newer, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[train,test,hf]"
	touch $@

$(VENV)/.docs: $(VENV)/.installed
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
