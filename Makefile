PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test bench space clean

demo: $(VENV)/installed ## draw ten guided digits above ten unguided ones: out/guided.png
	$(BIN)/hfdiff demo

test: $(VENV)/installed-dev ## lint, types and tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest

space: $(VENV)/installed-space ## the page on http://127.0.0.1:7860
	$(BIN)/python spaces/classifier-guidance/app.py

bench: $(VENV)/installed-dev ## speed, as ratios in one interleaved run: benchmarks/README.md
	$(BIN)/python benchmarks/speed.py

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	touch $@

$(VENV)/installed-space: $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[space]"
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) out build *.egg-info
