"""Work of many clients that waits, a part in each turn of the reactor."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from twisted.internet.interfaces import IReactorTime


class Turns:
    """Makes calls in their order, one in each turn of the reactor, and none in this one: with many
    clients whose work waits a turn is no longer than with one."""

    def __init__(self, clock: IReactorTime) -> None:
        self._clock = clock
        self._waiting: deque[Callable[[], None]] = deque()

    def add(self, call: Callable[[], None]) -> None:
        """Make this call when all that wait have had their turns."""
        self._waiting.append(call)
        if len(self._waiting) == 1:
            self._clock.callLater(0, self._next)

    def _next(self) -> None:
        call = self._waiting.popleft()
        # Before the work: it may fail.
        if self._waiting:
            self._clock.callLater(0, self._next)
        call()
