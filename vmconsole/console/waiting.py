"""Waits for a VM that is not there yet, on a user's channel."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.internet.protocol import Protocol
from twisted.internet.task import deferLater

from vmconsole.console.choice import NoSuchConsole
from vmconsole.console.escape import Command, EscapeScanner
from vmconsole.errors import ConsoleError, EngineError
from vmconsole.interfaces import ConsoleInfo

# Seconds from one look to the next.
LOOK_EVERY = 2.0

_CTRL_C = b"\x03"
_BELL = b"\x07"


class Waiting(Protocol):
    """The protocol on the channel meanwhile: Ctrl-C, or the keys that leave a console, give up;
    what else is typed is refused with a bell."""

    def __init__(self, clock: IReactorTime, escape: int | None) -> None:
        self._clock = clock
        self._scanner = EscapeScanner(escape)
        self._looking: Deferred[ConsoleInfo] | None = None
        self._gave_up = False

    async def until_found(self, look: Callable[[], Awaitable[ConsoleInfo]]) -> ConsoleInfo:
        """Look now and then: what is found. Raises ConsoleError when the user gave up, and what
        ``look`` raises, but for NoSuchConsole, and for an EngineError, which may pass."""
        while not self._gave_up:
            self._looking = Deferred.fromCoroutine(self._look_later(look))
            try:
                return await self._looking
            except (NoSuchConsole, EngineError):
                pass
            except CancelledError:
                if not self._gave_up:
                    raise
        raise ConsoleError("You gave up.")

    async def _look_later(self, look: Callable[[], Awaitable[ConsoleInfo]]) -> ConsoleInfo:
        await deferLater(self._clock, LOOK_EVERY)
        return await look()

    def dataReceived(self, data: bytes) -> None:
        """The user typed."""
        if _CTRL_C in data or Command.LEAVE in self._scanner.feed(data):
            self._gave_up = True
            if self._looking is not None:
                self._looking.cancel()
        elif self.transport is not None:
            self.transport.write(_BELL)
