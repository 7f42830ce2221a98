"""The real ssh client, driven through pipes."""

from __future__ import annotations

import os
import re
import select
import subprocess
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Self

from bench.errors import BenchError
from bench.server import ADDRESS
from bench.side import Side

# Seconds.
_TIMEOUT = 15.0

# Bytes that are enough for an error, and for what may be awaited.
_KEPT = 200

# The key that awaits a guest's first answer, and how a terminal that is not raw yet echoes it.
_KEY = b"\x01"
_LOST = b"^A"

# No file of the user's or the machine's has a say, and there is nothing to be asked.
_OPTIONS = (
    *("-F", "none", "-e", "none", "-o", "BatchMode=yes", "-o", "LogLevel=ERROR"),
    *("-o", "IdentitiesOnly=yes", "-o", "IdentityAgent=none"),
    *("-o", "PreferredAuthentications=publickey", "-o", "GlobalKnownHostsFile=/dev/null"),
    *("-o", "StrictHostKeyChecking=yes", "-o", "UpdateHostKeys=no"),
    # Since OpenSSH 9.5 keystrokes are sent on a raster of 20 ms unless this is off.
    *("-o", "IgnoreUnknown=ObscureKeystrokeTiming", "-o", "ObscureKeystrokeTiming=no"),
)
# What `ssh -v` says.
_NEGOTIATED = (
    r"^debug1: kex: (algorithm|host key algorithm|server->client cipher): (.*?)"
    r"(?: MAC: <implicit>)?(?: compression: none)?\r?$"
)


def command(side: Side, *arguments: str) -> list[str]:
    """The ssh command line: the same for both sides but for names of files, user and port."""
    access = side.access
    return [
        "ssh",
        *_OPTIONS,
        *("-i", str(access.key), "-o", f"UserKnownHostsFile={access.known_hosts}"),
        *("-p", str(access.port), *arguments[:-1], f"{access.user}@{ADDRESS}", arguments[-1]),
    ]


class Client:
    """One ssh session on a guest's console. Times are those of ``time.perf_counter``.

    ``-tt`` asks for a ``terminal`` on the server, whatever stdin is; stdin and stdout are pipes,
    so that there is no terminal on our side that would add a hop.
    """

    def __init__(self, side: Side, words: str, terminal: bool = True) -> None:
        """Start ssh. ``words`` are what the user says to the server: a guest's name, a command."""
        self._side = side
        self._seen = b""
        self.lost = 0
        """Keys that never got to the guest."""
        arguments = command(side, "-tt" if terminal else "-T", words)
        self.started = time.perf_counter()
        self._ssh = subprocess.Popen(
            arguments,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
        )
        assert self._ssh.stdin is not None and self._ssh.stdout is not None
        self._input = self._ssh.stdin.fileno()
        self._output = self._ssh.stdout.fileno()
        self._poll = select.poll()
        self._poll.register(self._output, select.POLLIN | select.POLLHUP)

    def read(self) -> tuple[bytes, float]:
        """What the session prints next, and when it came. Raises BenchError at its end."""
        if not self._poll.poll(_TIMEOUT * 1000):
            raise self._error(f"nothing was printed for {_TIMEOUT:g} s")
        data = os.read(self._output, 65536)
        now = time.perf_counter()
        if not data:
            raise self._error("the session ended")
        return data, now

    def pieces(self) -> Iterator[tuple[bytes, float]]:
        """What the session prints, and when, until ssh has ended, however it did. Raises
        BenchError when it is silent for too long."""
        while self._poll.poll(_TIMEOUT * 1000) and (data := os.read(self._output, 65536)):
            yield data, time.perf_counter()
        try:
            self._ssh.wait(_TIMEOUT)
        except subprocess.TimeoutExpired:
            raise self._error("ssh did not end") from None

    def read_until(self, end: bytes) -> float:
        """When ``end`` had been printed. Raises BenchError."""
        now = self.started
        while end not in self._seen:
            data, now = self.read()
            self._seen = self._seen[-_KEPT:] + data
        self._seen = self._seen.partition(end)[2]
        return now

    def attach(self) -> float:
        """Wait for the server's words before the console; when the first byte came."""
        self._seen, first = self.read()
        self.read_until(self._side.attached)
        return first

    def answer(self) -> float:
        """Type a key, and return when the guest had sent it back.

        A key is lost if virsh has not set its terminal to raw by then: it is echoed by the
        terminal and thrown away, and typed again.
        """
        self.press(_KEY)
        while _KEY not in self._seen:
            data, now = self.read()
            self._seen += data
            if _LOST in self._seen:
                self._seen = self._seen.replace(_LOST, b"", 1)
                self.lost += 1
                self.press(_KEY)
        self._seen = b""
        return now

    def press(self, data: bytes) -> float:
        """Type, and return when."""
        now = time.perf_counter()
        os.write(self._input, data)
        return now

    def echo(self, key: bytes) -> float:
        """Seconds from typing one key until the guest sent it back. Raises BenchError."""
        typed = self.press(key)
        data, now = self.read()
        if data != key:
            raise self._error(f"typed {key!r}, got {data!r}")
        return now - typed

    def leave(self) -> tuple[float, float]:
        """Leave the console; when that was typed, and when ssh had ended. Raises BenchError."""
        typed = self.press(self._side.leave)
        return typed, self.end()

    def has_ended(self) -> bool:
        """Whether ssh has."""
        return self._ssh.poll() is not None

    def end(self) -> float:
        """Wait until ssh has ended; when it had. Raises BenchError."""
        try:
            status = self._ssh.wait(_TIMEOUT)
        except subprocess.TimeoutExpired:
            raise self._error("ssh did not end") from None
        now = time.perf_counter()
        if status:
            raise self._error(f"ssh ended with status {status}")
        return now

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._ssh.kill()
        self._ssh.wait()
        for stream in (self._ssh.stdin, self._ssh.stdout, self._ssh.stderr):
            assert stream is not None
            stream.close()

    def _error(self, text: str) -> BenchError:
        self._ssh.kill()
        assert self._ssh.stderr is not None
        said = self._ssh.stderr.read().decode(errors="replace").strip()
        return BenchError(
            f"{self._side.label}: {text}. Unread: {self._seen[-200:]!r}. ssh: {said}\n"
            f"{self._side.log_end()}"
        )


def negotiated(side: Side) -> str:
    """The algorithms that ssh and the server agree on."""
    done = subprocess.run(
        command(side, "-v", "-o", "LogLevel=DEBUG1", "-T", "--", "no-such-vm"),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT,
    )
    found = dict(re.findall(_NEGOTIATED, done.stderr, re.MULTILINE))
    return ", ".join(found.values()) or "unknown"
