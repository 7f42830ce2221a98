"""Who may connect, and when: OpenSSH's MaxStartups, PerSourceMaxStartups and PerSourcePenalties
(sshd_config(5)), for a server that rather lets clients wait than refuses them."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum, auto
from itertools import takewhile

from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger

from vmconsole.config import Limits
from vmconsole.refusals import SummedRefusals
from vmconsole.ssh.sources import Source, Sources
from vmconsole.text import lasting

# Seconds without a login after which a connection may be dropped for another one: every program
# has logged in by then, and most people have.
_OLD = 2.0
# The share of the places that must be held by such old ones. With less, the others change hands
# quickly, and who waits in the kernel's backlog soon gets in.
_OLD_SHARE = 0.75
# The share of the places for clients that were refused and have not left yet. One address, refused
# as fast as it connects, would otherwise hold them all.
_REFUSED_SHARE = 1 / 8
# Seconds from one that is dropped to the next. A backlog of 50, Twisted's, passes in 5 s, which
# clients wait; and 10 handshakes a second are a thirtieth of a core.
_DROP_EVERY = 0.1
# Seconds that a connection has to wait for a token until the log tells of it.
_SLOWED_DOWN = 1.0


class State(Enum):
    """How far a connection has come."""

    ACCEPTED = auto()
    WAITING = auto()
    """For a token of its source."""
    SERVED = auto()
    LOGGED_IN = auto()
    REFUSED = auto()
    GONE = auto()


class Entry:
    """One connection's place."""

    __slots__ = (
        "_admission",
        "accepted_at",
        "admit",
        "dropped",
        "evict",
        "refuse",
        "source",
        "state",
    )

    admit: Callable[[], None]
    refuse: Callable[[str], None]

    def __init__(self, admission: Admission, now: float, evict: Callable[[str], None]) -> None:
        self._admission = admission
        self.accepted_at = now
        self.evict = evict
        self.dropped = False
        self.source: Source | None = None
        self.state = State.ACCEPTED

    def place(
        self, source: str | None, admit: Callable[[], None], refuse: Callable[[str], None]
    ) -> None:
        """The client's source is known (``addresses.source_of``); None is never slowed down nor
        banned. Calls ``admit``, or ``refuse`` with a sentence for the user: now or, while the
        source is slowed down, later."""
        if self.state is State.ACCEPTED:
            self.admit, self.refuse = admit, refuse
            self._admission.place(self, source)

    def logged_in(self) -> None:
        """The client proved who it is: it cost its source nothing."""
        if self.state is State.SERVED:
            self._admission.logged_in(self)

    def left(self, failed: bool = True) -> None:
        """The connection is gone. ``failed`` is False where it was our fault that there was no
        login: that leads to no ban."""
        if self.state is not State.GONE:
            self._admission.left(self, failed)


