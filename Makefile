# make run    build fastserve and serve this directory with the standard library's http.server on top of it
# make test   build it and run all tests; make build only prepares for that
# make bench  measure it beside other servers, and write the results, the page Performance and the README's figures
# make bench-quick  measure the most important of it in under 3 minutes
# make lint   check the code; make docs builds the documentation as HTML in docs/_build/html
#
# make sdist  make the source distribution in dist/, of the files that git knows; it needs no network
# make wheel  build the wheel of this Python from it in dist/, and check what is in it
# make asan   test the C extensions under AddressSanitizer and UndefinedBehaviorSanitizer, on Linux with gcc
# make tsan   test the core's threads under ThreadSanitizer; PYTHON has been built --disable-gil --with-thread-sanitizer
# make soak   serve with every worker model, SECONDS=60 each, and see that nothing is lost and nothing is left
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

sources := pyproject.toml setup.py build_backend.py $(wildcard src/fastserve/*.pyx src/fastserve/*.px[di] src/fastserve/*.h)
built := $(VENV)/.built-$(implementation)
test_tools := $(VENV)/.test-tools
bench_tools := $(VENV)/.bench-tools
docs_tools := $(VENV)/.docs-tools


build_tools := $(VENV)/.build-tools
# Some of it cannot be installed for a free-threaded Python.
test_extra = test$(shell $(VENV)/bin/python -c "import sys; print('-free-threaded' * ('t' in sys.abiflags))")
version := $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' src/fastserve/_version.py)
sdist := dist/fastserve-$(version).tar.gz
# What a wheel may lack something for: the classes, the twins, the commands, the plugin and the types.
PYTEST_ARGS ?= -m "not alone" tests/test_api.py tests/test_backend.py tests/test_cli.py tests/test_cli_run.py \
	tests/test_cli_serve.py tests/test_conformance_servers.py tests/test_testing.py tests/test_typing.py

# What has state in C.
ASAN_TESTS ?= tests/test_core.py tests/test_core_accept.py tests/test_datagrams.py tests/test_datagram_batches.py \
	tests/test_datagram_handlers.py tests/test_gather_replies.py tests/test_gather_segments.py \
	tests/test_green_connections.py tests/test_green_files.py tests/test_green_replies.py tests/test_hub.py \
	tests/test_hub_descriptors.py tests/test_hub_end.py tests/test_streams.py tests/test_streams_writer.py \
	tests/test_threads_reuse.py tests/test_turns.py tests/test_work_queue.py
# greenlet copies stacks away and back, which the sanitizer's own marks on a stack do not survive. It throws exceptions of
# C++, whose library has to be there before the sanitizer looks for it.
asan_flags := -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined --param asan-stack=0

# What several threads do at a time, and what holds the state that they share.
TSAN_TESTS ?= tests/test_core.py tests/test_datagrams.py tests/test_free_threading.py tests/test_gather_replies.py \
	tests/test_shutdown.py tests/test_streams.py tests/test_threads_reuse.py tests/test_work_queue.py \
	tests/test_workers_threadpool.py tests/test_workers_threads.py
tsan_flags := -O1 -g -fsanitize=thread

SECONDS ?= 60
soaks := sync connections threadpool fork greenlets datagrams mixed

.PHONY: run build test lint bench bench-quick bench-servers docs sdist wheel test-wheel asan tsan soak clean

# Unbuffered, so that the address is there at once, also in a pipe.
run: $(built)
	PYTHONUNBUFFERED=1 $(VENV)/bin/fastserve run -m http.server $(PORT)

build: $(built) $(test_tools)

test: build
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

lint: build
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

# In a copy, whose extensions are built for that. Python frees little at its end, so that leaks are not looked for, and it
# compares strings beyond their end where that is known to be harmless.
asan: $(test_tools)
	$(VENV)/bin/python -m pip install --quiet "cython>=3.1"
	rm -rf build/asan
	mkdir -p build/asan
	git ls-files -z | tar -c --null --files-from=- | tar -x -C build/asan
	cd build/asan && env -u FASTSERVE_NO_EXTENSIONS CFLAGS="$(asan_flags)" \
		$(abspath $(VENV))/bin/python setup.py -q build_ext --inplace
	cd build/asan && env -u FASTSERVE_NO_EXTENSIONS PYTHONPATH=src PYTHONMALLOC=malloc \
		ASAN_OPTIONS=detect_leaks=0:replace_intrin=0 UBSAN_OPTIONS=print_stacktrace=1 \
		LD_PRELOAD="$$(gcc -print-file-name=libasan.so) libstdc++.so.6" \
		$(abspath $(VENV))/bin/python -m pytest -m "not alone" --timeout 900 $(ASAN_TESTS)

# In a copy likewise. The interpreter is instrumented itself, and tells of races between its threads and the core's. What
# is not tested is not watched. The sanitizer itself does not survive threads in a child that a thread has forked, nor a
# limit of addresses.
tsan: export TSAN_OPTIONS = report_bugs=0
tsan: $(test_tools)
	$(VENV)/bin/python -m pip install --quiet "cython>=3.1"
	rm -rf build/tsan
	mkdir -p build/tsan
	git ls-files -z | tar -c --null --files-from=- | tar -x -C build/tsan
	cd build/tsan && env -u FASTSERVE_NO_EXTENSIONS CFLAGS="$(tsan_flags)" LDFLAGS="$(tsan_flags)" \
		$(abspath $(VENV))/bin/python setup.py -q build_ext --inplace
	cd build/tsan && env -u FASTSERVE_NO_EXTENSIONS PYTHONPATH=src \
		TSAN_OPTIONS="log_path=$(abspath build/tsan)/report suppressions=$(abspath tests/tsan_suppressions.txt) \
		exitcode=0 die_after_fork=0 report_thread_leaks=0" \
		$(abspath $(VENV))/bin/python -m pytest -m "not alone" -k "not may_fork and not no_thread_can_be_started" \
		--timeout 900 $(TSAN_TESTS)
	! cat build/tsan/report.* 2>/dev/null

soak: $(built)
	for what in $(soaks); do $(VENV)/bin/python bench/soak.py $$what --seconds $(SECONDS) || exit 1; done

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# A build of one kind undoes that of the other: an extension that lies about would be loaded.
$(built): $(VENV)/bin/python $(sources)
	rm -f $(VENV)/.built-* src/fastserve/_*.so
	$(VENV)/bin/python -m pip install --quiet --editable .
	touch $@

$(test_tools): $(VENV)/bin/python pyproject.toml
	$(VENV)/bin/python -m pip install --quiet --editable ".[$(test_extra)]"
	touch $@

$(bench_tools): $(VENV)/bin/python pyproject.toml
	$(VENV)/bin/python -m pip install --quiet --editable ".[bench]" dnslib gevent uvloop
	touch $@

$(docs_tools): $(VENV)/bin/python pyproject.toml
	$(VENV)/bin/python -m pip install --quiet --editable ".[docs,greenlet]"
	touch $@

$(build_tools): $(VENV)/bin/python pyproject.toml
	$(VENV)/bin/python -m pip install --quiet build check-wheel-contents "setuptools>=77"
	touch $@

clean:
	rm -rf $(VENV) build docs/_build dist src/*.egg-info src/fastserve/_*.c src/fastserve/_*.so
