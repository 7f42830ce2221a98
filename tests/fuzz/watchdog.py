"""Ends what does not end by itself. For the main thread."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from tests.fuzz.peer import Runaway


@contextmanager
def cpu_limit(seconds: float) -> Iterator[None]:
    """Raise Runaway where the process is after so many seconds of its own CPU time, and again
    each second: Deferreds catch everything. 0: no limit."""

    def too_long(*_: object) -> None:
        raise Runaway(f"no end after {seconds} seconds of CPU time")

    before = signal.signal(signal.SIGVTALRM, too_long)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