class Admission:
    """Decides about each connection, and pauses the ports when too many have not logged in.

    - Each source has a token bucket (``sources``). A connection takes a token when it is let in,
      and gives it back when it logs in; without one it waits. So what never logs in is slowed
      down to five a second, and any number of honest logins goes on, ten at a time.
    - Above ``limits.connections`` and ``limits.per_address`` connections are refused.
    - While ``limits.unauthenticated`` of them have no login, nothing is accepted: the kernel's
      backlog has those who wait. When nearly all of these places are held by connections without
      a login for more than two seconds, one of them, by chance, is dropped each tenth of a second.
    - ``limits.ban_after`` connections in a row without a login ban their source.
    """

    _log = Logger()

    def __init__(
        self,
        clock: IReactorTime,
        limits: Limits,
        random_below: Callable[[int], int],
        pause: Callable[[], None],
        resume: Callable[[], None],
    ) -> None:
        """``random_below(n)`` is one of 0 to n - 1; ``pause`` and ``resume`` are the ports'."""
        self._clock = clock
        self._limits = limits
        self._random_below = random_below
        self._pause = pause
        self._resume = resume
        self._refusals = SummedRefusals(self._log, clock)
        self._sources = Sources(limits.ban_seconds if limits.ban_after else 0.0)
        self._open = 0
        self._placed = 0
        self._waiting = 0
        self._refused = 0
        # In the order in which they were accepted. Who was refused is here until it is gone, so
        # that their sockets are bounded, too.
        self._unauthenticated: dict[Entry, None] = {}
        self._paused = False
        self._drop: IDelayedCall | None = None

    @property
    def total(self) -> int:
        """Connections that there are."""
        return self._open

    @property
    def unauthenticated(self) -> int:
        """Those that have not logged in, the waiting ones with them."""
        return len(self._unauthenticated)

    @property
    def waiting(self) -> int:
        """Those whose source is slowed down, and that are not served yet."""
        return self._waiting

    def accepted(self, evict: Callable[[str], None]) -> Entry:
        """A TCP connection was accepted. ``evict`` has to end it at once, also if the client does
        not take the sentence that it is given."""
        entry = Entry(self, self._clock.seconds(), evict)
        self._open += 1
        self._unauthenticated[entry] = None
        if not self._paused and len(self._unauthenticated) >= self._limits.unauthenticated:
            self._paused = True
            self._refusals.tell(
                "Accepting pauses",
                f"{self._limits.unauthenticated} connections have not logged in "
                "(limits.unauthenticated)",
            )
            self._pause()
            if self._drop is None:
                self._drop = self._clock.callLater(_DROP_EVERY, self._drop_one)
        return entry

    # --- what an Entry asks for

    def place(self, entry: Entry, name: str | None) -> None:
        """See Entry."""
        now = self._clock.seconds()
        source = self._sources.find(name, now) if name is not None else None
        reason = self._refusal(source, now)
        if reason is not None:
            if source is not None:
                self._sources.left(source, now)
            self._turn_away(entry, reason)
            return
        self._placed += 1
        entry.source = source
        if source is None:
            self._serve(entry)
            return
        source.connections += 1
        if not source.waiting and source.take(now):
            self._serve(entry)
        else:
            entry.state = State.WAITING
            self._waiting += 1
            source.waiting[entry] = None
            self._serve_later(source, now)

    def logged_in(self, entry: Entry) -> None:
        """See Entry."""
        entry.state = State.LOGGED_IN
        del self._unauthenticated[entry]
        source = entry.source
        if source is not None:
            now = self._clock.seconds()
            source.failures = 0
            source.give_back(now)
            self._serve_later(source, now)
        self._make_room()

    def left(self, entry: Entry, failed: bool) -> None:
        """See Entry."""
        state, entry.state = entry.state, State.GONE
        self._open -= 1
        self._unauthenticated.pop(entry, None)
        if state is State.REFUSED:
            self._refused -= 1
        if state is State.SERVED and failed and not entry.dropped and entry.source is not None:
            self._failed(entry.source)
        if state not in (State.ACCEPTED, State.REFUSED):
            # The last: a source without connections may be forgotten.
            self._unplace(entry)
        self._make_room()

    # ---

    def _refusal(self, source: Source | None, now: float) -> str | None:
        limits = self._limits
        if source is not None and now < source.banned_until:
            self._refuse_for(f"{source.name} is banned (limits.ban_after)")
            return _banned(source, now)
        if source is not None and source.connections >= limits.per_address:
            self._refuse_for(f"{source.name} has {limits.per_address} (limits.per_address)")
            return "too many connections from your address; try again later"
        if self._placed >= limits.connections:
            self._refuse_for(f"there are {limits.connections} (limits.connections)")
            return "too many connections; try again later"
        return None

    def _turn_away(self, entry: Entry, reason: str) -> None:
        entry.state = State.REFUSED
        self._refused += 1
        entry.refuse(reason)
        if self._refused > max(1, int(self._limits.unauthenticated * _REFUSED_SHARE)):
            # It may miss the sentence.
            entry.evict(reason)

    def _refuse_for(self, reason: str) -> None:
        self._refusals.tell("Refused a connection", reason)

    def _unplace(self, entry: Entry) -> None:
        self._placed -= 1
        source = entry.source
        if source is not None:
            self._wait_no_more(entry, source)
            source.connections -= 1
            self._sources.left(source, self._clock.seconds())

    def _wait_no_more(self, entry: Entry, source: Source) -> None:
        if entry in source.waiting:
            del source.waiting[entry]
            self._waiting -= 1
            if not source.waiting and source.timer is not None:
                source.timer.cancel()
                source.timer = None

    def _failed(self, source: Source) -> None:
        limits, now = self._limits, self._clock.seconds()
        if not limits.ban_after:
            return
        source.failures += 1
        source.failed_at = now
        if source.failures < limits.ban_after:
            return
        source.failures = 0
        source.banned_until = now + limits.ban_seconds
        self._refusals.tell(
            "Banned an address",
            f"{source.name}, for {lasting(limits.ban_seconds)}: {limits.ban_after} connections "
            "in a row ended without a login (limits.ban_after)",
        )
        for entry in list(source.waiting):
            self._unplace(entry)
            self._turn_away(entry, _banned(source, now))

    def _serve(self, entry: Entry) -> None:
        entry.state = State.SERVED
        entry.admit()

    def _serve_later(self, source: Source, now: float) -> None:
        if source.waiting:
            delay = source.next_token(now)
            if source.timer is None:
                source.timer = self._clock.callLater(delay, self._serve_next, source)
            else:
                source.timer.reset(delay)

    def _serve_next(self, source: Source) -> None:
        source.timer = None
        now = self._clock.seconds()
        if not source.take(now):
            self._serve_later(source, now)
            return
        entry = next(iter(source.waiting))
        self._wait_no_more(entry, source)
        self._serve_later(source, now)
        if now - entry.accepted_at >= _SLOWED_DOWN:
            self._refusals.tell(
                "Slowed down an address", f"{source.name}: its connections do not log in"
            )
        self._serve(entry)

    def _make_room(self) -> None:
        limit = self._limits.unauthenticated
        # Not at once with the first that goes: the ports need not be told for each connection.
        if self._paused and len(self._unauthenticated) <= limit - max(1, limit // 16):
            self._paused = False
            self._resume()

    def _drop_one(self) -> None:
        self._drop = None
        if not self._paused:
            return
        self._drop = self._clock.callLater(_DROP_EVERY, self._drop_one)
        before = self._clock.seconds() - _OLD
        by_age = takewhile(lambda entry: entry.accepted_at < before, self._unauthenticated)
        # A client that is being dropped may take a moment to be gone.
        old = [entry for entry in by_age if not entry.dropped]
        if len(old) >= self._limits.unauthenticated * _OLD_SHARE:
            self._refusals.tell(
                "Dropped a connection",
                "others could not get in for those that do not log in (limits.unauthenticated)",
            )
            chosen = old[self._random_below(len(old))]
            chosen.dropped = True
            chosen.evict("too many connections do not log in; try again later")


def _banned(source: Source, now: float) -> str:
    left = lasting(source.banned_until - now)
    return f"too many connections from your address ended without a login; try again in {left}"
