# SPDX-License-Identifier: Apache-2.0
# `make` alone lists the targets. Everything runs in .venv, which `make setup` creates.

PYTHON ?= python3
BIN := .venv/bin
# For recipes that run the environment's programs: some of them look for others beside them on PATH,
# such as torch for ninja. Not for all of make, since `setup` must not run in the environment.
ACTIVATE := export PATH="$(CURDIR)/$(BIN):$$PATH" &&

# What `make serve` serves. An empty MODEL is the demo model, an empty QUANT means 16 bits.
HOST ?= 127.0.0.1
PORT ?= 8000
MODEL ?=
QUANT ?= smoothquant_plus
# On a CPU, vLLM would want to find 92 % of the memory free, and take most of that for its KV cache.
CPU_GIB := $(if $(shell command -v nvidia-smi),,4)
# Passed through to `vllm serve` or pytest, for instance ARGS="--max-num-seqs 8".
ARGS ?=
# Processes of `make test`. Each runs one engine at a time, which takes up to 2 GB.
JOBS ?= 2

.DEFAULT_GOAL := help
.PHONY: help setup serve test test-slow test-next lint format clean

help:  ## list the targets
	@echo "usage: make TARGET [VARIABLE=value ...]"
	@sed -n 's/^\([a-z-]*\):.*## /  \1\t/p' $(MAKEFILE_LIST) | expand -t 14
	@echo "serve takes PORT=8000 HOST=127.0.0.1 MODEL=<folder or hub name> QUANT=smoothquant_plus ARGS=..."

setup:  ## make .venv with vLLM, this package and the demo model
	@$(PYTHON) tools/setup_env.py

# vLLM loads our check of streaming requests only if this names the plugin. Without the check, vLLM
# answers bad ones with HTTP 200 and an error event.
serve: export VLLM_PLUGINS ?= compress
serve: setup  ## start an OpenAI-compatible server with a compressed model
# The demo model runs eagerly, because compiling takes a minute and gains it nothing, and in little
# memory: 1 GiB of KV cache on CPU, and no claim on the 92 % that vLLM would want to find free.
ifeq ($(strip $(MODEL)),)
	@$(ACTIVATE) model=$$($(BIN)/python -m vllm_plugin.demo_model) && \
	export VLLM_CPU_KVCACHE_SPACE=$${VLLM_CPU_KVCACHE_SPACE:-1} && \
	exec $(BIN)/vllm serve "$$model" --served-model-name smollm2-135m --max-model-len 2048 \
	    --enforce-eager --gpu-memory-utilization 0.4 \
	    --host $(HOST) --port $(PORT) $(if $(QUANT),--quantization $(QUANT)) $(ARGS)
else
	@$(ACTIVATE) $(if $(CPU_GIB),export VLLM_CPU_KVCACHE_SPACE=$${VLLM_CPU_KVCACHE_SPACE:-$(CPU_GIB)} &&) \
	exec $(BIN)/vllm serve "$(MODEL)" \
	    --host $(HOST) --port $(PORT) $(if $(QUANT),--quantization $(QUANT)) $(ARGS)
endif

test: setup  ## run the fast tests
	@$(ACTIVATE) $(BIN)/python -m pytest -m "not slow" -n $(JOBS) --dist loadfile $(ARGS)

test-slow: setup  ## run the slow tests: servers, whole models
	@$(ACTIVATE) $(BIN)/python -m pytest -m slow $(ARGS)

test-next: setup  ## run what depends on vLLM on the Python of the next vLLM (ARGS="--help")
	@$(ACTIVATE) $(BIN)/python tools/next_vllm.py $(ARGS)

lint: $(BIN)/ruff  ## check style, types and spelling, as pre-commit does
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/typos

format: $(BIN)/ruff  ## let ruff repair and format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(BIN)/ruff: | setup
	$(BIN)/python -m pip install --quiet --editable '.[dev]'

clean:  ## remove what builds and tools left behind (.venv stays)
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
