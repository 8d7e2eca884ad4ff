# Every target sets up by itself: a virtual environment with the pinned versions, kept until setup.py,
# constraints.txt or the list of data packages change.
VENV := .venv
PYTHON := $(VENV)/bin/python
READY := $(VENV)/.ready
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: setup demo test test-slow lint format bench clean

setup: $(READY)

$(READY): setup.py constraints.txt feedback_transformers/data/packages.py
	test -x $(PYTHON) || python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(PYTHON) -m pip install --quiet --editable ".[dev]" --constraint constraints.txt
	$(PYTHON) -m feedback_transformers.data
	touch $(READY)

demo: $(READY)
	$(PYTHON) examples/demo.py --output_dir runs/demo

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

bench: $(READY)
	$(PYTHON) -m pip install --quiet --editable ".[bench]" --constraint constraints.txt
	$(PYTHON) -m pip install --quiet --no-deps kaidoku==1.0.1 $$($(PYTHON) -m benchmarks.retrofit.packages)
	$(PYTHON) -m benchmarks

clean:
	rm -rf $(VENV) runs build dist *.egg-info
