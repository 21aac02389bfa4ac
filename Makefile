# One way to run things, the same for people and CI. `make help` lists them.

SHELL := /bin/bash
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STREAM_VENV := .venv-stream
UV := $(BIN)/uv
# More lanes than cores: tests mostly wait. Each lane has stacks of its own, of about 1 GB.
LANES ?= 3
IN_LANES := --numprocesses $(LANES)
CODE := features stores ingest server batch_job stream_job deploy telemetry clients protos tests

.DEFAULT_GOAL := help
.PHONY: help setup gen lock check format test flaky demo bench parity chaos stream-package go-clients up down clean

help: ## Say what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.ready clients/src/tally/v1/__init__.py $(STREAM_VENV)/.ready deploy/jars/.ready ## Set up everything locked: .venv, .venv-stream for Flink, Java's jars, generated code

$(VENV)/.ready: requirements.lock requirements-bootstrap.lock pyproject.toml clients/pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "Python 3.11 is needed: set PYTHON to one"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-bootstrap.lock
	$(UV) pip sync --quiet --compile-bytecode --python $(BIN)/python --require-hashes requirements.lock
	@$(BIN)/python protos/generate.py
	$(UV) pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation -e ./clients -e .
	@$(BIN)/python -c "import features.answers" # compiles the core, once
	@touch $@

# PyFlink pins old versions of half of what the rest needs: an environment of its own.
$(STREAM_VENV)/.ready: stream_job/requirements.lock $(VENV)/.ready
	$(PYTHON) -m venv $(STREAM_VENV)
	$(UV) pip sync --quiet --compile-bytecode --python $(STREAM_VENV)/bin/python --require-hashes stream_job/requirements.lock
	@PYTHONPATH=. $(STREAM_VENV)/bin/python -c "import features.answers" # compiles the core, once
	@touch $@

deploy/jars/.ready: deploy/jars/kafka/jgo.lock.toml deploy/jars/flink/jgo.lock.toml $(VENV)/.ready
	@$(BIN)/python -m deploy.jars
	@touch $@

clients/src/tally/v1/__init__.py: $(wildcard protos/tally/v1/*.proto) protos/generate.py $(VENV)/.ready
	@$(BIN)/python protos/generate.py

gen: setup ## Build the contract's Python code and the pages made from the code
	@$(BIN)/python protos/generate.py
	@$(BIN)/python -m docs.generate

lock: ## Resolve requirements.in anew
	$(UV) pip compile --quiet --upgrade --generate-hashes --no-emit-find-links --no-annotate --no-header --python-version 3.11 requirements.in -o requirements.lock
	$(UV) pip compile --quiet --upgrade --generate-hashes --no-emit-find-links --no-annotate --no-header --python-version 3.11 requirements-bootstrap.in -o requirements-bootstrap.lock
	$(UV) pip compile --quiet --upgrade --generate-hashes --no-emit-find-links --no-annotate --no-header --python-version 3.11 stream_job/requirements.in -o stream_job/requirements.lock

format: setup ## Format the code
	@$(BIN)/ruff format --quiet $(CODE) docs
	@$(BIN)/ruff check --quiet --fix $(CODE) docs
	@$(BIN)/buf format -w protos

check: setup ## Lint, types, contract, import direction, generated pages
	$(BIN)/ruff format --check $(CODE) docs
	$(BIN)/ruff check $(CODE) docs
	$(BIN)/mypy features stores ingest server batch_job stream_job deploy telemetry clients/src/tally tests docs
	$(BIN)/buf lint protos
	$(BIN)/buf format --diff --exit-code protos
	@if git cat-file -e main:protos 2>/dev/null; then $(BIN)/buf breaking protos --against '.git#branch=main,subdir=protos'; \
	else echo "buf breaking: there is no contract on main to compare with"; fi
	$(BIN)/lint-imports
	$(BIN)/python -m docs.generate --check

test: setup ## Run every test, in lanes beside one another (LANES)
	$(BIN)/python -m pytest $(IN_LANES) --durations 20

flaky: setup ## Run new and changed tests ten times: those that differ from main, or from BASE
	@LANES=$(LANES) $(BIN)/python -m tests.flaky $(BASE)

demo: setup ## Start the stack on generated data, watch a card's velocity decay, and stop
	@$(BIN)/python -m deploy.demo

bench: setup ## Measure, print a table and write build/bench.json
	@$(BIN)/python -m tests.bench

parity: setup ## Compare every path with the oracle on 2 M generated rows, and on all of the Handbook's where they are
	TALLY_PARITY_ROWS=2000000 TALLY_TEST_WHOLE=true $(BIN)/python -m pytest tests/parity

chaos: setup ## Kill anything anywhere: all cases of what `make test` runs slices of, and 20 rounds of a running stream
	TALLY_TEST_WHOLE=true $(BIN)/python -m pytest $(IN_LANES) -m sliced --ignore tests/parity
	@$(BIN)/python -m tests.stream_job.chaos

stream-package: setup ## Pack the stream job for a Flink cluster: build/stream
	@$(BIN)/python -m deploy.package

GO_CLIENTS := github.com/fullstorydev/grpcurl/cmd/grpcurl@v1.9.4 github.com/bojand/ghz/cmd/ghz@v0.93.0

go-clients: ## Build grpcurl and ghz into build/go, where there is Go: tests then ask the server by them
	@if ! command -v go >/dev/null; then echo "go-clients: there is no Go here: tests by grpcurl and ghz will be skipped"; \
	else for client in $(GO_CLIENTS); do name=$${client%@*}; \
	[ -x build/go/$${name##*/} ] || GOBIN=$(CURDIR)/build/go go install $$client \
	|| echo "go-clients: $$client cannot be fetched or built: its tests will be skipped"; done; fi

up: setup ## Start the stack in ./.tally
	@$(BIN)/tally up

down: ## Stop the stack in ./.tally
	@$(BIN)/tally down

clean: ## Remove what was built; data in ./.tally stays
	rm -rf $(VENV) $(STREAM_VENV) deploy/jars/.ready deploy/jars/*/.jgo build clients/src/tally/v1 features/__pycache__ .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
