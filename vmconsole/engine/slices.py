"""Long work on the reactor's thread, a little at a time."""

from __future__ import annotations

from collections.abc import Iterable

from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater

# Seconds of work between two turns of the reactor. A keystroke takes some four of these.
SLICE = 0.001


async def in_slices(steps: Iterable[object], clock: IReactorTime) -> None:
    """Take all ``steps``, each of which does its work when it is taken. Raises what they raise."""
    end = clock.seconds() + SLICE
    for _ in steps:
        now = clock.seconds()
        # A clock that was set back must not make one slice of all the rest.
        if not end - SLICE <= now < end:
            await deferLater(clock, 0)
            end = clock.seconds() + SLICE
