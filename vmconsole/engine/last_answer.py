"""The last good answer to a question, and how long it serves."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

import msgspec
from twisted.internet.defer import Deferred, TimeoutError
from twisted.internet.interfaces import IReactorTime

from vmconsole.errors import EngineError, EngineUnreachable
from vmconsole.flight import Flight
from vmconsole.text import ago

T = TypeVar("T")

# Seconds that a failure is believed before the engine is asked again.
_FAILURE_LASTS = 1.0
# Seconds that somebody waits for an engine that was out of reach a moment ago, when there is an
# older answer to go by.
_PATIENCE = 1.0


class Outage:
    """Whether the engine was out of reach when it was asked last, whatever the question was."""

    known = False


class Lifetimes(msgspec.Struct, frozen=True):
    """How long answers serve, in seconds."""

    cache_ttl: float
    """Without asking again."""
    stale_grace: float
    """While the engine does not answer; 0: not at all."""


class Answer(msgspec.Struct, Generic[T], frozen=True):
    """What the engine said."""

    value: T
    answered: float | None = None
    """When (``clock.seconds()``), if it does not answer now; None: it just did."""


class LastAnswer(Generic[T]):
    """One question to the engine. All who ask it at the same time share one request.

    ``ask`` puts the question, and is given the last answer. No answer is EngineUnreachable, and
    then the last good one serves; beside any other EngineError, which is an answer, it does not.
    """

    def __init__(
        self,
        ask: Callable[[T | None], Coroutine[Deferred[Any], Any, T]],
        clock: IReactorTime,
        lifetimes: Lifetimes,
        outage: Outage,
    ) -> None:
        self._ask = ask
        self._clock = clock
        self._lifetimes = lifetimes
        self._outage = outage
        self.value: T | None = None
        self._asked: float | None = None
        self._flight: Flight[T] | None = None
        self._failed: tuple[float, EngineError] | None = None

    async def get(self, max_age: float | None = None, ahead: bool = False) -> Answer[T]:
        """An answer that is younger than ``max_age`` seconds (None: ``cache_ttl``).

        ``ahead``: one of more than half that age is used, and renewed meanwhile. Raises
        EngineError.
        """
        limit = self._lifetimes.cache_ttl if max_age is None else max_age
        if self.value is not None and self.is_younger(limit):
            if ahead and not self.is_younger(limit / 2) and not self._just_failed():
                self._start()
            return Answer(self.value)
        last = self.value if self.is_younger(self._lifetimes.stale_grace) else None
        try:
            return Answer(await self._newest(last is not None and self._outage.known))
        except EngineUnreachable as error:
            if self.value is None or self._asked is None:
                raise
            if last is None:
                age = ago(self._clock.seconds() - self._asked)
                raise EngineUnreachable(
                    f"{error} Its last answer, from {age}, is too old."
                ) from error
            return Answer(self.value, self._asked)

    async def fresh(self) -> T:
        """An answer that just came. Raises EngineError."""
        return await self._newest(False)

    def is_younger(self, seconds: float) -> bool:
        """Whether the last good answer is."""
        return self._asked is not None and self._is_recent(self._asked, seconds)

    @property
    def in_use(self) -> bool:
        """Whether the engine is being asked, or has just failed to answer."""
        return self._flight is not None or self._just_failed()

    async def _newest(self, impatient: bool) -> T:
        if self._failed is not None and self._just_failed():
            raise self._failed[1]
        waiter = self._start().wait()
        if impatient:
            waiter.addTimeout(_PATIENCE, self._clock)
        try:
            return await waiter
        except TimeoutError:
            raise EngineUnreachable("The engine still does not answer.") from None

    def _start(self) -> Flight[T]:
        if self._flight is None:
            # It may land before the call returns.
            answer: Deferred[T] = Deferred.fromCoroutine(self._fly())
            flight = Flight(answer)
            if not flight.landed:
                self._flight = flight
            return flight
        return self._flight

    async def _fly(self) -> T:
        asked = self._clock.seconds()
        try:
            value = await self._ask(self.value)
        except EngineError as error:
            self._outage.known = isinstance(error, EngineUnreachable)
            # Another one, since this one's traceback keeps all of a large answer.
            self._failed = (self._clock.seconds(), type(error)(str(error)))
            raise
        else:
            self._outage.known = False
            self._failed = None
            self.value, self._asked = value, asked
            return value
        finally:
            self._flight = None

    def _just_failed(self) -> bool:
        return self._failed is not None and self._is_recent(self._failed[0], _FAILURE_LASTS)

    def _is_recent(self, moment: float, seconds: float) -> bool:
        # A clock that was set back must not make an answer last.
        return 0 <= self._clock.seconds() - moment < seconds
