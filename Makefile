# make install | train | parity | resume | scores | test | test-slow | test-all | test-slurm | test-image | check
# (TORCH=... and REAL_DATA=... below)

PYTHON    ?= python3
# The torch that everything is tested with; another build: make install TORCH="torch==2.12.0 --index-url ..."
TORCH     ?= torch==2.13.0
# Folder of real photographs, autoencoder and logs for the tests that need them; they skip without it.
REAL_DATA ?=
BIN       := .venv/bin
PIP       := $(BIN)/python -m pip
STAMP     := .venv/installed
PYTEST    := OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n 2 --dist worksteal $(if $(REAL_DATA),--real-data $(REAL_DATA))

.PHONY: install train parity resume scores test test-slow test-all test-slurm test-image check

install: $(STAMP)

# A .venv without pip is one whose making was interrupted: it is completed or, where that fails, made anew.
$(STAMP): pyproject.toml
	$(PIP) --version > /dev/null 2>&1 || ($(PYTHON) -m venv .venv && $(PIP) --version > /dev/null) || \
	    $(PYTHON) -m venv --clear .venv
	$(PIP) install --quiet --disable-pip-version-check $(TORCH)
	$(PIP) install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

# The tiny world: pictures and moments beside the proof of the fast network, then training, scores, report. The dry run comes
# first because it refuses an unfinished run in seconds.
train: install
	$(BIN)/sd-perf train --config configs/smoke.yaml --fresh --dry-run > /dev/null
	$(MAKE) --no-print-directory -j 2 parity data/smoke/moments/00000.tar
	$(BIN)/sd-perf train --config configs/smoke.yaml --fresh
	$(MAKE) --no-print-directory scores

parity: install
	$(BIN)/sd-perf parity --config configs/smoke.yaml

# After Ctrl-C: the rest of what `make train` began.
resume: data/smoke/moments/00000.tar
	$(BIN)/sd-perf train --config configs/smoke.yaml --resume
	$(MAKE) --no-print-directory scores

scores: install
	$(BIN)/sd-perf evaluate runs/smoke
	$(BIN)/sd-perf report runs/smoke

data/smoke/moments/00000.tar: | install
	rm -rf data/smoke
	$(BIN)/sd-perf data scenes --output data/smoke/scenes --samples 4096 --seed 1 --uncaptioned-every 10 --shards
	$(BIN)/sd-perf data scenes --output data/smoke/prompts --samples 256 --seed 3
	$(BIN)/sd-perf data statistics --config configs/smoke.yaml --images data/smoke/prompts
	$(BIN)/sd-perf data prepare --config configs/smoke.yaml --images data/smoke/scenes \
	    --autoencoder assets/tiny/autoencoder.safetensors --samples-per-shard 4096

test: install
	$(PYTEST) -m "not slow and not slurm"

test-slow: install .venv/triton-3.6/triton .venv/large
	$(PYTEST) -m "slow and not slurm"

test-all: test test-slow

# A real Slurm of two nodes in a folder of its own: root, and Debian's packages installed or to be had by apt.
test-slurm: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/slurm -m slurm

# The oldest Triton that is supported, aside: kernels are compiled by it, too.
.venv/triton-3.6/triton: | install
	$(PIP) install --quiet --disable-pip-version-check --no-deps --target $(@D) triton==3.6.0

# Large packages that few tests need: NVIDIA DALI (0.6 GB installed), TensorBoard and W&B (0.25 GB), transformers.
.venv/large: | install
	$(PIP) install --quiet --disable-pip-version-check --editable '.[dali,pipelines,tensorboard,wandb]'
	touch $@

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck run_and_time.sh slurm/*.sh scripts/docker/*.sh .ci/run
	$(BIN)/hadolint Dockerfile

# The Dockerfile, executed on a Debian root file system: root, and apt-get install buildah mmdebstrap crun fuse-overlayfs.
test-image:
	scripts/docker/test_image.sh build/image
