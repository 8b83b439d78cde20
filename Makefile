# Every target sets up what it needs: a virtual environment in .venv, the CPU build of torch where there is no GPU.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

export OMP_WAIT_POLICY ?= passive
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help quickstart test crash check docs dist bench clean

help:            ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## */\t/'

$(READY): pyproject.toml requirements.lock tools/install.sh tools/torch.txt tools/uv.lock
	sh tools/install.sh "$(PYTHON)" "$(VENV)"
	touch $(READY)

quickstart: $(READY)  ## add languages to an English embedder, train a small LUSIFER, score five systems
	$(BIN)/lusifer quickstart

test: $(READY)   ## run the tests, a file to a process; PART=search runs those of one package
	$(BIN)/python -m pytest tests/$(PART) --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

crash: $(READY)  ## kill every command 20 times at random moments, and let two meet 10 times; shows a table
	CRASH=$${CRASH:-20} $(BIN)/python -m pytest tests/project/test_crash.py

check: $(READY)  ## lint, format check and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(READY)   ## build the documentation site into site/; warnings are errors
	$(BIN)/python tools/reference.py --check
	$(BIN)/zensical build --strict --clean

dist: $(READY)   ## build wheel and source distribution into dist/, and check what PyPI would show
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist . >/dev/null
	$(BIN)/python -m twine check --strict dist/*

bench: $(READY)  ## run the benchmarks
	$(BIN)/python benchmarks/train.py
	$(BIN)/python benchmarks/encode.py
	$(BIN)/python benchmarks/costs.py
	$(BIN)/python benchmarks/bulk.py
	$(BIN)/python benchmarks/serve.py
	$(BIN)/python benchmarks/search.py
	$(BIN)/python benchmarks/serve_memory.py

clean:           ## remove the virtual environment and caches (not runs/)
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
