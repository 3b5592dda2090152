# make train   a first run: two ranks train on the standard library's own sources
# make test    the whole suite; make check: types and style; make bench: the communication benchmark (root)
# make docs    the documentation as a site, in build/docs
VENV   ?= .venv
PYTHON ?= python3
BIN    := $(VENV)/bin
# Test files side by side; the tests of one file stay together, in order.
WORKERS ?= 4
READY  := $(VENV)/.ready
# Hundreds of processes import the same modules.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: train test check docs bench clean env
env: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,mpi,deepspeed,docs]'
	touch $@

train: $(READY)
	$(BIN)/outlast launch configs/stdlib_gpt.toml --nproc-per-node 2 $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(READY)
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs build/docs

bench: $(READY)
	$(BIN)/python -m benchmarks.comm --rounds 4 --train 0 --tokens 128 $(ARGS)

clean:
	rm -rf $(VENV) dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis
