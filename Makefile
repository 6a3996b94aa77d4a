PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-portable bench space clean

demo: $(VENV)/installed ## draw ten guided digits above ten unguided ones: out/guided.png
	$(BIN)/hfdiff demo

test: $(VENV)/installed-dev ## lint, types and tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest

NUMERICAL := $(addprefix tests/,schedulers models evaluation convert data training/test_losses.py training/test_timesteps.py)

test-portable: $(VENV)/installed-dev ## the numerical tests with other processors' kernels
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2 $(BIN)/pytest $(NUMERICAL)

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
