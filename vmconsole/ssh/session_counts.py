"""How many sessions a user may have, on one connection and on all of them."""

from __future__ import annotations

from collections import Counter

from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from vmconsole.interfaces import User
from vmconsole.refusals import SummedRefusals
from vmconsole.text import printable


class SessionCounts:
    """Counts each user's open session channels."""

    _log = Logger()

    def __init__(self, per_user: int, clock: IReactorTime) -> None:
        """``per_user``: so many on all connections; 0: no limit."""
        self._per_user = per_user
        self._open: Counter[str] = Counter()
        self._refusals = SummedRefusals(self._log, clock)

    @property
    def total(self) -> int:
        """The sessions that are open."""
        return self._open.total()

    def refusal(self, user: User, on_connection: int, per_connection: int) -> str | None:
        """Why ``user``, who has so many sessions of so many on this connection, may not have one
        more, in words for them; None: they may."""
        if on_connection >= per_connection:
            self._tell(user, on_connection, "on a connection (limits.sessions_per_connection)")
            return f"you have {on_connection} sessions open on this connection already"
        count = self._open[user.id]
        if 0 < self._per_user <= count:
            self._tell(user, count, "in all (limits.sessions_per_user)")
            return f"you have {count} sessions open already"
        return None

    def opened(self, user: User) -> None:
        """A session of theirs was opened."""
        self._open[user.id] += 1

    def closed(self, user: User) -> None:
        """One is gone."""
        self._open[user.id] -= 1
        if not self._open[user.id]:
            del self._open[user.id]

    def _tell(self, user: User, count: int, where: str) -> None:
        self._refusals.tell("Refused a session", f"{printable(user.name)} has {count} {where}")
