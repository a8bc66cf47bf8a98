# A target that needs the virtual environment creates it first, so `make train` works on a fresh machine.

PYTHON ?= python3
BIN    := .venv/bin
BASE   := .venv/.squall-installed
DEV    := .venv/.squall-dev-installed
DOCS   := .venv/.squall-docs-installed
comma  := ,
JOBS   ?= logical

# Exit status 5: ARGS may select tests of one of the two runs alone.
pytest = $(BIN)/python -m pytest $(1) -m "$(2)" $(ARGS) || [ $$? = 5 ]

.DEFAULT_GOAL := help
.PHONY: help setup train test test-long lint check docs test-cluster proto bench results results-quick clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(BASE) ## install Squall into .venv, with pinned dependencies

train: $(BASE) ## train DQN on CartPole-v1; SEED=1, ARGS="--actors 4"
	$(BIN)/squall train dqn CartPole-v1 $(if $(SEED),--seed $(SEED)) $(ARGS)

test: $(DEV) ## run the tests; FAST=1 skips the slow ones; ARGS="-k replay"
	$(call pytest,-n $(JOBS) --dist loadfile,not slow and not ray and not long)
	$(call pytest,$(RAY_JOBS),not long and $(if $(filter 1,$(FAST)),ray and not slow,(slow or ray)))

test-long: $(DEV) ## run the tests that `make test` leaves out: they take long and rarely fail
	$(BIN)/python -m pytest -m long $(ARGS)

lint: $(DEV) ## check format, lint, and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint ## lint, then run the fast tests
	@$(MAKE) --no-print-directory test FAST=1

docs: $(DOCS) ## build the documentation into site/; a broken link or a page outside the navigation is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict $(ARGS)

test-cluster: $(DEV) ## test docker-compose.yml on a Docker engine; skipped if there is none
	@if docker compose version >/dev/null 2>&1 && docker info >/dev/null 2>&1; then \
		SQUALL_TEST_CLUSTER=1 $(BIN)/python -m pytest -v tests/cluster $(ARGS); \
	else \
		echo "skipped: no engine"; \
	fi

proto: $(DEV) ## generate the gRPC code from services/rpc/squall.proto
	$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. services/rpc/squall.proto

bench: $(DEV) ## run the benchmarks and write docs/performance.md, in hours; ONLY=per,lightning, ARGS=--quick
	$(BIN)/python -m tests.benchmarks $(if $(ONLY),--only $(ONLY)) $(ARGS)

results: $(DEV) ## train the runs of docs/results.md, or continue them, and write the page; ARGS="dqn-cartpole", ARGS=--render
	$(BIN)/python -m tests.results $(ARGS)

results-quick: $(DEV) ## train the quick rows of docs/results.md, one seed each; fails if a score is too low
	$(BIN)/python -m tests.results --quick $(ARGS)

clean: ## remove caches and build output, but not .venv and runs
	rm -rf build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -path ./.venv -prune -o -path ./runs -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# An installation prints two lines, and pip's errors.
define install
	@echo "setup: installing $(2); $(3)"
	@begun=$$(date +%s) && \
		$(BIN)/python -m pip --disable-pip-version-check install -qq --no-input -c constraints.txt -e '.[$(1)]' && \
		echo "setup: done in $$(($$(date +%s) - begun)) s"
	@touch $@
endef

.venv/bin/python:
	@command -v "$(PYTHON)" >/dev/null || \
		{ echo "setup: Squall needs Python 3.11 or newer, but there is no $(PYTHON)" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "setup: Squall needs Python 3.11 or newer, got $$("$(PYTHON)" -V 2>&1); select another with make PYTHON=python3.11 ..." >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "setup: $(PYTHON) cannot create virtual environments; install its venv package (python3-venv on Debian and Ubuntu)" >&2; exit 1; }
	@"$(PYTHON)" -m venv .venv

$(BASE): pyproject.toml constraints.txt | .venv/bin/python
	$(call install,cluster,Squall and its dependencies into .venv,this takes one or two minutes)

$(DEV): $(BASE)
	$(call install,cluster$(comma)dev,the tools of tests and checks into .venv,this takes half a minute)

$(DOCS): $(BASE)
	$(call install,cluster$(comma)docs,the tools of the documentation into .venv,this takes a few seconds)
