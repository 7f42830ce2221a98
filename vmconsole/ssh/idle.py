"""Sessions whose users have gone for lunch."""

from __future__ import annotations

from collections.abc import Callable

from twisted.internet.interfaces import IReactorTime

from vmconsole.text import lasting

# Seconds from the warning to the end; of a short period, a tenth.
_NOTICE = 60.0
_NOTICE_SHARE = 0.1
# A timer may fire a rounding error early.
_ROUNDING = 0.001


class IdleTimer:
    """Warns, and then ends, once nothing was typed for ``limit`` seconds.

    ``warn`` and ``end`` get a sentence for the user. A key costs no timer.
    """

    def __init__(
        self,
        clock: IReactorTime,
        limit: float,
        warn: Callable[[str], None],
        end: Callable[[str], None],
    ) -> None:
        self._clock = clock
        self._limit = limit
        self._notice = min(_NOTICE, limit * _NOTICE_SHARE)
        self._warn = warn
        self._end = end
        self._typed_at = clock.seconds()
        self._timer = clock.callLater(limit - self._notice, self._look)

    def typed(self) -> None:
        """The user is there."""
        self._typed_at = self._clock.seconds()

    def stop(self) -> None:
        """The session is over."""
        if self._timer.active():
            self._timer.cancel()

    def _look(self) -> None:
        idle = self._clock.seconds() - self._typed_at
        left = self._limit - idle
        if left <= _ROUNDING:
            self._end(f"You typed nothing for {lasting(self._limit)}.")
            return
        if left > self._notice + _ROUNDING:
            self._timer = self._clock.callLater(left - self._notice, self._look)
            return
        self._timer = self._clock.callLater(left, self._look)
        self._warn(
            f"You typed nothing for {lasting(round(idle))}: this session ends in "
            f"{lasting(max(1, round(left)))}, unless you press a key."
        )
