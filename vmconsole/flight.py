"""One answer that many wait for."""

from __future__ import annotations

from typing import Generic, TypeVar

from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

T = TypeVar("T")


class Flight(Generic[T]):
    """Hands the result of ``answer``, also a failure, to all who wait, now or later.

    A waiter that is cancelled leaves ``answer`` and the other waiters alone.
    """

    def __init__(self, answer: Deferred[T]) -> None:
        self.landed = False
        self._waiters: list[Deferred[T]] = []
        self._outcome: T | Failure
        answer.addBoth(self._land)

    def wait(self) -> Deferred[T]:
        """The result, or the failure."""
        waiter: Deferred[T] = Deferred()
        if self.landed:
            waiter.callback(self._outcome)
        else:
            self._waiters.append(waiter)
        return waiter

    def _land(self, outcome: T | Failure) -> None:
        self.landed, self._outcome = True, outcome
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            waiter.callback(outcome)
