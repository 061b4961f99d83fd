# Everything runs in .venv, which every target sets up by itself (CPU build of vLLM, see deploy/cpu).
# `make demo PYTHON=/path/to/python3.12` chooses the interpreter it is made with.

VENV := .venv
RUN := $(VENV)/bin/python
# `python3` comes first: wheels on an offline machine are usually made for the default interpreter.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& echo $$python && break; done)

export VLLM_NO_USAGE_STATS = 1
export DO_NOT_TRACK = 1
# Tests make their checkpoints. The demo does not get these: it may be asked for a real model.
OFFLINE := test test-unit fidelity pictures needle needle-quick places finetune \
	bench bench-quick bench-gpu gpu-session fuzz soak
$(OFFLINE): export HF_HUB_OFFLINE = 1
$(OFFLINE): export TRANSFORMERS_OFFLINE = 1

.DEFAULT_GOAL := help
.PHONY: help venv demo image-test lint sbom audit clean $(OFFLINE)

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(RUN):
	@test -n "$(PYTHON)" || { echo "Python 3.11 or later with the venv module is needed" \
		"(Debian, Ubuntu: apt-get install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

venv: $(RUN) ## create or update the environment
	@$(RUN) deploy/cpu/install.py

demo: venv ## serve a small checkpoint on the CPU, ask about a video, show what was computed (KEEP=1)
	@$(RUN) examples/demo/demo.py $(if $(KEEP),--keep-server) $(ARGS)

test: venv ## run all tests; fetches Chromium, promtool, kubectl and lmms-eval if it may
	@deploy/test/tools.sh $(VENV)/bin
	$(RUN) -m pytest -n 2 --dist loadscope --durations 40 $(ARGS)

test-unit: venv ## run the tests that start no engine and no server
	$(RUN) -m pytest -n 2 --dist loadscope -m "not engine and not server" $(ARGS)

fidelity: venv ## compare the tile rule with the paper's per-token rule: table and picture
	$(RUN) benchmarks/fidelity.py $(ARGS)

pictures: venv ## draw the cube order and a selection, for docs/concepts.md
	$(RUN) benchmarks/pictures.py $(ARGS)

needle: venv ## what sparsity costs: accuracy against FLOPs, through real servers (under an hour)
	$(RUN) -m benchmarks.needle $(ARGS)

needle-quick: venv ## a corner of it, in minutes; changes nothing in docs/
	$(RUN) -m benchmarks.needle --quick $(ARGS)

places: venv ## all methods at equal FLOPs where tokens stand for places (an hour; ARGS=--full)
	$(RUN) -m benchmarks.needle --bed places --offline $(ARGS)

finetune: venv ## what a sparse fine-tune of the needle model wins back
	$(RUN) benchmarks/finetune.py $(ARGS)

bench: venv ## seconds: attention, FFN, servers side by side (about half an hour)
	$(RUN) benchmarks/speed $(ARGS)

bench-quick: venv ## a small part of it
	$(RUN) benchmarks/speed --quick $(ARGS)

bench-gpu: venv ## attention on a CUDA GPU, ours against dense; says so where there is none
	$(RUN) benchmarks/gpu_attention.py $(ARGS)

fuzz: venv ## random steps against the naive twins (ARGS="--minutes 5 --seed 1", or --engine)
	$(RUN) tests/fuzz $(ARGS)

soak: venv ## a server under mixed traffic, ten minutes (ARGS="--minutes 60")
	$(RUN) -m benchmarks.soak $(ARGS)

gpu-session: venv ## all that is to be measured on a CUDA GPU, kernels checked first (8 minutes)
	PYTHON=$(RUN) benchmarks/gpu_session.sh $(ARGS)

image-test: venv ## build both container images and run the CPU one (root, Debian; ten minutes)
	$(RUN) deploy/test/images.py $(if $(KEEP),--keep) $(ARGS)

lint: venv ## check style
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

sbom: venv ## list what the environment holds, as CycloneDX (sbom.json)
	deploy/supply.sh sbom $(RUN)

audit: venv ## ask the package index for known vulnerabilities of the environment
	deploy/supply.sh audit $(RUN)

clean: ## remove the environment, the demo's files and caches
	rm -rf $(VENV) .demo .pytest_cache .ruff_cache build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
