"""The overridable methods of the loop: real code replaces them, and they are called through ``self``."""

from __future__ import annotations

import gc
import select
import socket
import threading
from types import ModuleType
from typing import Any

import pytest

from support import serving, talk, wait_until

ADDRESS = ("127.0.0.1", 0)


def upper_handler(module: ModuleType) -> Any:
    """Return a handler that answers a line in capitals."""

    class Upper(module.StreamRequestHandler):
        def handle(self) -> None:
            self.wfile.write(self.rfile.readline().upper())

    return Upper


def connect(server: Any) -> socket.socket:
    """Connect to a server on this machine; the kernel accepts before the server does."""
    return socket.create_connection(server.server_address[:2], timeout=60)


# service_actions


def test_an_overridden_service_actions_runs_every_poll_interval_while_idle(module: ModuleType) -> None:
    turns: list[str] = []

    class Server(module.TCPServer):
        def service_actions(self) -> None:
            turns.append(threading.current_thread().name)
            if len(turns) % 5 == 0:
                gc.collect(0)
            super().service_actions()

    with serving(Server(ADDRESS, upper_handler(module)), 0.005):
        wait_until(lambda: len(turns) >= 12)
    assert set(turns) == {"serving"}


def test_service_actions_assigned_on_the_instance_runs_every_poll_interval_while_idle(module: ModuleType) -> None:
    turns: list[int] = []
    server = module.TCPServer(ADDRESS, upper_handler(module))
    server.service_actions = lambda: turns.append(1)
    with serving(server, 0.005):
        wait_until(lambda: len(turns) >= 5)


@pytest.mark.parametrize("base", ["ThreadingMixIn", "ForkingMixIn"])
def test_an_override_of_service_actions_behind_a_mixin_keeps_its_ticks(module: ModuleType, base: str) -> None:
    turns: list[int] = []

    class Server(getattr(module, base), module.TCPServer):
        def service_actions(self) -> None:
            super().service_actions()
            turns.append(1)

    with serving(Server(ADDRESS, upper_handler(module)), 0.005):
        wait_until(lambda: len(turns) >= 5)


def test_service_actions_is_called_after_every_request(module: ModuleType) -> None:
    order: list[str] = []

    class Server(module.TCPServer):
        def service_actions(self) -> None:
            order.append("service_actions")
            if order.count("request") == 3:
                self._BaseServer__shutdown_request = True

        def process_request(self, request: Any, client_address: Any) -> None:
            order.append("request")
            super().process_request(request, client_address)

    with Server(ADDRESS, module.BaseRequestHandler) as server:
        clients = [connect(server) for _ in range(3)]
        server.serve_forever(60)
        for client in clients:
            client.close()
    assert order == ["request", "service_actions"] * 3


# server_bind, server_activate


def test_server_bind_may_adopt_a_listening_socket(module: ModuleType) -> None:
    """Take over a listener that somebody else has bound, as under systemd's socket activation."""

    class Server(module.ThreadingTCPServer):
        def server_bind(self) -> None:
            self.socket.close()
            self.socket = socket.socket(fileno=given.fileno())
            given.detach()
            self.server_address = self.socket.getsockname()

        def server_activate(self) -> None:
            assert self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == 1

    given = socket.create_server(ADDRESS)
    address = given.getsockname()
    with serving(Server(("ignored", 1), upper_handler(module)), 0.01) as server:
        assert server.server_address == address
        assert talk(address, b"a\n") == b"A\n"


@pytest.mark.skipif(not hasattr(socket, "SO_BINDTODEVICE"), reason="SO_BINDTODEVICE is Linux's")
def test_server_bind_may_bind_to_a_device(module: ModuleType) -> None:
    class Server(module.TCPServer):
        def server_bind(self) -> None:
            try:
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo\0")
            except PermissionError:
                pytest.skip("binding to a device is not permitted here")
            super().server_bind()

    with serving(Server(ADDRESS, upper_handler(module)), 0.01) as server:
        assert server.socket.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16).startswith(b"lo")
        assert talk(server.server_address, b"a\n") == b"A\n"


