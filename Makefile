# Everything sets itself up: a virtual environment in .venv, the dependencies that constraints.txt pins, the package.
PYTHON ?= python3.11
BIN := .venv/bin
READY := .venv/ready

.PHONY: demo test check format bench clean

demo: $(READY)
	$(BIN)/bitwright demo

test: $(READY)
	$(BIN)/pytest

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(READY)
	$(BIN)/python -m bench.run

# torch first, and alone: its CPU build, before anything that could ask for another.
$(READY): pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $(READY)

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache build
