PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-engines load-in-sglang fuzz faults nightly package lint types check model benchmarks rootless-benchmarks network-benchmarks reference clean

demo: $(VENV)/installed  ## profile, plan, run and show the embedded model
	$(BIN)/coterie demo

test: $(VENV)/installed  ## the whole test suite
	$(BIN)/python -m pytest

test-engines: $(VENV)/installed  ## released SGLang, vLLM and vllm-ascend load what is exported; downloads 105 MB
	COTERIE_TEST_ENGINES=1 $(BIN)/python -m pytest tests/test_engines.py tests/test_checkpoint.py -rs

PLAN ?= coterie-demo/plan.json
load-in-sglang: $(VENV)/installed  ## SGLang's own loaders, two releases of them, read PLAN=plan.json, exported; downloads 40 MB
	COTERIE_TEST_ENGINES=1 COTERIE_OWN_PLAN=$(PLAN) $(BIN)/python -m pytest tests/test_engines.py -k own_plan -n 0 -q -s -rs

fuzz: $(VENV)/installed  ## 3,000 broken inputs, about 3 minutes, for every night; `make test` has 300
	COTERIE_FUZZ=3000 $(BIN)/python -m pytest tests/test_fuzz.py

faults: $(VENV)/installed  ## each command killed 20 times at a random moment, about 10 minutes; `make test` kills it once
	COTERIE_FAULTS=20 $(BIN)/python -m pytest tests/test_faults.py

package:  ## build, install in a fresh environment and run there; `make package WITH=torch==2.14.1`, or WITH=lowest
	.ci/package $(WITH)

nightly: fuzz faults test-engines package  ## what takes too long for every change
	$(MAKE) package WITH=lowest

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed
	$(BIN)/mypy

check: lint types test  ## what has to pass before a change lands

reference: $(VENV)/installed  ## write docs/reference again
	$(BIN)/python docs/make_reference.py

model: $(VENV)/installed  ## train the embedded model again, about an hour and a half on 2 cores
	$(BIN)/python -m pip install --quiet --constraint requirements.lock --editable '.[zoo]'
	$(BIN)/python -m profiler.zoo.train

benchmarks: rootless-benchmarks network-benchmarks  ## measure again all that benchmarks/ holds: over 2 hours, idle, as root

rootless-benchmarks: $(VENV)/installed  ## measure again what benchmarks/results holds
	$(BIN)/python -m benchmarks.coactivation
	$(BIN)/python -m benchmarks.recording
	$(BIN)/python -m benchmarks.streaming
	$(BIN)/python -m benchmarks.routing_structure
	$(BIN)/python -m benchmarks.planner
	$(BIN)/python -m benchmarks.permuting
	$(BIN)/python -m benchmarks.cost_model
	$(BIN)/python -m benchmarks.certificates
	$(BIN)/python -m benchmarks.constraints

NETWORK_PARTS := prefill training decode nodes deepseek-v2-lite gpt-oss-20b maps one-machine
network-benchmarks: demo  ## measure again what benchmarks/runtime holds, twice, on an idle machine; as root
	$(BIN)/python -m benchmarks.runtime plans coterie-demo
	for run in 1 2; do for part in $(NETWORK_PARTS); do $(BIN)/python -m benchmarks.runtime $$part $$run || exit 1; done; done

$(VENV)/installed: pyproject.toml requirements.lock
	$(PYTHON) -c 'import sys; sys.exit(f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}; set PYTHON=..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
