# make install | train | test | test-all | check        (TORCH=... and REAL_DATA=... below)

PYTHON    ?= python3
# The torch that everything is tested with; another build: make install TORCH="torch==2.12.0 --index-url ..."
TORCH     ?= torch==2.13.0
# Folder of real photographs, autoencoder and logs for the tests that need them; they skip without it.
REAL_DATA ?=
BIN       := .venv/bin
STAMP     := .venv/installed
PYTEST    := OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n 2 $(if $(REAL_DATA),--real-data $(REAL_DATA))

.PHONY: install train test test-all check

install: $(STAMP)

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

train: install
	test -d data/smoke || $(BIN)/sd-perf data synthetic --config configs/smoke.yaml
	$(BIN)/sd-perf train --config configs/smoke.yaml --fresh

test: install
	$(PYTEST) -m "not slow"

test-all: install
	$(PYTEST)

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
