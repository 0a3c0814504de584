# megatron-lsh: a fresh machine with Python >= 3.10, git and make needs nothing but `make pretrain` and `make test`.
# Variables are given on the command line: make pretrain NPROC=4 ITERS=1000

PYTHON      ?=
VENV        ?= .venv
TORCH       ?=
TORCH_INDEX ?=
export PYTHON TORCH TORCH_INDEX

MODEL   ?= gpt
ifeq ($(filter gpt bert t5 swin,$(MODEL)),)
$(error MODEL=$(MODEL) must be gpt, bert, t5 or swin)
endif
NPROC   ?=
ITERS   ?=
RUN_DIR ?= runs/$(MODEL)-moe-lsh
RESUME  ?=
RESTART ?=
ARGS    ?=

PYTEST_ARGS ?=
JOBS        ?= 2

.DEFAULT_GOAL := help
.PHONY: help install data pretrain gpu test test-all lint clean clean-venv

help:
	@echo "make pretrain    install, prepare the corpus, pretrain a small MoE with the LSH-compressed all-to-all"
	@echo "                   MODEL=gpt     gpt, bert, t5 or swin"
	@echo "                   NPROC=n       ranks (default: every GPU, else 2 CPU processes)"
	@echo "                   ITERS=300     iterations (500 with MODEL=swin)"
	@echo "                   RUN_DIR=...   where checkpoints, metrics and the plot go (default: runs/MODEL-moe-lsh)"
	@echo "                   RESUME=1      continue the run in RUN_DIR;  RESTART=1  move it aside and start afresh"
	@echo "                   ARGS='...'    further flags, e.g. ARGS='--moe-token-dispatcher-type alltoall'"
	@echo "make data        only the data of MODEL: corpus and tokenizer in data/stdlib/, pictures in data/digits/"
	@echo "make test        install with the development tools, then lint, type-check and run all tests on the CPU"
	@echo "                   PYTEST_ARGS='tests/moe -k router'   JOBS=2, files at a time (0: in one process, for a debugger)"
	@echo "make test-all    the same, with the tests that take more than ten seconds each"
	@echo "make gpu         on a machine with a GPU: build, tests, sanitizers, kernels, layer, restoration, training"
	@echo "                   PART=layer    one of them alone;  ARGS=--dry-run  on a CPU at a small size"
	@echo "make lint        ruff and mypy only"
	@echo "make install     the virtual environment only"
	@echo "                   PYTHON=python3.12   VENV=.venv   TORCH='torch==2.13.0'   TORCH_INDEX=URL"
	@echo "make clean       remove caches and build products (keeps the environment, data/ and runs/)"
	@echo "make clean-venv  remove the virtual environment"

# A file's tests stay in one process: they share what is slow to set up.
PYTEST = OMP_NUM_THREADS=1 MPLBACKEND=Agg HF_HUB_OFFLINE=1 $(VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile

# Two stages of the environment: what training needs, and what developing needs on top. Each is made again when its inputs change.
INSTALLED     := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev

$(INSTALLED): pyproject.toml scripts/install.sh $(wildcard setup.py kernels/*.*)
	@scripts/install.sh "$(VENV)"
	@touch $@

$(INSTALLED_DEV): $(INSTALLED)
	@scripts/install.sh "$(VENV)" dev,data
	@touch $@

install: $(INSTALLED)

data: $(INSTALLED)
	@PATH="$(abspath $(VENV))/bin:$$PATH" scripts/prepare_readme_data.sh "$(if $(filter swin,$(MODEL)),data/digits,data/stdlib)" "$(MODEL)"

pretrain: $(INSTALLED)
	@VENV="$(VENV)" MODEL="$(MODEL)" NPROC="$(NPROC)" ITERS="$(ITERS)" RUN_DIR="$(RUN_DIR)" RESUME="$(RESUME)" \
		RESTART="$(RESTART)" scripts/pretrain_readme.sh $(ARGS)

lint: $(INSTALLED_DEV)
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m mypy

gpu: $(INSTALLED_DEV)
	$(VENV)/bin/python -m benchmarks.gpu $(PART) $(ARGS)

test: lint
	$(PYTEST) $(PYTEST_ARGS)

# Slow tests measure time and memory: nothing runs beside them.
test-all: JOBS = 0
test-all: lint
	$(PYTEST) -m '' $(PYTEST_ARGS)

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find megatron_lsh tests tools benchmarks kernels -name __pycache__ -type d -prune -exec rm -rf {} +
	find megatron_lsh kernels \( -name '*.so' -o -name '*.o' -o -name _kernels.txt \) -delete
	rm -f $(INSTALLED) $(INSTALLED_DEV)

clean-venv:
	rm -rf "$(VENV)"
