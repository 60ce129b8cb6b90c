# Every target works from a fresh clone: it makes the virtual environment it needs. Those that need a GPU run $(PYTHON),
# which must have a torch for it, and for test-gpu all of the extra "test"; PYTHON=.venv/bin/python is what make test has.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STUBS := clients/python
PACKAGES := clients/python:frontend:backend:kernels
PROTOS := $(shell cd protos && find weft -name '*.proto' | sort)
SERVICES := weft/engine/v1/engine.proto weft/inference/v1/inference.proto

.DEFAULT_GOAL := help
.PHONY: help demo serve test check test-gpu bench-kernels bench-compare stubs k8s clean modules

help: ## List the targets
	@grep -E '^[a-z0-9-]+:.*##' Makefile | awk -F':.*## ' '{printf "make %-13s %s\n", $$1, $$2}'

demo: $(VENV)/run ## Start both services, stream one answer over gRPC and one over HTTP, print tokens/s, exit
	$(BIN)/weft demo

serve: $(VENV)/run ## Serve the built-in model on :8000 (HTTP) and :50051 (gRPC)
	$(BIN)/weft serve

test: $(VENV)/test ## Run the tests
	$(BIN)/pytest

test-gpu: MODULES = pytest, pytest_asyncio, pytest_timeout, hypothesis, transformers, openai, sentencepiece, psutil, \
	grpc_status, kubernetes_validate, yaml, weft_frontend.server, weft_backend.server
test-gpu: modules ## Run the tests that need an NVIDIA GPU; PYTHON=.venv/bin/python, unless python3 has torch
	PYTHONPATH=$(PACKAGES) $(PYTHON) -m pytest -m gpu

bench-kernels: MODULES = benchmarks.kernels
bench-kernels: modules ## Time each kernel on an NVIDIA GPU; ARGS="--shapes 8B --json FILE"
	PYTHONPATH=$(PACKAGES):tests $(PYTHON) -m benchmarks.kernels $(ARGS)

bench-compare: MODULES = benchmarks.compare_engines, weft_backend.server
bench-compare: modules ## Time Weft and vLLM on SHAPE, a folder with a config.json; ARGS="--vllm FOLDER --json FILE"
	PYTHONPATH=$(PACKAGES):tests $(PYTHON) -m benchmarks.compare_engines $(SHAPE) $(ARGS)

modules:
	@error=$$(PYTHONPATH=$(PACKAGES):tests $(PYTHON) -c "import $(MODULES)" 2>&1) || { echo "$(PYTHON): $${error##*Error: }: \
	run pip install -e '.[test]' with it, or say PYTHON=$(BIN)/python, which make test makes" >&2; exit 1; }

check: $(VENV)/test ## Run the linters, the types, the import contracts, and compare the stubs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint protos
	@scratch=$$(mktemp -d) && $(MAKE) --no-print-directory stubs STUBS=$$scratch && \
	for part in engine inference; do diff -r -x __pycache__ -x __init__.py $$scratch/weft/$$part clients/python/weft/$$part || \
	{ echo "The stubs are out of date: run make stubs" >&2; exit 1; }; done && rm -r $$scratch && echo "The stubs are up to date"

stubs: $(VENV)/test ## Generate the Python stubs from protos/
	$(BIN)/python -m grpc_tools.protoc -I protos --python_out=$(STUBS) --pyi_out=$(STUBS) $(PROTOS)
	$(BIN)/python -m grpc_tools.protoc -I protos --grpc_python_out=$(STUBS) $(SERVICES)

k8s: ## Build the Kubernetes manifests
	kubectl kustomize k8s/base

clean: ## Remove what the targets made
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .import_linter_cache

$(VENV)/run: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[all]'
	touch $@

$(VENV)/test: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test,check]'
	touch $@
