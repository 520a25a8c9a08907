# `make demo` and `make test` install everything they need into .venv; nothing else is required but Python 3.11+ and apt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test lint format clean

demo: $(STAMP)
	$(BIN)/fastvkd demo --out out/demo

test: $(STAMP) lint
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# DeepSpeed compiles one small C++ operation at its first start and needs g++ and ninja for it.
$(STAMP): pyproject.toml constraints.txt
	@command -v g++ >/dev/null || { \
	    if [ "$$(id -u)" = 0 ]; then apt-get update -qq && apt-get install -y -qq g++; \
	    else echo "g++ is needed: sudo apt-get install g++" >&2; exit 2; fi; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip
	$(BIN)/pip install -q "$$(grep -E '^torch==' constraints.txt)"
	$(BIN)/pip install -q -c constraints.txt -e ".[demo,test]"
	@touch $@

clean:
	rm -rf $(VENV) out build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
