"""A plugin of pytest: the tests that ask what the stdlib does, under ``fastserve.patch(threading="greenlet")``.

    python -m pytest -p greenlets_in_place tests/test_seams_requests.py ...

Of all tests it keeps those that run on the module ``socketserver``, which is patched for the whole run.
"""

from __future__ import annotations

import pytest

import fastserve

# What asks for the stdlib's own objects, which no patch exchanges, and is not there with threads either.
OF_THE_STDLIB = {
    "test_get_request_over_a_unix_socket",
    "test_get_request_over_ipv4",
    "test_the_list_of_threads_has_the_stdlibs_methods",
    "test_the_private_names_may_be_patched_with_mock_and_are_put_back",
    "test_the_stdlibs_forking_mix_in_collects_every_poll_interval",
}
# What is not so with greenlets: the section "With greenlets in the place of threads" of docs/differences.md.
DIFFERENT = {
    # The handlers share the thread of the loop.
    "test_a_threads_request_is_accepted_by_the_loop_and_handled_in_the_thread",
    "test_process_request_thread_assigned_on_the_instance_is_used",
    "test_shutdown_request_is_called_once_for_every_request_so_that_it_can_release_a_semaphore",
    "test_daemon_threads_decides_what_the_threads_are",
    # What waits for anything but a connection holds up the others.
    "test_requests_run_at_the_same_time",
    "test_get_request_may_hold_back_connections_until_a_worker_is_free",
    "test_a_thread_for_each_datagram",
    "test_process_request_thread_may_do_the_tls_handshake_in_the_worker",
    # There are no threads to count.
    "test_threads_is_empty_without_requests_and_takes_len_with_them",
    # rfile is an object of fastserve's own.
    "test_rbufsize_chooses_the_file_that_is_read",
    "test_rfile_is_a_buffered_reader",
}


def pytest_configure(config: pytest.Config) -> None:
    """Apply the patch before any test module is imported."""
    fastserve.patch(threading="greenlet")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the tests of the module ``socketserver`` that hold."""
    items[:] = [
        item
        for item in items
        if isinstance(item, pytest.Function)
        and hasattr(item, "callspec")
        and item.callspec.params.get("module") == "stdlib"
        and item.originalname not in OF_THE_STDLIB | DIFFERENT
    ]
