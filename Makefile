PYTHON ?= python3
PORT ?= 8000
# Where the kit's wheels are unpacked on a GPU machine.
KIT_SITE ?= /tmp/dtem-serve-kit
# Any value: gpu-report runs tiny models on the CPU.
SMOKE ?=
# `gpu` installs onnxruntime-gpu instead of onnxruntime.
ENGINE ?= cpu
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help serve test test-containers check format gpu-kit gpu-report clean
.DELETE_ON_ERROR:

help: ## List these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

serve: .venv/service-$(ENGINE) ## Serve the reference model (PORT=8000, ENGINE=cpu or gpu)
	@exec $(BIN)/dtem serve --port $(PORT)

test: .venv/development ## Run the tests that need no container engine
	$(BIN)/python -m pytest -m "not container"

test-containers: .venv/development ## Run the tests that need Docker, Prometheus, kubectl or wrk
	.ci/containers
	$(BIN)/python -m pytest -m container --require-tools

check: .venv/development ## Run ruff, mypy and import-linter
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/development ## Format the code and apply ruff's fixes
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

gpu-kit: .venv/service-$(ENGINE) ## Collect in .gpu-kit/ the wheels that a GPU machine without a registry lacks
	$(BIN)/python -m benchmarks.gpu.kit

# On a GPU machine `make gpu-report PYTHON=python3` runs that Python's own packages and the kit's.
ifeq ($(origin PYTHON),file)
gpu-report: .venv/development ## Run the gpu tests and measurements (SMOKE=1: tiny models on the CPU)
	$(BIN)/python -m benchmarks.gpu $(if $(SMOKE),--smoke)
else
gpu-report:
	$(PYTHON) -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target $(KIT_SITE) .gpu-kit/*.whl
	PYTHONPATH=$(KIT_SITE) $(PYTHON) -m benchmarks.gpu $(if $(SMOKE),--smoke)
endif

clean: ## Remove the virtual environment
	rm -rf .venv

.venv/service-$(ENGINE): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(ENGINE)]'
	@touch $@

.venv/development: .venv/service-$(ENGINE)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(ENGINE),ray,training,test]'
	@touch $@
