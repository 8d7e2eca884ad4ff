# Every target sets up by itself: a virtual environment with the pinned versions, kept until setup.py,
# constraints.txt or the list of data packages change.
VENV := .venv
PYTHON := $(VENV)/bin/python
READY := $(VENV)/.ready
TORCH ?= $(shell grep '^torch==' constraints.txt)
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: setup demo docs notebooks test test-slow test-versions test-oldest test-newest build test-build lint format bench clean

setup: $(READY)

$(READY): setup.py constraints.txt feedback_transformers/data/packages.py
	test -x $(PYTHON) || python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet "$(TORCH)"
	$(PYTHON) -m pip install --quiet --editable ".[dev]" --constraint constraints.txt
	$(PYTHON) -m feedback_transformers.data
	touch $(READY)

demo: $(READY)
	$(PYTHON) examples/demo.py --output_dir runs/demo

# Builds the site into site/; a warning or a dead link is an error.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --quiet

# Runs the notebooks, which are kept as text.
notebooks: $(READY)
	mkdir -p runs/notebooks
	for name in docs/notebooks/*.md; do \
		$(PYTHON) -m jupytext --quiet --to ipynb --output runs/notebooks/$$(basename $$name .md).ipynb $$name; done
	cd runs/notebooks && OMP_NUM_THREADS=1 ../../$(PYTHON) -m pytest -q --nbmake --durations=5 -p no:cacheprovider -n 2 .

test: $(READY)
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2 -q --durations=10 -m "not slow"

test-slow: $(READY)
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2 -q --durations=10 -m slow

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(READY)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# The suite with the oldest and with the newest versions in the ranges of setup.py, each in an environment of its own.
# Torch is the pinned one, whose CUDA can be left out, unless TORCH says otherwise: make test-newest TORCH=torch
test-versions: test-oldest test-newest

test-oldest: $(READY)
	python3 -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install --quiet "$(TORCH)"
	$(PYTHON) tests/oldest.py > $(VENV)-oldest/constraints.txt
	$(VENV)-oldest/bin/python -m pip install --quiet --editable ".[dev]" --constraint $(VENV)-oldest/constraints.txt
	$(VENV)-oldest/bin/python -m feedback_transformers.data
	OMP_NUM_THREADS=1 $(VENV)-oldest/bin/python -m pytest -n 2 -q -m "not slow"

test-newest: $(READY)
	python3 -m venv --clear $(VENV)-newest
	$(VENV)-newest/bin/python -m pip install --quiet "$(TORCH)"
	$(VENV)-newest/bin/python -m pip install --quiet --upgrade --editable ".[dev]"
	$(VENV)-newest/bin/python -m feedback_transformers.data
	OMP_NUM_THREADS=1 $(VENV)-newest/bin/python -m pytest -n 2 -q -m "not slow"

build: $(READY)
	rm -rf build dist
	$(PYTHON) -m build

# The wheel, then the sdist, in a fresh environment with what the ranges of setup.py give, through a demo of seconds.
test-build: build
	rm -rf runs/fresh && python3 -m venv runs/fresh
	runs/fresh/bin/python -m pip install --quiet "$(TORCH)"
	runs/fresh/bin/python -m pip install --quiet "$$(ls dist/*.whl)[train,fast]"
	cd runs/fresh && bin/python -m feedback_transformers.data
	runs/fresh/bin/python examples/demo.py --smoke --output_dir runs/fresh/wheel
	runs/fresh/bin/python -m pip install --quiet --force-reinstall --no-deps dist/*.tar.gz
	runs/fresh/bin/python examples/demo.py --smoke --output_dir runs/fresh/sdist

bench: $(READY)
	$(PYTHON) -m pip install --quiet --editable ".[bench]" --constraint constraints.txt
	$(PYTHON) -m pip install --quiet --no-deps kaidoku==1.0.1 $$($(PYTHON) -m benchmarks.retrofit.packages)
	$(PYTHON) -m benchmarks

clean:
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-newest runs build dist *.egg-info
