"""Child processes that a test talks to: what they print is awaited, never slept for."""

from __future__ import annotations

import os
import pty
import re
import struct
from collections.abc import Mapping, Sequence
from contextlib import suppress
from fcntl import ioctl
from termios import TIOCSWINSZ
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.error import ProcessExitedAlready
from twisted.internet.interfaces import IProcessTransport
from twisted.internet.protocol import ProcessProtocol
from twisted.python.failure import Failure

# Seconds that a test waits for what has to come; a slow machine needs a part of it.
PATIENCE = 30.0


class Unexpected(Exception):
    """What was awaited did not come. The text has what came instead."""


class Child(ProcessProtocol):
    """A running program. ``seen`` is all that it wrote to stdout (with a pty: to the terminal),
    ``errors`` what it wrote to stderr."""

    transport: IProcessTransport

    def __init__(self, name: str) -> None:
        self.name = name
        self.seen = b""
        self.errors = b""
        self.status: int | None = None
        """The exit status; negative: the signal that ended it."""
        self._terminal: int | None = None
        self._mark = 0
        self._waiting: tuple[re.Pattern[bytes], Deferred[re.Match[bytes]], Any] | None = None
        self._ended: list[Deferred[int]] = []

    def spawn(
        self,
        reactor: Any,
        command: Sequence[str],
        env: Mapping[str, str] | None = None,
        terminal: bool = False,
        cwd: str | None = None,
    ) -> Child:
        """Start it; with ``terminal`` on a pty of 80 by 24."""
        self._reactor = reactor
        environ = {**os.environ, **(env or {})}
        use_pty: Any = False
        if terminal:
            use_pty = *pty.openpty(), ""
            ioctl(use_pty[0], TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
            # A terminal outlives its programs. This one would go, with a SIGHUP, as soon as the
            # program closes it, which some do before they end.
            self._terminal = os.dup(use_pty[1])
        reactor.spawnProcess(self, command[0], list(command), env=environ, usePTY=use_pty, path=cwd)
        return self

    def outReceived(self, data: bytes) -> None:
        self.seen += data
        self._look()

    def errReceived(self, data: bytes) -> None:
        self.errors += data

    def processExited(self, reason: Failure) -> None:
        if self._terminal is not None:
            os.close(self._terminal)

    def processEnded(self, reason: Failure) -> None:
        value: Any = reason.value
        self.status = -value.signal if value.signal else value.exitCode
        self._look()
        if self._waiting is not None:
            self._give_up("it ended")
        ended, self._ended = self._ended, []
        for deferred in ended:
            deferred.callback(self.status)

    async def expect(self, pattern: bytes, patience: float = PATIENCE) -> re.Match[bytes]:
        """Wait until ``pattern`` (a regular expression) comes, behind what was matched before."""
        assert self._waiting is None
        deferred: Deferred[re.Match[bytes]] = Deferred()
        timer = self._reactor.callLater(patience, self._give_up, f"{patience} s passed")
        self._waiting = (re.compile(pattern, re.DOTALL), deferred, timer)
        self._look()
        if self.status is not None and self._waiting is not None:
            self._give_up("it had ended")
        return await deferred

    def type(self, data: bytes) -> None:
        """Write to its standard input, or type on its terminal."""
        self.transport.write(data)

    def end_input(self) -> None:
        """Close its standard input."""
        self.transport.closeStdin()

    async def ended(self, patience: float = PATIENCE) -> int:
        """Wait for its end; the result is the exit status."""
        if self.status is None:
            deferred: Deferred[int] = Deferred()
            self._ended.append(deferred)
            deferred.addTimeout(patience, self._reactor)
            return await deferred
        return self.status

    async def kill(self, signal: str = "KILL") -> None:
        """End it, if it still runs."""
        if self.status is None:
            # It may have ended, and its output still be on the way.
            with suppress(ProcessExitedAlready):
                self.transport.signalProcess(signal)
            await self.ended()

    def _look(self) -> None:
        if self._waiting is None:
            return
        pattern, deferred, timer = self._waiting
        match = pattern.search(self.seen, self._mark)
        if match is not None:
            self._mark = match.end()
            self._waiting = None
            timer.cancel()
            deferred.callback(match)

    def _give_up(self, why: str) -> None:
        assert self._waiting is not None
        pattern, deferred, timer = self._waiting
        self._waiting = None
        if timer.active():
            timer.cancel()
        deferred.errback(
            Unexpected(
                f"{self.name}: {why} before {pattern.pattern!r} came. Since the last match: "
                f"{self.seen[self._mark :][-2000:]!r}; stderr: {self.errors[-2000:]!r}; "
                f"status {self.status}"
            )
        )
