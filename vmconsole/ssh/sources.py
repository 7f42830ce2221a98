"""What is remembered of each address: its token bucket, and its tries in vain."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

from twisted.internet.interfaces import IDelayedCall

if TYPE_CHECKING:
    from vmconsole.ssh.admission import Entry

BURST = 10.0
"""Connections that a source may have without a login, before it is slowed down."""
REFILL = 5.0
"""Connections a second from then on."""
# As many as OpenSSH's PerSourcePenalties remember (max-sources4, max-sources6).
MAX_SOURCES = 65536
# Looks at the table for each connection that comes or goes: the work is spread.
_LOOKS = 2
# Looks for somebody to forget when the table is full.
_LOOKS_WHEN_FULL = 8
# So near to a whole token is one: a timer may fire a rounding error early.
_ROUNDING = 1e-6


class Source:
    """One address. Times are the clock's seconds."""

    __slots__ = (
        "_filled",
        "_tokens",
        "banned_until",
        "connections",
        "failed_at",
        "failures",
        "name",
        "timer",
        "waiting",
    )

    def __init__(self, name: str, now: float) -> None:
        self.name = name
        self.connections = 0
        """Those that were let in, or wait for that."""
        self.waiting: dict[Entry, None] = {}
        """Who waits for a token, in order."""
        self.timer: IDelayedCall | None = None
        self.failures = 0
        """Connections in a row that ended without a login."""
        self.failed_at = 0.0
        self.banned_until = 0.0
        self._tokens = BURST
        self._filled = now

    def take(self, now: float) -> bool:
        """Take a token, if there is one."""
        self._fill(now)
        if self._tokens < 1.0 - _ROUNDING:
            return False
        self._tokens -= 1.0
        return True

    def give_back(self, now: float) -> None:
        """The connection that took a token logged in."""
        self._fill(now)
        self._tokens += 1.0

    def next_token(self, now: float) -> float:
        """Seconds until there is one."""
        self._fill(now)
        return max(0.0, (1.0 - self._tokens) / REFILL)

    def forget_at(self, remember_failures: float) -> float:
        """From when on it is as if it had never been here."""
        full = self._filled + (BURST - self._tokens) / REFILL
        failed = self.failed_at + remember_failures if self.failures else 0.0
        return max(full, failed, self.banned_until)

    def _fill(self, now: float) -> None:
        # A clock that was set back must not empty the bucket.
        passed = max(0.0, now - self._filled)
        self._tokens = min(BURST, self._tokens + passed * REFILL)
        self._filled = now


class Sources:
    """The sources that are worth remembering, in bounded memory.

    One without connections is forgotten once its bucket is full and its tries in vain count no
    more. When there are too many all the same, one of those goes that are nearest to that.
    """

    def __init__(self, remember_failures: float, max_sources: int = MAX_SOURCES) -> None:
        """``remember_failures``: for so many seconds after the last one; 0: not at all."""
        self._remember_failures = remember_failures
        self._max_sources = max_sources
        self._sources: dict[str, Source] = {}
        # When a source without connections is to be looked at; at most once each.
        self._idle: list[tuple[float, str]] = []
        self._queued: set[str] = set()

    def __len__(self) -> int:
        return len(self._sources)

    def find(self, name: str, now: float) -> Source:
        """The source of this name, as it is remembered, or new."""
        self._clean_up(now)
        source = self._sources.get(name)
        if source is None:
            if len(self._sources) >= self._max_sources:
                self._make_room()
            source = self._sources[name] = Source(name, now)
        return source

    def left(self, source: Source, now: float) -> None:
        """A connection of ``source`` is gone, or was refused."""
        if not source.connections and source.name not in self._queued:
            self._queue(source)
        self._clean_up(now)

    def _queue(self, source: Source) -> None:
        self._queued.add(source.name)
        heapq.heappush(self._idle, (source.forget_at(self._remember_failures), source.name))

    def _clean_up(self, now: float) -> None:
        for _ in range(_LOOKS):
            if not self._idle or self._idle[0][0] > now:
                return
            self._look()

    def _make_room(self) -> None:
        for _ in range(_LOOKS_WHEN_FULL):
            if not self._idle or self._look():
                return
        while self._idle:
            _, name = heapq.heappop(self._idle)
            self._queued.discard(name)
            if not self._sources[name].connections:
                del self._sources[name]
                return

    def _look(self) -> bool:
        """Whether the first in the queue was forgotten."""
        due, name = heapq.heappop(self._idle)
        self._queued.discard(name)
        source = self._sources[name]
        if source.connections:
            # It is queued again when the last of them has left.
            return False
        if source.forget_at(self._remember_failures) > due:
            self._queue(source)
            return False
        del self._sources[name]
        return True
