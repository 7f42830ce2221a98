"""Two kinds of time: the time of day, which people and NTP set, and one that only goes on."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any


def make_steady(
    reactor: Any, monotonic: Callable[[], float], time_of_day: Callable[[], float]
) -> None:
    """Have all timers of ``reactor``, and its ``seconds``, go on as ``monotonic`` does (seconds
    since whenever), whatever the machine's clock is set to.

    Twisted's follow the time of day: set back by an hour, no timer is due for an hour, and a
    session that is to end does not. Timers that run already stay right.
    """
    # So that they look like POSIX seconds; they are, until the clock is set.
    ahead = reactor.seconds() - monotonic()
    reactor.seconds = lambda: ahead + monotonic()
    reactor.time_of_day = time_of_day


def posix_clock(clock: Any) -> Callable[[], float]:
    """What gives the time of day in POSIX seconds, by which certificates and tickets are judged.

    A clock that has no other time, such as ``task.Clock``, gives its ``seconds``.
    """
    found: Callable[[], float] = getattr(clock, "time_of_day", clock.seconds)
    return found


def posix_now(clock: Any) -> float:
    """The time of day in POSIX seconds."""
    return posix_clock(clock)()


def utc_now(clock: Any) -> datetime:
    """The same as a datetime."""
    return datetime.fromtimestamp(posix_now(clock), UTC)


def posix_of(clock: Any, moment: float) -> float:
    """What the time of day is now said to have been at ``moment`` (as ``clock.seconds()``)."""
    return posix_now(clock) - (float(clock.seconds()) - moment)
