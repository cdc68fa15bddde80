# Every target sets up its own virtual environment first; Python 3.11 or newer and make are all that is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: install demo test test-avx2 versions check docs play format clean

install: $(VENV)/.installed

# uv installs in a minute what pip takes several for; it reads the same requirements.
$(VENV)/.installed: requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "reglue needs Python 3.11 or newer; try make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -r requirements.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	touch $@

demo: install
	$(BIN)/reglue demo

# Neighbours share what they train, so a worker takes a whole half of the tests; one that is done helps the other.
test: install
	$(BIN)/pytest -n 2 --dist worksteal

# What a network learns depends on how a processor rounds. AMX and AVX-512, where there are any, are left out here.
test-avx2: export ATEN_CPU_CAPABILITY = avx2
test-avx2: export ONEDNN_MAX_CPU_ISA = AVX2
test-avx2: install
	$(BIN)/pytest -n 2 --dist worksteal -m 'trains and not slow and not gpu and not network'

# A part of the tests on every Python that we promise, on the first one with the oldest packages that pyproject.toml
# allows, too. uv looks for these Pythons here, and fetches those that are not; they may be given as paths.
PYTHONS := 3.11 3.12 3.13
QUICK := tests/test_mistakes.py tests/test_config.py tests/test_files.py tests/data/test_sources.py
FRESH := $(BIN)/uv run --isolated --no-project --with '.[train,evaluate,ode]' --with 'pytest>=8.3' \
	--with 'hypothesis>=6.112' --with 'webdataset>=0.2.100'
versions: install
	$(FRESH) --python $(firstword $(PYTHONS)) --resolution lowest-direct pytest $(QUICK)
	for python in $(PYTHONS); do $(FRESH) --python $$python pytest $(QUICK) || exit 1; done

check: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/lint-imports

# The documentation as a site, in the folder site; a link to nowhere is an error.
docs: install
	$(BIN)/zensical build --strict

# The page that draws in a browser, beside it: npm brings the runtime.
play: docs
	$(BIN)/python scripts/build_play.py --out site/play

format: install
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf $(VENV) demo-output site .pytest_cache .ruff_cache .hypothesis
