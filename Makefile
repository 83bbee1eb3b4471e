# make demo | test | lint | bench: each sets up .venv first (cold: about two minutes; afterwards: seconds).
#   PYTHON=python3.12           the interpreter that .venv is made of (3.11 or later)
#   TORCH_INDEX=<address>       an extra package index for torch, for instance PyTorch's own index of CPU builds
#   TEST_ARGS="-k linear -x"    more arguments for pytest
#   BENCH_ARGS="--only peers"   arguments of benchmarks/run_all.py
PYTHON ?= python3
TORCH_INDEX ?=
TEST_ARGS ?=
BENCH_ARGS ?=
JOBS ?= $(shell nproc)

VENV := .venv
BIN := $(VENV)/bin
BUILD := build/dev
SANITIZE := build/sanitize
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
# A virtual environment or PYTHONPATH of the caller's must not decide what is tested.
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV
export PATH := $(CURDIR)/$(BIN):$(PATH)

CXX_FILES = $(shell git ls-files --cached --others --exclude-standard '*.cpp' '*.h')

.DEFAULT_GOAL := build
.PHONY: all build demo test test-core test-python sanitize lint format bench clean

$(VENV)/.deps: pyproject.toml tools/requirements.py
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11) and "halfbyte needs Python 3.11 or later; use make PYTHON=<interpreter>")'
	test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
# torch first and pinned: resolved together with the rest, pip may pick another build and gigabytes of CUDA with it.
	python -m pip install -q torch==2.13.0 numpy $(if $(TORCH_INDEX),--extra-index-url "$(TORCH_INDEX)")
	python tools/requirements.py dependencies build test demo bench lint > $(VENV)/requirements.txt
	python -m pip install -q -r $(VENV)/requirements.txt
# For the xsimd headers in it only: its own requirements conflict with torch's.
	python -m pip install -q --no-deps pythran==0.19.0
# Imports find the source tree, where the in-place build puts the extension: no reinstall after an edit.
	echo "$(CURDIR)/python" > "$$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/halfbyte-source.pth"
	touch $@

# WERROR=ON stays on in the build folder once set.
CONFIGURE = cmake -S . -B $(BUILD) -G Ninja --log-level=WARNING -DPython_EXECUTABLE="$(CURDIR)/$(BIN)/python" \
  -DHALFBYTE_INPLACE=ON -DHALFBYTE_TESTS=ON $(if $(WERROR),-DHALFBYTE_WERROR=$(WERROR)) > /dev/null

# What Python imports; `all` adds the C++ tests, whose emulated levels take as long to compile as everything else.
build: $(VENV)/.deps
	@$(CONFIGURE)
	@cmake --build $(BUILD) -j $(JOBS) --target _C

all: $(VENV)/.deps
	@$(CONFIGURE)
	@cmake --build $(BUILD) -j $(JOBS)

demo: build
	python examples/digits.py
	python examples/qat_digits.py

test: test-core $(if $(CI),sanitize) test-python

test-core: all
	ctest --test-dir $(BUILD) --output-on-failure -j $(JOBS)

test-python: build
	python -m pytest -n 2 $(TEST_ARGS)

sanitize: $(VENV)/.deps
	cmake -S . -B $(SANITIZE) -G Ninja --log-level=WARNING -DPython_EXECUTABLE="$(CURDIR)/$(BIN)/python" \
	  -DHALFBYTE_PYTHON=OFF -DHALFBYTE_TESTS=ON -DHALFBYTE_SANITIZE=ON > /dev/null
	cmake --build $(SANITIZE) -j $(JOBS)
	ctest --test-dir $(SANITIZE) --output-on-failure -j $(JOBS)

lint: $(VENV)/.deps
	ruff check
	ruff format --check
	clang-format --dry-run -Werror $(CXX_FILES)
	mypy
	$(MAKE) --no-print-directory all WERROR=ON

format: $(VENV)/.deps
	ruff check --fix
	ruff format
	clang-format -i $(CXX_FILES)

# Other libraries to compare with; one that cannot be installed is left out of the results, with the reason.
$(VENV)/.peers: $(VENV)/.deps
	echo "torch==2.13.0" > $(VENV)/torch.txt
	python tools/requirements.py peers | while read -r package; do \
	  python -m pip install -q -c $(VENV)/torch.txt "$$package" || echo "left out: $$package"; done
	touch $@

bench: build $(VENV)/.peers
	python benchmarks/run_all.py $(BENCH_ARGS)

clean:
	rm -rf build dist python/halfbyte/_C.*.so python/halfbyte/_build_info.json
