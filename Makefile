PYTHON ?= python3
PORT ?= 8000
# `gpu` installs onnxruntime-gpu instead of onnxruntime.
ENGINE ?= cpu
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help serve test test-containers check format clean
.DELETE_ON_ERROR:

help: ## List these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

serve: .venv/service-$(ENGINE) ## Serve the reference model (PORT=8000, ENGINE=cpu or gpu)
	@DTEM_PORT=$(PORT) DTEM_LOG_FORMAT=$${DTEM_LOG_FORMAT:-text} exec $(BIN)/python -m app

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

clean: ## Remove the virtual environment
	rm -rf .venv

.venv/service-$(ENGINE): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(ENGINE)]'
	@touch $@

.venv/development: .venv/service-$(ENGINE)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(ENGINE),ray,training,test]'
	@touch $@
