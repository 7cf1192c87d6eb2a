# Every target sets up what it needs, so any of them works first in a fresh clone.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WHEEL_ENV := .cache/wheel-env
REQUESTS ?= 20000
ROUND_TRIPS ?= 20000
SEEDS ?= 4
JOBS ?= $(shell nproc)
MESSAGES ?= 1000000
BENCH := PYTHONPATH=tests/support $(BIN)/python tests/bench
CLIENTS := dynamo kserve smg

# Keeps the repository's root off sys.path, where transformers would take our kernels/ for the package
# of that name in its ecosystem.
export PYTHONSAFEPATH := 1

.DEFAULT_GOAL := help
.PHONY: help install protos demo check test wheel-env compat bench simulate ablate soak integrity fuzz gpu clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(VENV)/.installed ## Make .venv with the server and the tools of development

$(VENV)/.installed: pyproject.toml .ci/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --no-input \
		--constraint .ci/constraints.txt --editable '.[server,tracing,dev]'
	touch $@

protos: $(VENV)/.protos ## Make the gRPC stubs again where a .proto changed

$(VENV)/.protos: $(wildcard protos/tidegate/*/*.proto protos/tidegate/compat/*/*.proto) protos/hatch_build.py $(VENV)/.installed
	$(BIN)/python protos/hatch_build.py
	touch $@

demo: protos ## Serve the demo checkpoint and watch eight conversations, one of them parked
	$(BIN)/tidegate demo

check: protos ## Lint, types, direction of imports, protos
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache --no-logo # its cache misses new modules
	$(BIN)/buf lint protos
	$(BIN)/buf format --diff --exit-code protos
	$(BIN)/buf breaking protos --against protos/baseline.binpb # tidegate.v1 as released: it only grows

test: check wheel-env .cache/compat/kserve/.installed .cache/triton-oldest/.installed ## The checks, then every test against the built wheel
	$(WHEEL_ENV)/bin/python -m pytest

# An environment in which the built wheel alone provides tidegate. The .pth file lends it the libraries
# of .venv; Python does not follow the editable install's own .pth from there.
wheel-env: protos
	rm -rf $(WHEEL_ENV) .cache/dist
	$(BIN)/hatchling build --target wheel --directory .cache/dist
	$(BIN)/python -m venv --without-pip $(WHEEL_ENV)
	$(BIN)/python -m pip --python $(WHEEL_ENV) install --quiet --disable-pip-version-check --no-deps .cache/dist/*.whl
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > .cache/libraries.pth
	mv .cache/libraries.pth $(WHEEL_ENV)/lib/python3*/site-packages/

# The oldest Triton that pyproject.toml allows, found before the environment's own by PYTHONPATH.
.cache/triton-oldest/.installed: pyproject.toml
	rm -rf $(@D)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input --no-deps --no-compile \
		--target $(@D) triton==3.6.0
	touch $@

compat: wheel-env $(CLIENTS:%=.cache/compat/%/.installed) ## Other people's clients against us, and the table: client, feature, result
	$(WHEEL_ENV)/bin/python -m pytest -m '' --whole-table tests/compat

# Each client in an environment of its own: what they install would not go together.
.cache/compat/%/.installed: tests/compat/%.txt
	rm -rf $(@D)
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-input $(PIP_FLAGS) --requirement $<
	touch $@

.cache/compat/dynamo/.installed: PIP_FLAGS := --no-deps # its list is whole, and leaves some out

bench: protos ## The demo checkpoint's throughput, storms, returning turns, and what the tier costs: JSON in .cache/
	mkdir -p .cache
	$(BIN)/tidegate bench offline --model demo --requests 64 --input-len 128 --output-len 64 --json .cache/bench.json
	$(BENCH)/storm.py --model demo --device-kv-tokens 2048 --input-len 64 --output-len 128 --json .cache/storm.json
	$(BENCH)/turns.py --model demo --conversations 16 --resident 4 --json .cache/turns.json
	$(BENCH)/pressure.py --model demo --json .cache/pressure.json

simulate: protos ## Policies against loads on simulated machines, in virtual time: one table a machine
	PYTHONPATH=tests/support $(BIN)/python tests/simulation/lab.py

ablate: protos ## What each load loses where one rule of the policy is taken away, over SEEDS seeds
	PYTHONPATH=tests/support $(BIN)/python tests/simulation/ablate.py --seeds $(SEEDS)

soak: protos ## The engine in random worlds with faults, until REQUESTS have ended: 0 violations, or the seed
	PYTHONPATH=tests/support $(BIN)/python tests/simulation/soak.py --requests $(REQUESTS) --jobs $(JOBS)

integrity: protos ## ROUND_TRIPS of blocks to the host tier and back beside steps: 0 bytes differ
	PYTHONPATH=tests/support $(BIN)/python tests/simulation/integrity.py --round-trips $(ROUND_TRIPS) --jobs $(JOBS)

fuzz: protos ## MESSAGES from no sane client against a real server: 0 crashes, 0 UNKNOWN, 0 leaked blocks
	TIDEGATE_FUZZ=$(MESSAGES) $(BIN)/python -m pytest -s tests/e2e/test_fuzz.py

gpu: ## On a machine with CUDA, torch and triton: check and measure all of it, or PARTS="swap storm"
	PYTHONPATH=.src:tests/support:tests/gpu $(PYTHON) -P tests/gpu/run.py --json gpu.json $(PARTS:%=--part %)

clean: ## Remove what the targets made
	rm -rf $(VENV) .cache dist
