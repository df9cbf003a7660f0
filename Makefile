# The README's two commands, each in a virtual environment of its own.
PYTHON ?= python3
RUN := .venv/run
TEST := .venv/test
INSTALL := pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: table2 test test-nightly clean

table2: $(RUN)/.done  ## train the ladder on real text and write its report to runs/
	$(RUN)/bin/kvbind reproduce table2 --task language --scale smoke

test: $(TEST)/.done  ## lint, types and tests
	$(TEST)/bin/ruff format --check .
	$(TEST)/bin/ruff check .
	$(TEST)/bin/mypy
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(TEST)/bin/pytest --numprocesses=auto

test-nightly: $(TEST)/.done  ## ten thousand drawn inner loops: forms and calls agree, the future stays ahead
	$(TEST)/bin/python tests/nightly.py --draws 10000 --out results/properties-cpu.json

$(RUN)/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(RUN)
	$(RUN)/bin/$(INSTALL) torch
	$(RUN)/bin/$(INSTALL) --editable .
	touch $@

$(TEST)/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(TEST)
	$(TEST)/bin/$(INSTALL) torch
	$(TEST)/bin/$(INSTALL) --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv runs
