# `make demo` and `make test` are all a newcomer needs; both install everything into .venv first.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
ARGS   ?=
# Stories of real processes mostly wait: twice as many workers as processors.
WORKERS ?= $(shell echo $$((2 * $$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1))))
TRACE  ?=
# Hundreds of tests start processes of ours: the program is compiled before them, once. They write no bytecode
# themselves: one that is killed, or has no disk left, may leave half of it to the others.
export PYTHONDONTWRITEBYTECODE := 1

.PHONY: install compiled demo test check coverage format lint types floors bench docs lock nightly simulate soak killpoints fuzz mutation web clean

install: $(STAMP)

$(STAMP): pyproject.toml
	@echo "installing into $(VENV); this happens once and takes a minute or so"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed: make PYTHON=python3.12 install"'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check "pip>=25.1"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --group dev --editable .
	@touch $(STAMP)

compiled: install
	@$(BIN)/python -m compileall -q runcomfy launcher comfyui_agent workflows benchmarks

demo: install
	@$(BIN)/comfyctl demo $(ARGS)

test: compiled
	@$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

format: install
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

lint: install
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .

types: install
	@$(BIN)/mypy

floors: install
	@$(BIN)/lint-imports --no-cache

# Everything the gates ask for; under ten minutes on two cores.
check: lint types floors compiled
	@$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

# Which lines and branches of runcomfy/ all tests reach, the campaigns among them and the programs that they start:
# twenty minutes or more. `RECORD=1` keeps the figures. Python 3.11 counts too little; see benchmarks/coverage_report.py.
# A program that is killed leaves a torn file of counts, and 3.13 warns of how coverage closes that.
coverage: compiled
	@$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "campaign or not campaign" --cov --cov-report= \
		-W ignore::pytest.PytestUnraisableExceptionWarning $(ARGS); \
		status=$$?; RECORD=$(RECORD) $(BIN)/python -m benchmarks.coverage_report && exit $$status

# Everything that is measured; `ARGS="planning fleet"` only these. The replay needs a trace: `TRACE=requests.csv`.
# `RECORD=1` keeps the figures and makes docs/performance.md from them.
bench: compiled
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --group bench
	@$(BIN)/python -m benchmarks $(ARGS)
	@$(if $(TRACE),$(BIN)/python -m benchmarks replay --trace $(TRACE))

# The generated parts of the pages, written anew; the tests compare them.
docs: install
	@$(BIN)/comfyctl config reference > docs/reference/settings.md
	@UPDATE_DOCS=1 $(BIN)/python -m pytest -q tests/docs

# requirements.lock, written anew: every package in one version for each Python and system, with its hashes. Only this
# needs uv.
lock:
	@sed -n '/^#/p' requirements.lock > requirements.lock.new
	@uv pip compile --quiet --universal --generate-hashes --no-header --all-extras --group dev --python-version 3.11 \
		pyproject.toml >> requirements.lock.new
	@mv requirements.lock.new requirements.lock

# The page at `/`, built anew from web/ into launcher/dashboard/; only this needs Node, and what it writes is committed.
web:
	@cd web && npm ci --no-audit --no-fund && npm run build

# The checks again with more examples, and the campaigns: executors killed at random, everything of ours killed at every
# durable write and remote call.
nightly: check
	@HYPOTHESIS_PROFILE=nightly $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "campaign or not campaign" $(ARGS)
	@$(BIN)/python -m benchmarks killing leaks
	@$(BIN)/python -m benchmarks killpoints
	@$(BIN)/python -m benchmarks simulate --seeds 300

# Whole days of everything together in memory, one per seed, much going wrong: `SEEDS=300 ARGS="--first 1000"`.
simulate: compiled
	@$(BIN)/python -m benchmarks simulate --seeds $(or $(SEEDS),300) $(ARGS)

# Do the tests notice a change? A sample of it: `ARGS="--group domain --sample 20"`; the whole takes a night.
mutation: compiled
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --group mutation
	@$(BIN)/python -m benchmarks mutation $(ARGS)

# Every command killed at every durable write and remote call, over both databases, and started again: `ARGS=--record`.
killpoints: compiled
	@$(BIN)/python -m benchmarks killpoints $(ARGS)

# Everything at once, in real processes that are spoiled and killed at random: `MINUTES=20 ARGS="--seed 7"`.
soak: compiled
	@$(BIN)/python -m benchmarks soak --minutes $(or $(MINUTES),20) $(ARGS)

# Every reader of what comes from outside, on inputs grown from recordings under coverage guidance: `RUNS=1000000`.
fuzz: compiled
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --group fuzz
	@$(BIN)/python -m benchmarks fuzz --runs $(or $(RUNS),1000000) $(ARGS)

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .coverage* htmlcov
