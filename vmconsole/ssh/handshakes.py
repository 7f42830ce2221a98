"""Key exchanges, one at a time: a storm of clients must not be one long turn of the reactor."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable

from twisted.internet.interfaces import IReactorTime

# Bytes between two key exchanges of which a client may begin as many as it likes.
_TRAFFIC = 524288
# Of others: so many at once, and seconds for each one more.
_AT_ONCE = 8
_INTERVAL = 0.5


class Handshakes:
    """Runs key exchanges, each of which takes some milliseconds, one in each turn of the reactor.

    What users who are logged in are waiting for comes first.
    """

    def __init__(self, clock: IReactorTime) -> None:
        self._clock = clock
        self._users: deque[Callable[[], None]] = deque()
        self._strangers: deque[Callable[[], None]] = deque()
        self._running = False

    def __len__(self) -> int:
        """How many wait."""
        return len(self._users) + len(self._strangers)

    def run(self, exchange: Callable[[], None], logged_in: bool) -> None:
        """Call ``exchange`` when it is its turn, which may be at once."""
        (self._users if logged_in else self._strangers).append(exchange)
        if not self._running:
            self._running = True
            self._next()

    def _next(self) -> None:
        waiting = self._users or self._strangers
        if not waiting:
            self._running = False
            return
        # Before the work: it may fail.
        self._clock.callLater(0, self._next)
        waiting.popleft()()


class ExchangeBudget:
    """How often a client may begin a key exchange; whoever does it more often has to wait.

    One after each half MiB of traffic is free, as a client's RekeyLimit of 1M makes them. Of
    others there may be eight, and then one in half a second.
    """

    def __init__(self, clock: IReactorTime) -> None:
        self._clock = clock
        self._free_at = -math.inf

    def delay(self, traffic: int) -> float:
        """Seconds that the next exchange has to wait, when ``traffic`` bytes came or went since
        the last one."""
        if traffic >= _TRAFFIC:
            return 0.0
        now = self._clock.seconds()
        self._free_at = max(self._free_at, now - _AT_ONCE * _INTERVAL) + _INTERVAL
        return max(0.0, self._free_at - now)
