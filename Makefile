# One list of commands. `make help` shows them.
export PYTHON
# The tests start a hundred processes: where this is set, each compiles all that it imports.
unexport PYTHONDONTWRITEBYTECODE
BIN := .venv/bin
PYTEST = $(BIN)/pytest
SLOW = {"SPAKKY_CELERY__BODY_FIRST": "false", "SPAKKY_CELERY__AMQP_BATCHES": "false", "SPAKKY_CELERY__PREPARED_DISPATCH": "false"}

.PHONY: all help lint types fast test conformance slowpaths demo bench bench-growth soak chaos fuzz fix cover wheel clean

all: lint types fast  ## Lint, types and fast tests: under a minute

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

.venv/.ready: requirements-dev.lock requirements-uv.lock scripts/bootstrap
	scripts/bootstrap

lint: .venv/.ready  ## Ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.ready  ## mypy --strict and pyright
	$(BIN)/mypy src examples/typed_calls
	$(BIN)/pyright
	$(BIN)/pytest -q -n 2 tests/typing

fast: .venv/.ready  ## Unit and contract tests
	$(BIN)/pytest -q -n 2 -m "not slow" tests/unit tests/contract

test: .venv/.ready  ## All tests; those that need a server skip where there is none
	$(PYTEST) -q -n 8 --dist loadfile --no-loadscope-reorder -m "not long"

conformance: .venv/.ready  ## The AsyncioPool against Celery's own semantics, outages and shutdowns, on real servers
	$(PYTEST) -q -n 3 --dist loadfile --no-loadscope-reorder -m long

slowpaths: .venv/.ready  ## `make conformance` with the fast paths turned off, but for REDIS_BATCHES: kombu loses messages
	SPAKKY_TEST_SETTINGS='$(SLOW)' $(PYTEST) -q -n 3 --dist loadfile --no-loadscope-reorder -m long

bench: .venv/.ready  ## This package beside raw Celery, the published package, taskiq, arq and dramatiq: 40 minutes
	$(BIN)/python benchmarks/bench.py --plot docs/performance.png --document docs/performance.md

bench-growth: .venv/.ready  ## How a task's cost grows with messages, queues, tasks and workers, and what it costs a broker: 15 minutes
	$(BIN)/python benchmarks/growth.py --document docs/performance.md

soak: .venv/.ready  ## Ten minutes of load on one worker, every task accounted for
	$(BIN)/python scripts/soak.py

chaos: .venv/.ready  ## Kills and broker outages, more of them than the tests have
	SPAKKY_TEST_OUTAGES=20 $(BIN)/pytest -q --timeout 1200 tests/acceptance/test_outages.py tests/acceptance/test_restarts.py tests/acceptance/test_delivery.py tests/acceptance/test_redis_steps.py
	$(BIN)/python scripts/kill_series.py

fuzz: .venv/.ready  ## Twenty thousand random values through the codec, and 200,000 changed messages to a worker on each broker
	SPAKKY_TEST_EXAMPLES=20000 $(BIN)/pytest -q --timeout 1800 tests/unit/test_codec.py -k any_value
	$(BIN)/python scripts/fuzz_messages.py --broker redis
	$(BIN)/python scripts/fuzz_messages.py --broker amqp

demo: .venv/.ready  ## The quickstart, with a real worker and beat
	$(BIN)/python examples/quickstart/run.py

fix: .venv/.ready  ## Let ruff repair what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

cover: .venv/.ready  ## `make test` and `make conformance`, and at least 95 % branch coverage, also in the workers they start
	rm -f .coverage .coverage.*
	$(MAKE) test conformance PYTEST="$(BIN)/coverage run -m pytest"
	$(BIN)/coverage combine -q
	$(BIN)/coverage report --fail-under=95

wheel: .venv/.ready  ## Build the wheel, and run the contract tests against it in a clean environment
	scripts/check-wheel

lock:  ## Pin the development environment anew
	scripts/lock

clean:  ## Remove what the other commands made
	rm -rf .venv dist .coverage* .mypy_cache .ruff_cache .pytest_cache .hypothesis
