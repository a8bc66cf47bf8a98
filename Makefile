# Every target that needs the environment makes it first, so `make train` works on a fresh machine.

PYTHON ?= python3
BIN    := .venv/bin
STAMP  := .venv/.squall-installed

.DEFAULT_GOAL := help
.PHONY: help setup train test lint check test-cluster proto bench results results-quick clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv with the whole stack, pinned

train: $(STAMP) ## train DQN on CartPole-v1; SEED=1, ARGS="--actors 4"
	$(BIN)/squall train dqn CartPole-v1 $(if $(SEED),--seed $(SEED)) $(ARGS)

test: $(STAMP) ## run all tests; FAST=1 leaves out the slow ones; ARGS="-k replay"
	$(BIN)/python -m pytest $(if $(filter 1,$(FAST)),-m "not slow") $(ARGS)

lint: $(STAMP) ## check format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint ## lint, then the fast tests
	$(BIN)/python -m pytest -m "not slow"

test-cluster: $(STAMP) ## drive docker-compose.yml on whatever Docker engine there is; skipped where there is none
	@if docker compose version >/dev/null 2>&1 && docker info >/dev/null 2>&1; then \
		SQUALL_TEST_CLUSTER=1 $(BIN)/python -m pytest -v tests/cluster $(ARGS); \
	else \
		echo "skipped: no engine"; \
	fi

proto: $(STAMP) ## write the code beside services/rpc/squall.proto again
	$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. services/rpc/squall.proto

bench: $(STAMP) ## measure beside peers and write BENCHMARKS.md; hours; ONLY=per,lightning, ARGS=--quick
	$(BIN)/python -m tests.benchmarks $(if $(ONLY),--only $(ONLY)) $(ARGS)

results: $(STAMP) ## train all that RESULTS.md holds, or go on with it, and write it; ARGS="dqn-cartpole", ARGS=--render
	$(BIN)/python -m tests.results $(ARGS)

results-quick: $(STAMP) ## train the quick rows of RESULTS.md, one seed each; fails where a score is missed
	$(BIN)/python -m tests.results --quick $(ARGS)

clean: ## remove caches and build output; .venv and runs stay
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -path ./.venv -prune -o -path ./runs -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	@command -v "$(PYTHON)" >/dev/null || \
		{ echo "setup: Squall needs Python 3.11 or newer, and there is no $(PYTHON)" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "setup: Squall needs Python 3.11 or newer, got $$("$(PYTHON)" -V 2>&1); name one: make PYTHON=python3.11 ..." >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "setup: $(PYTHON) cannot make virtual environments; install its venv package (python3-venv on Debian and Ubuntu)" >&2; exit 1; }
	"$(PYTHON)" -m venv .venv
	$(BIN)/python -m pip --disable-pip-version-check install -c constraints.txt -e '.[dev,cluster]'
	@touch $@
