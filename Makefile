# make run    build fastserve and serve this directory with the standard library's http.server on top of it
# make test   build it and run all tests
# make bench  measure it beside other servers, and write the results, the page Performance and the README's figures
# make bench-quick  measure the most important of it in under 3 minutes
# make lint   check the code; make docs builds the documentation as HTML in docs/_build/html
#
# All make a virtual environment in .venv. FASTSERVE_NO_EXTENSIONS=1 builds and tests the pure-Python package.

PYTHON ?= python3
PORT ?= 8000
VENV ?= .venv

ifneq ($(filter-out 0,$(FASTSERVE_NO_EXTENSIONS)),)
implementation := py
else
implementation := c
endif

export PIP_DISABLE_PIP_VERSION_CHECK = 1

sources := pyproject.toml setup.py $(wildcard src/fastserve/*.pyx src/fastserve/*.pxd src/fastserve/*.h)
built := $(VENV)/.built-$(implementation)
test_tools := $(VENV)/.test-tools
bench_tools := $(VENV)/.bench-tools
docs_tools := $(VENV)/.docs-tools

.PHONY: run test lint bench bench-quick bench-servers docs clean

# Unbuffered, so that the address is there at once, also in a pipe.
run: $(built)
	PYTHONUNBUFFERED=1 $(VENV)/bin/fastserve run -m http.server $(PORT)

test: $(built) $(test_tools)
	$(VENV)/bin/python -m pytest

bench: $(built) $(bench_tools) bench-servers
	$(VENV)/bin/python bench/clients.py --json bench/results/clients.json
	$(VENV)/bin/python bench/crowd.py --json bench/results/crowd.json
	$(VENV)/bin/python bench/run.py --documents

bench-quick: $(built) $(bench_tools) bench-servers
	$(VENV)/bin/python bench/run.py --quick

# What is not Python: the limit, and the server of Go where there is a compiler of Go.
bench-servers:
	$(MAKE) --quiet --directory bench/raw

docs: $(built) $(docs_tools)
	$(VENV)/bin/python -m sphinx -q -W --keep-going -b html docs docs/_build/html

lint: $(built)
	$(VENV)/bin/python -m pip install --quiet cython-lint mypy pycodestyle ruff
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	PATH="$(VENV)/bin:$$PATH" cython-lint src/fastserve

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# A build of one kind undoes that of the other: an extension that lies about would be loaded.
$(built): $(VENV)/bin/python $(sources)
	rm -f $(VENV)/.built-* src/fastserve/_*.so
	$(VENV)/bin/python -m pip install --quiet --editable .
	touch $@

$(test_tools): $(VENV)/bin/python pyproject.toml
	$(VENV)/bin/python -m pip install --quiet --editable ".[test]"
	touch $@

$(bench_tools): $(VENV)/bin/python pyproject.toml
	$(VENV)/bin/python -m pip install --quiet --editable ".[bench]" uvloop gevent
	touch $@

$(docs_tools): $(VENV)/bin/python pyproject.toml
	$(VENV)/bin/python -m pip install --quiet --editable ".[docs,greenlet]"
	touch $@

clean:
	rm -rf $(VENV) build docs/_build dist src/*.egg-info src/fastserve/_*.c src/fastserve/_*.so
