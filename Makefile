# Each target works on a fresh clone with nothing but make and Python 3.11-3.13.
PYTHON ?= python3
FUZZ_SEED ?= 0
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test slow check conformance meta parity failures bench format clean torture fuzz

demo: .venv/run  ## train a small model on the Python standard library, and read what it writes
	$(BIN)/picotron train examples/demo.toml

test: .venv/dev  ## every test, then the suite on every bundled backend
	$(BIN)/python -m pytest -q -n 3 --dist worksteal
	$(BIN)/python -m pytest -q -n 2 --pyargs picotron_conformance --picotron-backend all

slow: .venv/dev  ## what `make test` leaves out: the same with more cases, three to ten minutes
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m slow

conformance: .venv/dev  ## the full profile on every bundled backend, its report and its certificate
	mkdir -p build
	$(BIN)/python -m pytest -q -n 2 --pyargs picotron_conformance --picotron-backend all \
		--picotron-profile full --picotron-report build/conformance.json
	$(BIN)/picotron conformance build/conformance.json --html build/conformance.html

check: .venv/dev  ## lint, format, types, import law
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

torture: .venv/dev  ## kill -9 two hundred times, half of them in mid save: two to ten minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/reliability/test_torture.py --kills 100

fuzz: .venv/dev  ## 500 random settings, 500 damaged runs: another FUZZ_SEED asks others
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal tests/fuzz \
		--fuzz-seed $(FUZZ_SEED) --fuzz-count 500

meta: .venv/dev  ## the suite against all wrong and right kernels: about an hour, writes docs/kill_matrix.md
	OMP_NUM_THREADS=1 $(BIN)/python tests/meta/kill_matrix.py
	$(BIN)/python -m pytest -q -n 2 --dist worksteal tests/meta --meta-all

parity: .venv/dev  ## every layout of up to eight ranks against the run of one process: about an hour
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/distributed/test_layouts.py \
		tests/distributed/test_resharding.py --all-layouts

failures: .venv/dev  ## a rank killed, stopped or raising, wherever it may be: seven to twenty minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/reliability/test_ranks_that_fail.py --every-failure

bench: .venv/dev  ## benchmarks: compare numbers of one run only
	$(BIN)/python -m pytest -q benchmarks/bench_*.py --benchmark-enable --benchmark-only
	$(BIN)/python benchmarks/bench_attention_memory.py
	$(BIN)/python benchmarks/bench_checkpoint.py
	$(BIN)/python benchmarks/bench_metrics.py

format: .venv/dev  ## what `check` would complain of, mended where a tool can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build dist runs

# A stamp says what the environment holds; a change of what it is made from makes it again.
.venv/run: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[plot]'
	touch $@

.venv/dev: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@ .venv/run
