# Two commands do all the set-up: `make serve` runs the service on the model in the repository, `make test` the tests.
PYTHON ?= python3
PORT ?= 8000
ENGINE ?= cpu# or gpu: onnxruntime-gpu instead of onnxruntime
BIN := .venv/bin

.PHONY: serve test test-containers check format clean
.DELETE_ON_ERROR:

serve: .venv/service-$(ENGINE)
	@DTEM_PORT=$(PORT) DTEM_LOG_FORMAT=$${DTEM_LOG_FORMAT:-text} exec $(BIN)/python -m app

test: .venv/development
	$(BIN)/python -m pytest -m "not gpu and not container"

# On a real Docker engine: .ci/containers says what that takes, and brings what it can.
test-containers: .venv/development
	.ci/containers
	$(BIN)/python -m pytest -m container

check: .venv/development
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/development
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

.venv/service-$(ENGINE): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(ENGINE)]'
	@touch $@

.venv/development: .venv/service-$(ENGINE)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(ENGINE),ray,training,test]'
	@touch $@

clean:
	rm -rf .venv
