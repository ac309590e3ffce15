# make demo    a private fine-tuning of a real encoder on synthetic bank messages, offline, in minutes
# make test    lint, types and the whole test suite

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
# Threads that wait sleep instead of spinning: several times faster where other programs want the cores too.
export OMP_WAIT_POLICY ?= passive

.PHONY: install demo test lint types unit test-slow fuzz fuzz-coverage crash test-gpu sbom vulnerabilities lock format clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt requirements-demo.txt
	@$(PYTHON) -c 'import sys; sys.exit("Sotto needs Python 3.11 or newer; try: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	@echo "installing Sotto and its libraries into $(VENV) (once; a minute or two)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements-demo.txt
	@touch $@

demo: install
	@$(BIN)/python -m sotto.demo

test: lint
	@$(MAKE) --no-print-directory -j2 types unit

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/pyright --pythonpath $(BIN)/python

unit: install
	$(BIN)/pytest -n 2 --dist loadgroup

test-slow: install
	$(BIN)/pytest -m slow

fuzz: install
	SOTTO_FUZZ_EXAMPLES=$(or $(EXAMPLES),10000) $(BIN)/pytest tests/test_fuzz.py tests/test_fuzz_files.py

# The same readers under atheris, which looks for inputs that reach new code; SECONDS for each.
fuzz-coverage: install .venv-tools/.installed
	@export PYTHONPATH=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	for target in $(or $(TARGETS),$$(.venv-tools/bin/python tests/coverage_fuzz.py --list 2>/dev/null)); do \
		echo "== $$target"; .venv-tools/bin/python tests/coverage_fuzz.py $$target \
			-max_total_time=$(or $(SECONDS),60) -rss_limit_mb=4000 -print_final_stats=1 > .venv-tools/fuzz.log 2>&1 \
			|| { tail -n 40 .venv-tools/fuzz.log; exit 1; }; \
		tail -n 12 .venv-tools/fuzz.log; \
	done

crash: install
	cd tests && ../$(BIN)/python crash.py --kills $(or $(KILLS),200)

test-gpu: install
	$(BIN)/pytest -m gpu

# The tools have a virtual environment of their own, so that what they list is what Sotto needs and nothing else.
.venv-tools/.installed: requirements-tools.txt
	@$(PYTHON) -m venv .venv-tools
	@.venv-tools/bin/pip install --quiet --disable-pip-version-check -r requirements-tools.txt
	@touch $@

# Every installed package with version, licence and origin, as CycloneDX JSON.
sbom: install .venv-tools/.installed
	.venv-tools/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible --output-format JSON -o sbom.json $(BIN)/python

# Known vulnerabilities of what is installed. Asks the vulnerability service of PyPI over the network.
vulnerabilities: install .venv-tools/.installed
	.venv-tools/bin/pip-audit --skip-editable --path $$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')

# requirements.lock: every package that Sotto needs, for every platform, with the hashes of its files.
lock: .venv-tools/.installed
	.venv-tools/bin/uv pip compile --quiet --universal --generate-hashes --prerelease disallow --no-header --no-annotate \
		--upgrade -c constraints.txt --extra board --extra split --extra federated pyproject.toml -o requirements.lock

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .venv-tools .pytest_cache .ruff_cache sbom.json
