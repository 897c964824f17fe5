# Two commands matter: `make demo` and `make test`. Everything happens in .venv; nothing else is touched.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
SOURCES := pyproject.toml CMakeLists.txt $(wildcard native/*) $(shell find src/kvik -name '*.py' -o -name '*.pyi' 2>/dev/null)
PROMPT ?= Why is the sky blue?

.PHONY: demo test test-all check core native-check bench bench-sizes bench-engine bench-decoding bench-eval bench-kv install clean

demo: $(VENV)/.installed
	$(BIN)/kvik run "$(PROMPT)"

install: $(VENV)/.installed

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Kvik and its base dependencies only.
$(VENV)/.installed: $(BIN)/python $(SOURCES)
	@echo "building Kvik (native core: about a minute)"
	$(PIP) install .
	@touch $@

$(VENV)/.tested: $(VENV)/.installed pyproject.toml
	@echo "installing the test extra"
	$(PIP) install torch==2.13.0
	$(PIP) install ".[test]"
	@touch $@

# Metrics need packages of their own.
$(VENV)/.evaluating: $(VENV)/.installed pyproject.toml
	$(PIP) install ".[eval]"
	@touch $@

check: $(VENV)/.tested
	$(BIN)/ruff check src tests bench
	$(BIN)/ruff format --check src tests bench
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_house.py

test: check
	$(BIN)/python -m pytest -q -m "not slow" -n auto

test-all: check
	$(BIN)/python -m pytest -q -n auto

bench: $(VENV)/.installed
	$(PYTHON) bench/setup_peers.py
	$(BIN)/python bench/run.py

bench-sizes: $(VENV)/.installed
	$(PYTHON) bench/setup_peers.py --only llama.cpp,sizes
	$(BIN)/python bench/sizes.py

bench-engine: $(VENV)/.installed
	$(PYTHON) bench/setup_peers.py --only tools,llama.cpp,vllm,transformers
	$(BIN)/python bench/engine.py

bench-decoding: $(VENV)/.installed
	$(PYTHON) bench/setup_peers.py --only tools,llama.cpp,transformers
	$(BIN)/python bench/decoding.py

bench-eval: $(VENV)/.evaluating
	$(PYTHON) bench/setup_peers.py --only tools,llama.cpp,transformers
	$(BIN)/python bench/evaluation.py

bench-kv: $(VENV)/.installed
	$(PYTHON) bench/setup_peers.py --only tools,llama.cpp
	$(BIN)/python bench/kv.py

clean:
	rm -rf $(VENV) build
