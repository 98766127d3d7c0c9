# `make demo` and `make test` start from nothing: they create .venv, install what they need and build the kernels.
# PYTHON chooses the interpreter that .venv is made with; TORCH what pip is asked for.
PYTHON ?= python3
TORCH ?= torch torchvision
VENV := .venv
RUN := OMP_NUM_THREADS=1 $(VENV)/bin
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)

.PHONY: install demo compare test test-all bench gpu-kit wheel lint docs clean

install: $(VENV)/.built

# Torch comes first and the build is not isolated: the kernels are compiled against the torch that is installed.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --upgrade "pip>=24" "setuptools>=77" ninja
	$(VENV)/bin/pip install --quiet $(TORCH)
	touch $@

$(VENV)/.built: $(VENV)/.torch $(SOURCES)
	$(VENV)/bin/pip install --quiet --no-build-isolation --editable ".[trainer,bench,dev,docs]"
	touch $@

demo: install
	$(RUN)/crl-diffusion compare --preset forgetting --out runs/demo

compare: install
	$(RUN)/crl-diffusion compare --out runs/compare --methods fine-tune joint rank1 gd gd+diagonal gd+rank1

test: install
	$(RUN)/pytest -n 2 --dist worksteal
	@echo "csrc/core and the CPU loops under AddressSanitizer and UBSan: make test-all"

test-all: test
	$(RUN)/pytest -n 2 -m "sanitizers or slow"

bench: install
	$(RUN)/pytest benchmarks

gpu-kit: install
	$(VENV)/bin/python -m benchmarks.gpu.kit

wheel: install
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" .ci/wheel

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	$(VENV)/bin/clang-format --dry-run --Werror $(shell find csrc -type f)

docs: install
	$(VENV)/bin/mkdocs build --strict

clean:
	rm -rf $(VENV) build dist site *.egg-info runs crl_kernels/*.so crl_kernels/_build.json
