"""The example that speaks RESP: its parser, its commands, and the tools of Redis as its clients."""

from __future__ import annotations

import importlib.util
import io
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from children import IMPLEMENTATIONS, child
from support import serving, talk

EXAMPLE = Path(__file__).parent.parent / "examples" / "resp_server.py"

spec = importlib.util.spec_from_file_location("resp_server", EXAMPLE)
assert spec is not None and spec.loader is not None
resp: Any = importlib.util.module_from_spec(spec)
sys.modules["resp_server"] = resp
spec.loader.exec_module(resp)

words = st.lists(st.binary(max_size=40), max_size=6)


def array(*parts: bytes) -> bytes:
    """Return a request as an array."""
    return b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%s\r\n" % (len(part), part) for part in parts)


@contextmanager
def fresh(module: Any) -> Iterator[Any]:
    """Serve the handler, with a store of its own, on the given module's class; return the address."""

    class Handler(resp.RespHandler):  # type: ignore[misc, name-defined]
        commands = resp.commands(resp.Store())

    class Server(module.ThreadingTCPServer):  # type: ignore[misc, name-defined]
        request_queue_size = 128

    with serving(Server(("127.0.0.1", 0), Handler), 0.01) as server:
        yield server.server_address


# --- the parser ---------------------------------------------------------------------------------------------


@given(st.lists(words, max_size=4))
def test_arrays_are_read_as_they_were_written_one_after_the_other(requests: list[list[bytes]]) -> None:
    rfile = io.BufferedReader(io.BytesIO(b"".join(array(*request) for request in requests)))
    assert [resp.read_request(rfile) for _ in requests] == requests
    with pytest.raises(EOFError):
        resp.read_request(rfile)


@given(st.lists(st.binary(min_size=1, max_size=20).filter(lambda word: word.split() == [word]), min_size=1, max_size=5))
def test_inline_commands_are_split_at_spaces(parts: list[bytes]) -> None:
    if parts[0].startswith(b"*"):
        parts[0] = b"x" + parts[0]
    for end in (b"\n", b"\r\n"):
        assert resp.read_request(io.BytesIO(b" ".join(parts) + end)) == parts
        assert resp.read_request(io.BytesIO(b"  " + b"\t ".join(parts) + b" " + end)) == parts


@given(words.filter(bool), st.data())
def test_a_request_that_is_cut_short_is_the_end(request: list[bytes], data: st.DataObject) -> None:
    whole = array(*request)
    with pytest.raises(EOFError):
        resp.read_request(io.BytesIO(whole[: data.draw(st.integers(0, len(whole) - 1))]))


@given(st.binary(max_size=200))
def test_rubbish_is_words_or_an_error_and_never_anything_else(data: bytes) -> None:
    rfile = io.BytesIO(data)
    with pytest.raises((EOFError, resp.ProtocolError)):
        while True:
            assert all(isinstance(word, bytes) for word in resp.read_request(rfile))


@given(
    st.none()
    | st.integers(-(1 << 63), (1 << 63) - 1)
    | st.binary(max_size=50)
    | st.sampled_from(["OK", "PONG"])
    | st.lists(st.binary(max_size=20), max_size=5)
)
def test_replies_can_be_read_back(reply: Any) -> None:
    rfile = io.BytesIO(resp.encode(reply))
    assert decode(rfile) == reply
    assert rfile.read() == b""


def decode(rfile: Any) -> Any:
    """Read a reply as a client does."""
    kind, rest = rfile.read(1), rfile.readline()
    assert rest.endswith(b"\r\n")
    text = rest[:-2]
    if kind in (b"+", b"-"):
        return text.decode()
    if kind == b":":
        return int(text)
    if kind == b"*":
        return [decode(rfile) for _ in range(int(text))]
    assert kind == b"$"
    if text == b"-1":
        return None
    data = rfile.read(int(text) + 2)
    assert data.endswith(b"\r\n") and len(data) == int(text) + 2
    return data[:-2]


# --- by hand ------------------------------------------------------------------------------------------------

CONVERSATION = [
    (b"PING\r\n", b"+PONG\r\n"),
    (b"ping\n", b"+PONG\r\n"),
    (array(b"PING", b"a\r\nb"), b"$4\r\na\r\nb\r\n"),
    (array(b"ECHO", b"\x00\xff"), b"$2\r\n\x00\xff\r\n"),
    (b"\r\n*0\r\n*-1\r\nPING\r\n", b"+PONG\r\n"),
    (array(b"GET", b"k"), b"$-1\r\n"),
    (array(b"SET", b"k", b"\r\n\x00$"), b"+OK\r\n"),
    (array(b"get", b"k"), b"$4\r\n\r\n\x00$\r\n"),
    (array(b"SET", b"", b""), b"+OK\r\n"),
    (array(b"GET", b""), b"$0\r\n\r\n"),
    (array(b"EXISTS", b"k", b"k", b"none"), b":2\r\n"),
    (array(b"DEL", b"k", b"k", b"none", b""), b":2\r\n"),
    (array(b"EXISTS", b"k"), b":0\r\n"),
    (b"INCR n\r\nINCR n\r\nGET n\r\n", b":1\r\n:2\r\n$1\r\n2\r\n"),
    (b"SET n -5\r\nINCR n\r\n", b"+OK\r\n:-4\r\n"),
    (b"SET n 9223372036854775806\r\nINCR n\r\n", b"+OK\r\n:9223372036854775807\r\n"),
    (b"INCR n\r\n", b"-ERR value is not an integer or out of range\r\n"),
    (b"GET n\r\n", b"$19\r\n9223372036854775807\r\n"),
    (b"SET n 1_0\r\nINCR n\r\n", b"+OK\r\n-ERR value is not an integer or out of range\r\n"),
    (b"CONFIG GET save\r\n", b"*2\r\n$4\r\nsave\r\n$0\r\n\r\n"),
    (b"CONFIG SET save x\r\n", b"-ERR only CONFIG GET is known\r\n"),
    (b"COMMAND DOCS\r\n", b"*0\r\n"),
    (b"NONSENSE x\r\n", b"-ERR unknown command 'NONSENSE'\r\n"),
    (array(b"a\r\nb"), b"-ERR unknown command 'A B'\r\n"),
    (b"GET\r\n", b"-ERR wrong number of arguments for 'get' command\r\n"),
    (b"SET a b c\r\n", b"-ERR wrong number of arguments for 'set' command\r\n"),
    (b"PING a b\r\n", b"-ERR wrong number of arguments for 'ping' command\r\n"),
]