def test_server_bind_may_join_a_multicast_group(module: ModuleType) -> None:
    group = "224.0.0.251"
    received = threading.Event()

    class Server(module.UDPServer):
        def server_bind(self) -> None:
            membership = socket.inet_aton(group) + socket.inet_aton("127.0.0.1")
            try:
                self.socket.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, membership)
            except OSError as error:
                pytest.skip(f"no multicast on the loopback device: {error}")
            super().server_bind()

    class Handler(module.DatagramRequestHandler):
        def handle(self) -> None:
            assert self.packet == b"to the group"
            received.set()

    with serving(Server(("", 0), Handler), 0.01) as server, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton("127.0.0.1"))
        try:
            client.sendto(b"to the group", (group, server.server_address[1]))
        except OSError as error:
            pytest.skip(f"no multicast on the loopback device: {error}")
        assert received.wait(60)


def test_server_bind_may_make_an_ipv6_listener_dual_stack(module: ModuleType) -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no dual-stack IPv6")

    class Server(module.ThreadingTCPServer):
        address_family = socket.AF_INET6

        def server_bind(self) -> None:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            super().server_bind()

    with serving(Server(("::", 0), upper_handler(module)), 0.01) as server:
        port = server.server_address[1]
        assert talk(("127.0.0.1", port), b"four\n") == b"FOUR\n"
        assert talk(("::1", port), b"six\n", socket.AF_INET6) == b"SIX\n"


def test_server_bind_and_server_activate_are_called_by_the_constructor_in_order(module: ModuleType) -> None:
    calls: list[str] = []

    class Server(module.TCPServer):
        def server_bind(self) -> None:
            calls.append("bind")
            super().server_bind()

        def server_activate(self) -> None:
            calls.append("activate")
            super().server_activate()

        def server_close(self) -> None:
            calls.append("close")
            super().server_close()

    with Server(ADDRESS, upper_handler(module)):
        assert calls == ["bind", "activate"]
    assert calls == ["bind", "activate", "close"]


# shutdown, server_close


def test_server_close_may_come_before_shutdown(module: ModuleType) -> None:
    server = module.TCPServer(ADDRESS, upper_handler(module))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    assert talk(server.server_address, b"a\n") == b"A\n"
    server.server_close()
    server.shutdown()
    thread.join(60)
    assert not thread.is_alive()


def test_shutdown_may_be_extended_and_waits_for_the_loop(module: ModuleType) -> None:
    order: list[str] = []

    class Server(module.TCPServer):
        def serve_forever(self, poll_interval: float = 0.01) -> None:
            super().serve_forever(poll_interval)
            order.append("loop ended")

        def shutdown(self) -> None:
            super().shutdown()
            assert self._BaseServer__is_shut_down.is_set()
            order.append("shut down")

        def server_close(self) -> None:
            super().server_close()
            order.append("closed")

    with serving(Server(ADDRESS, upper_handler(module)), 0.01) as server:
        assert talk(server.server_address, b"a\n") == b"A\n"
    assert sorted(order[:2]) == ["loop ended", "shut down"]
    assert order[2:] == ["closed"]


def test_shutdown_waits_for_a_loop_that_is_just_ending(module: ModuleType) -> None:
    ending, may_end = threading.Event(), threading.Event()

    class Event(threading.Event):
        def set(self) -> None:
            ending.set()
            assert may_end.wait(60)
            super().set()

    server = module.TCPServer(ADDRESS, upper_handler(module))
    server._BaseServer__is_shut_down = Event()
    loop = threading.Thread(target=server.serve_forever, args=(0.01,))
    loop.start()
    assert talk(server.server_address, b"a\n") == b"A\n"
    server._BaseServer__shutdown_request = True
    assert ending.wait(60)
    stopper = threading.Thread(target=server.shutdown)
    stopper.start()
    stopper.join(0.1)
    returned_early = not stopper.is_alive()
    may_end.set()
    stopper.join(60)
    loop.join(60)
    server.server_close()
    assert not returned_early, "shutdown() returned before the loop had ended"


