# make train   a first run: two ranks train on the standard library's own sources
# make test    the whole suite; make check: types and style; make bench: the communication benchmark (root)
VENV   ?= .venv
PYTHON ?= python3
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: train test check bench clean env
env: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,mpi,deepspeed]'
	touch $@

train: $(READY)
	$(BIN)/outlast launch configs/stdlib_gpt.toml --nproc-per-node 2 $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest $(ARGS)

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python -m benchmarks.comm --rounds 4 --train 0 --tokens 128 $(ARGS)

clean:
	rm -rf $(VENV) dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis
