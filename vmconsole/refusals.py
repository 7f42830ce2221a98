"""What was refused, in the log: anybody may cause that, so there is no line for each."""

from __future__ import annotations

from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger

# Seconds between two lines that tell of the same.
_PAUSE = 10.0
# What is told apart at a time. Who asks may choose among more: a salt may have any length.
_KINDS = 100


class Refusals:
    """Writes the first of a kind at once, then one line a pause, with how many it stands for."""

    def __init__(self, log: Logger, clock: IReactorTime) -> None:
        self._log = log
        self._clock = clock
        # Of each kind: when its last line was written, and how many came since. The latest line's
        # stands last.
        self._kinds: dict[str, tuple[float, int]] = {}

    def tell(self, what: str, reason: str) -> None:
        """Such a request was answered so: in one line with others like it."""
        now = self._clock.seconds()
        kind, more = f"{what}: {reason}", "{} more like it"
        if kind not in self._kinds and not self._make_room(now):
            kind, more = "", "{} more, for many reasons"
        written, held = self._kinds.get(kind, (None, 0))
        if written is not None and 0 <= now - written < _PAUSE:
            self._kinds[kind] = (written, held + 1)
            self._held_back()
            return
        self._kinds.pop(kind, None)
        self._kinds[kind] = (now, 0)
        if held:
            reason = f"{reason.removesuffix('.')}, and {more.format(held)}"
        self._log.warn("{what}: {reason}", what=what, reason=reason)

    def _held_back(self) -> None:
        """One was counted, without a line for it yet."""

    def _make_room(self, now: float) -> bool:
        """Whether one more can be told apart, if need be by forgetting one that is over."""
        if len(self._kinds) - ("" in self._kinds) < _KINDS:
            return True
        oldest = next(kind for kind in self._kinds if kind)
        if 0 <= now - self._kinds[oldest][0] < _PAUSE:
            return False
        del self._kinds[oldest]
        return True


class SummedRefusals(Refusals):
    """Tells within two pauses how many more there were, also when no other comes."""

    _timer: IDelayedCall | None = None

    def _held_back(self) -> None:
        if self._timer is None:
            self._timer = self._clock.callLater(_PAUSE, self._sum_up)

    def _sum_up(self) -> None:
        self._timer = None
        now = self._clock.seconds()
        over = [kind for kind, (written, _) in self._kinds.items() if now - written >= _PAUSE]
        for kind in over:
            _, held = self._kinds.pop(kind)
            if held:
                self._kinds[kind] = (now, 0)
                what = kind.removesuffix(".") or "For other reasons"
                self._log.warn("{what}: {held} more", what=what, held=held)
        if any(held for _, held in self._kinds.values()):
            self._held_back()
