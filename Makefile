# Targets install what they need into .venv; nothing else is required but Python 3.11+ and apt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test proofs lint format clean

demo: $(STAMP)
	$(BIN)/fastvkd demo --out out/demo

# One case at least of every claim, in some 11 to 25 minutes on two cores; `make proofs` runs the costly further cases. A file's
# tests stay together, since they share what is costly to make, and files go in their order: the long ones come early.
test: $(STAMP) lint
	$(PYTEST) -m "not proof"

proofs: $(STAMP)
	$(PYTEST) -m proof

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