def test_a_shutdown_that_runs_before_serve_forever_makes_it_return_at_once(module: ModuleType) -> None:
    with module.TCPServer(ADDRESS, upper_handler(module)) as server:
        # In the stdlib it waits for the loop that is yet to come.
        stopper = threading.Thread(target=server.shutdown)
        stopper.start()
        wait_until(lambda: server._BaseServer__shutdown_request)
        server.serve_forever(60)
        stopper.join(60)
        assert not stopper.is_alive()


# serve_forever, handle_request


def test_serve_forever_may_be_wrapped(module: ModuleType) -> None:
    """Close the server with the end of its loop, as werkzeug does."""

    class Server(module.TCPServer):
        def serve_forever(self, poll_interval: float = 0.5) -> None:
            try:
                super().serve_forever(poll_interval=poll_interval)
            except KeyboardInterrupt:
                ended.append("interrupted")
            finally:
                self.server_close()

    def handle(*_: Any) -> None:
        raise KeyboardInterrupt

    ended: list[str] = []
    server = Server(ADDRESS, handle)
    with connect(server):
        server.serve_forever(0.01)
    assert ended == ["interrupted"]
    assert server.fileno() == -1


def test_a_serve_forever_of_ones_own_is_waited_for_by_shutdown(module: ModuleType) -> None:
    """Run a loop written by hand over the private names, as code from before ``service_actions`` does."""
    turns: list[int] = []
    may_end = threading.Event()

    class Server(module.TCPServer):
        def serve_forever(self, poll_interval: float = 0.5) -> None:
            self._BaseServer__is_shut_down.clear()
            try:
                while not self._BaseServer__shutdown_request:
                    turns.append(1)
                    if select.select([self], [], [], poll_interval)[0]:
                        self._handle_request_noblock()
                may_end.wait(60)
            finally:
                self._BaseServer__shutdown_request = False
                self._BaseServer__is_shut_down.set()

    server = Server(ADDRESS, upper_handler(module))
    loop = threading.Thread(target=server.serve_forever, args=(0.01,))
    loop.start()
    wait_until(lambda: turns)
    assert talk(server.server_address, b"a\n") == b"A\n"
    stopper = threading.Thread(target=server.shutdown)
    stopper.start()
    stopper.join(0.1)
    returned_early = not stopper.is_alive()
    may_end.set()
    stopper.join(60)
    loop.join(60)
    server.server_close()
    assert not loop.is_alive()
    assert not returned_early, "shutdown() returned while the loop still ran"


def test_handle_request_with_a_timeout_serves_until_told_to_stop(module: ModuleType) -> None:
    """Serve as ``logging.config.listen`` does."""

    class Server(module.ThreadingTCPServer):
        abort = 0
        timeout = 0.01
        timeouts = 0

        def handle_timeout(self) -> None:
            self.timeouts += 1

        def serve_until_stopped(self) -> None:
            while not self.abort:
                if select.select([self.socket.fileno()], [], [], self.timeout)[0]:
                    self.handle_request()
                else:
                    self.handle_request()
            self.server_close()

    server = Server(ADDRESS, upper_handler(module))
    thread = threading.Thread(target=server.serve_until_stopped)
    thread.start()
    assert talk(server.server_address, b"a\n") == b"A\n"
    wait_until(lambda: server.timeouts)
    server.abort = 1
    thread.join(60)
    assert not thread.is_alive()


def test_several_servers_are_served_from_one_select_loop(module: ModuleType) -> None:
    class Echo(module.BaseRequestHandler):
        def handle(self) -> None:
            data, listener = self.request
            listener.sendto(data, self.client_address)

    with (
        module.TCPServer(ADDRESS, upper_handler(module)) as first,
        module.ThreadingTCPServer(ADDRESS, upper_handler(module)) as second,
        module.UDPServer(ADDRESS, Echo) as third,
        connect(first) as one,
        connect(second) as two,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as three,
    ):
        one.sendall(b"one\n")
        two.sendall(b"two\n")
        three.settimeout(60)
        three.sendto(b"three", third.server_address)
        waiting = {first, second, third}
        while waiting:
            ready, _, _ = select.select(list(waiting), [], [], 60)
            assert ready
            for server in ready:
                server.handle_request()
            waiting.difference_update(ready)
        assert (one.recv(10), two.recv(10), three.recv(10)) == (b"ONE\n", b"TWO\n", b"three")
