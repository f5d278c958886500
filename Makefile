# Two commands do all the set-up: `make serve` runs the service on the model in the repository, `make test` the tests.
PYTHON ?= python3
PORT ?= 8000
KIT_SITE ?= /tmp/dtem-serve-kit# where the kit's wheels are unpacked on a GPU machine
SMOKE ?=# any value: gpu-report with tiny models on the CPU
ENGINE ?= cpu# or gpu: onnxruntime-gpu instead of onnxruntime
BIN := .venv/bin

.PHONY: serve test test-containers check format gpu-kit gpu-report clean
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

# What a GPU machine without a package registry lacks: wheels for its Python 3.12, in .gpu-kit/, to be taken there.
gpu-kit: .venv/service-$(ENGINE)
	$(BIN)/python -m benchmarks.gpu.kit

# On a GPU machine `make gpu-report PYTHON=python3`: that Python's own packages and the kit's, not ours.
ifeq ($(origin PYTHON),file)
gpu-report: .venv/development
	$(BIN)/python -m benchmarks.gpu $(if $(SMOKE),--smoke)
else
gpu-report:
	$(PYTHON) -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target $(KIT_SITE) .gpu-kit/*.whl
	PYTHONPATH=$(KIT_SITE) $(PYTHON) -m benchmarks.gpu $(if $(SMOKE),--smoke)
endif

.venv/service-$(ENGINE): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(ENGINE)]'
	@touch $@

.venv/development: .venv/service-$(ENGINE)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(ENGINE),ray,training,test]'
	@touch $@

clean:
	rm -rf .venv
