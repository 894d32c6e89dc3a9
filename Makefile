# make run    build fastserve and serve this directory with the standard library's http.server on top of it
# make test   build it and run all tests
# make bench  measure it beside other servers, and write the results, the page Performance and the README's figures
# make bench-quick  measure the most important of it in under 3 minutes
#
# make sdist  make the source distribution in dist/, of the files that git knows; it needs no network
# make wheel  build the wheel of this Python from it in dist/, and check what is in it
# make test-wheel  test that wheel, installed in an empty environment; PYTEST_ARGS="tests" for all tests
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

build_tools := $(VENV)/.build-tools
version := $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' src/fastserve/_version.py)
sdist := dist/fastserve-$(version).tar.gz
# Of everything that a wheel may lack something for: the classes, the twins, the commands, the plugin and the types.
PYTEST_ARGS ?= -m "not alone" tests/test_api.py tests/test_backend.py tests/test_cli.py tests/test_conformance_servers.py \
	tests/test_datagrams.py tests/test_streams.py tests/test_testing.py tests/test_typing.py

.PHONY: run test lint bench bench-quick bench-servers sdist wheel test-wheel clean

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

lint: $(built)
	$(VENV)/bin/python -m pip install --quiet cython-lint mypy pycodestyle ruff
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	PATH="$(VENV)/bin:$$PATH" cython-lint src/fastserve

# From a copy: what lies about in src/, or is listed by an earlier build, must not get into it. Nothing is compiled, so
# that neither Cython nor greenlet is needed.
sdist: $(build_tools)
	rm -rf build/sdist
	mkdir -p build/sdist
	git ls-files -z | tar -c --null --files-from=- | tar -x -C build/sdist
	FASTSERVE_NO_EXTENSIONS=1 $(VENV)/bin/python -m build --sdist --no-isolation --skip-dependency-check \
		--outdir dist build/sdist >/dev/null

# From the sdist, so that a file that it lacks is noticed here.
wheel: sdist
	rm -rf build/wheel
	$(VENV)/bin/python -m pip wheel --quiet --no-deps --wheel-dir build/wheel $(sdist)
	$(VENV)/bin/python .ci/check_wheel.py build/wheel/*.whl
	$(VENV)/bin/check-wheel-contents build/wheel/*.whl
	cp build/wheel/*.whl dist

test-wheel: wheel
	.ci/test_wheel $(VENV)/bin/python build/wheel/*.whl $(PYTEST_ARGS)

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

$(build_tools): $(VENV)/bin/python pyproject.toml
	$(VENV)/bin/python -m pip install --quiet build check-wheel-contents "setuptools>=77"
	touch $@

clean:
	rm -rf $(VENV) build dist src/*.egg-info src/fastserve/_*.c src/fastserve/_*.so
