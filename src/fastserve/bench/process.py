"""A server process under measurement: where it runs, when it runs, and what it has used."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

START_LIMIT = 20.0  # seconds until a server has printed its port
STOP_LIMIT = 5.0  # seconds until a server has ended after SIGTERM
TICK = 1.0 / os.sysconf("SC_CLK_TCK")
PR_SET_PDEATHSIG = 1  # prctl(2)


class ServerFailed(Exception):
    """A server process did not start, or ended too early. The text says what it wrote to standard error.

    :ivar status: the exit status of the process, ``None`` if it has none.
    :ivar errors: what it wrote to standard error.
    """

    def __init__(self, message: str, status: int | None = None, errors: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.errors = errors


def cores() -> tuple[int, int]:
    """Return the processor for the servers and the one for the load.

    Raises ``ServerFailed`` on a machine with one: there the load would take its time from what is measured.
    """
    usable = sorted(os.sched_getaffinity(0))
    if len(usable) < 2:
        raise ServerFailed("a measurement needs two processors, one for the server and one for the load")
    return usable[0], usable[1]


class ServerProcess:
    """A process that prints the port that it serves, pinned to one processor, in a process group of its own.

    On Linux it is killed if the thread that started it ends first, however that ends.
    """

    def __init__(
        self, name: str, command: Sequence[str], core: int | None, environment: Mapping[str, str] | None = None
    ) -> None:
        """Start ``command`` and wait until it has printed its port; ``core`` None leaves it unpinned.

        Raises ``ServerFailed``.
        """
        self.name = name
        self._errors = tempfile.TemporaryFile()
        libc = ctypes.CDLL(None)

        def prepare() -> None:
            if hasattr(libc, "prctl"):
                libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if core is not None:
                os.sched_setaffinity(0, {core})

        try:
            self._process = subprocess.Popen(
                command,
                bufsize=0,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env=dict(os.environ, **(environment or {})),
                start_new_session=True,
                preexec_fn=prepare,
            )
        except OSError as error:
            self._errors.close()
            raise ServerFailed(f"{name} did not start: {error}") from None
        self.pid = self._process.pid
        self._ended = False
        try:
            line = self._first_line()
            if not line.strip().isdigit():
                status = None
                with contextlib.suppress(subprocess.TimeoutExpired):  # it prints something else, and goes on
                    status = self._process.wait(STOP_LIMIT)
                raise ServerFailed(f"{name} did not start: {self.errors() or repr(line)}", status, self.errors())
        except BaseException:
            self.end()
            raise
        self.address = ("127.0.0.1", int(line))

    def _first_line(self) -> bytes:
        """Return the first line that the server prints, what there is of it if it ends before.

        Raises ``ServerFailed`` if neither happens in time.
        """
        assert self._process.stdout is not None
        line = b""
        deadline = time.monotonic() + START_LIMIT
        while not line.endswith(b"\n"):
            if not select.select([self._process.stdout], [], [], max(deadline - time.monotonic(), 0))[0]:
                raise ServerFailed(f"{self.name} did not start in {START_LIMIT:.0f} seconds: {self.errors()}")
            # Byte by byte, so that what follows stays where it is.
            byte = self._process.stdout.read(1)
            if not byte:
                break
            line += byte
        return line

    def errors(self) -> str:
        """Return what the server has written to standard error so far."""
        # The server shares the offset of the file: seek() would have it write over what it wrote before.
        size = os.fstat(self._errors.fileno()).st_size
        return os.pread(self._errors.fileno(), size, 0).decode(errors="replace").strip()

    def check(self) -> None:
        """Raise ``ServerFailed`` if the process has ended."""
        if self._process.poll() is not None:
            status = self._process.returncode
            raise ServerFailed(f"{self.name} ended with status {status}: {self.errors()}", status, self.errors())

    def _processes(self) -> list[int]:
        """Return the process and its living descendants."""
        found = [self.pid]
        for pid in found:
            # A child is listed under the thread that has forked it.
            threads: list[str] = []
            with contextlib.suppress(OSError):
                threads = os.listdir(f"/proc/{pid}/task")
            for thread in threads:
                with contextlib.suppress(OSError):
                    found += map(int, Path(f"/proc/{pid}/task/{thread}/children").read_text().split())
        return found

    def cpu(self) -> float:
        """Return the seconds of CPU time used so far by all threads and children, living and ended.

        The time of living processes is exact; that of ended children is counted by the kernel in ticks of 10 ms.
        """
        total = 0.0
        for pid in self._processes():
            with contextlib.suppress(OSError):  # it has ended since, and is counted below
                total += time.clock_gettime((~pid << 3) | 2)  # clock_getcpuclockid(3)
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return total + (int(fields[13]) + int(fields[14])) * TICK  # cutime and cstime, proc(5)

    def rss(self) -> int:
        """Return the resident memory of the process in bytes."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def pause(self) -> None:
        """Stop all its processes, so that they take no time from the one that is measured."""
        with contextlib.suppress(ProcessLookupError):  # it has ended, as check() tells
            os.killpg(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let them go on."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGCONT)

    def end(self) -> None:
        """End all its processes, by force if need be."""
        if self._ended:
            return  # and its number may be that of another process by now
        self._ended = True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGCONT)
            os.killpg(self.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_LIMIT)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._errors.close()

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *exception: object) -> None:
        self.end()