def test_each_command_answers_as_redis_does(module: Any) -> None:
    with (
        fresh(module) as address,
        socket.create_connection(address, timeout=60) as client,
        client.makefile("rb") as answers,
    ):
        for sent, expected in CONVERSATION:
            client.sendall(sent)
            assert answers.read(len(expected)) == expected, sent
        client.sendall(b"QUIT\r\nPING\r\n")
        assert answers.readline() == b"+OK\r\n"


def test_pipelined_commands_are_answered_in_order(module: Any) -> None:
    with fresh(module) as address:
        sent = b"".join(sent for sent, _ in CONVERSATION) + array(b"QUIT")
        assert talk(address, sent) == b"".join(expected for _, expected in CONVERSATION) + b"+OK\r\n"


@pytest.mark.parametrize(
    ("sent", "error"),
    [
        (b"*x\r\n", "invalid multibulk length"),
        (b"*-2\r\n", "invalid multibulk length"),
        (b"*1025\r\n", "invalid multibulk length"),
        (b"*99999999999999999999\r\n", "invalid multibulk length"),
        (b"*1\r\n:4\r\n", "expected '$'"),
        (b"*1\r\n$-1\r\n", "invalid bulk length"),
        (b"*1\r\n$8388609\r\n", "invalid bulk length"),
        (b"*2\r\n$8388607\r\n" + bytes(8388607) + b"\r\n$2\r\n", "invalid bulk length"),
        (b"*1\r\n$4\r\nPINGPING", "a bulk string does not end where it says"),
        (b"x" * 65536, "too big inline request"),
    ],
    ids=lambda value: value[:20] if isinstance(value, bytes) else None,
)
def test_what_is_not_resp_gets_an_error_and_the_connection_is_closed(module: Any, sent: bytes, error: str) -> None:
    with fresh(module) as address:
        assert talk(address, b"PING\r\n" + sent) == b"+PONG\r\n-ERR Protocol error: " + error.encode() + b"\r\n"
        assert talk(address, b"PING\r\n") == b"+PONG\r\n", "others are served on"


def test_numbers_that_many_clients_count_up_lose_nothing(module: Any) -> None:
    with fresh(module) as address:
        threads = [threading.Thread(target=talk, args=(address, b"INCR n\r\n" * 200)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert talk(address, b"GET n\r\n") == b"$4\r\n1600\r\n"


# --- the tools of Redis -------------------------------------------------------------------------------------


def tool(name: str, port: int, *arguments: str) -> str:
    """Run a client of Redis, and return what it prints."""
    if shutil.which(name) is None:
        pytest.skip(f"{name} is not installed (Debian: redis-tools)")
    result = subprocess.run(
        [name, "-h", "127.0.0.1", "-p", str(port), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return result.stdout


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_redis_cli_is_content(implementation: str, tmp_path: Path) -> None:
    with child(implementation, tmp_path, [str(EXAMPLE)]) as server:
        port = server.port()
        assert tool("redis-cli", port, "set", "greeting", "hello world") == "OK\n"
        assert tool("redis-cli", port, "get", "greeting") == "hello world\n"
        assert tool("redis-cli", port, "--no-raw", "incr", "n") == "(integer) 1\n"
        assert tool("redis-cli", port, "--no-raw", "get", "none") == "(nil)\n"
        assert "unknown command 'NONE'" in tool("redis-cli", port, "none")
        assert server.interrupt() == "stopped\n"


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("pipeline", [1, 16])
def test_redis_benchmark_is_content(implementation: str, tmp_path: Path, pipeline: int) -> None:
    with child(implementation, tmp_path, [str(EXAMPLE)]) as server:
        arguments = ("-t", "ping,set,get,incr", "-n", "800", "-c", "20", "-P", str(pipeline), "--csv")
        rows = tool("redis-benchmark", server.port(), *arguments)
        found = {row.split('"')[1]: float(row.split('"')[3]) for row in rows.splitlines()[1:]}
        assert {re.sub(r" .*", "", name) for name in found} == {"PING_INLINE", "PING_MBULK", "SET", "GET", "INCR"}
        assert min(found.values()) > 0
        assert server.interrupt() == "stopped\n"
