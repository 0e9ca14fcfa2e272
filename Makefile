# make demo    train modular addition to grokking and draw it
# make test    all checks and the whole test suite
# make bench   time against the alternatives and against the last committed run
# Each makes the virtual environment .venv first, if it is not there or older than the sources.

PYTHON ?= python3
BIN := .venv/bin
SOURCES := Makefile pyproject.toml CMakeLists.txt constraints.txt $(shell find csrc python -type f -not -path '*/__pycache__/*' -not -name '*.so')
CXX_FILES := $(shell find csrc tests -name '*.cc' -o -name '*.h')
# The build's own requirements are installed by a pip inside pip, which knows constraints only from the environment.
PIP_INSTALL := PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
BUILD_SETTINGS := $(if $(CI),--config-settings=cmake.define.NORMSCOPE_WERROR=ON)

.DELETE_ON_ERROR:
.PHONY: demo test lint format sanitize bench bench-commit install clean

demo: .venv/demo-installed
	$(BIN)/normscope grok --model mlp --p 59

# Two cores, two halves: the sanitizers and the GPU's kernels beside everything else; their output comes last.
test: lint
	@mkdir -p build
	@{ $(MAKE) --no-print-directory sanitize && $(BIN)/python -m pytest tests/gpu; } >build/second-half.log 2>&1 & second=$$!; \
	  $(BIN)/python -m pytest --doctest-modules --pyargs normscope tests --ignore=tests/gpu; first=$$?; \
	  wait $$second; second=$$?; cat build/second-half.log; exit $$((first || second))

lint: .venv/test-installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: .venv/test-installed
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CXX_FILES)

sanitize: .venv/test-installed
	PATH="$(CURDIR)/$(BIN):$$PATH" tests/native/sanitize.sh

bench: .venv/test-installed
	$(BIN)/python -m pytest bench --benchmark-only --benchmark-json=build/bench.json
	$(BIN)/python -m bench.results build/bench.json

bench-commit: .venv/test-installed
	$(BIN)/python -m pytest bench --benchmark-only --benchmark-json=build/bench.json
	$(BIN)/python -m bench.results build/bench.json --commit

install: .venv/test-installed

.venv/demo-installed: EXTRAS := cli,plot
.venv/test-installed: EXTRAS := test
.venv/test-installed: TOOLS := cmake ninja pybind11
.venv/%-installed: .venv/pyvenv.cfg $(SOURCES)
	$(PIP_INSTALL) $(BUILD_SETTINGS) '.[$(EXTRAS)]' $(TOOLS)
	@touch $@

.venv/pyvenv.cfg:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "normscope needs Python 3.10 or later; name one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv .venv

clean:
	rm -rf .venv build
