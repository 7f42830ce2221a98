"""The account of logins that may come to an end, and of their sessions, by the documentation's
word: the README ("Certificates"), docs/security.md ("Limits") and etc/vmconsole.toml."""

from __future__ import annotations

from typing import Any, Generic, NamedTuple, TypeVar

from tests.fuzz.certify import Judged, Truth, Worth
from tests.fuzz.channels import DATA, EXTENDED, Wrong
from tests.fuzz.keyring import Reader
from tests.fuzz.ledger import Ledger

T = TypeVar("T")
PIECE = 0.5
"""Seconds in which time passes: so late a timer may be seen to be."""
FILES_SECONDS = 10.0
"""Files are looked at each five seconds, and taken when they were the same twice."""
ENGINE_SECONDS = 15.0
"""``engine.recheck``."""
# The time of day is looked at so often when it is set.
_SET_SECONDS = 60.0
_SLACK = 0.01
# Seconds from the warning to the end, at most; and as a part of the limit.
_NOTICE, _NOTICE_SHARE = 60.0, 0.1
_KEPT = 4096
_WARNING, _IDLE = b"unless you press a key", b"You typed nothing for"


class History(Generic[T]):
    """What is true, and what was until so lately that the server need not have seen it."""

    def __init__(self, value: T, window: float) -> None:
        self.value = value
        self._window = window
        self._past: list[T] = []
        self._changed = -window

    def change(self, value: T, now: float) -> None:
        """Something else is true."""
        self._past = [*self.may_be(now)]
        self.value, self._changed = value, now

    def hide(self, now: float) -> None:
        """Until the next change the server cannot see what is true."""
        if len(self.may_be(now)) > 1:
            self._changed = float("inf")

    def may_be(self, now: float) -> list[T]:
        """What the server may take for true."""
        if now > self._changed + self._window + PIECE:
            self._past.clear()
        return [self.value, *(each for each in self._past if each != self.value)]


class Known(NamedTuple):
    """Whom the engine knows."""

    keys: frozenset[bytes]
    users: frozenset[str]


class Login(NamedTuple):
    """By what somebody has logged in."""

    user: str
    key: bytes
    certificate: Judged | None

    def revoked(self, truth: Truth) -> str:
        """A word of the sentence that says why a login does not hold; empty: it does."""
        if self.certificate is None:
            return "key has been revoked" if self.key in truth.keys else ""
        read = self.certificate.read
        assert read is not None
        if read.authority not in truth.trusted:
            return "no longer trusted"
        return "certificate has been revoked" if truth.revokes(read) else ""

    def unknown(self, known: Known) -> str:
        """Likewise, by the engine."""
        there = self.user in known.users if self.certificate is not None else self.key in known.keys
        return "" if there else "no longer lets you in"


class TellingLedger(Ledger):
    """Keeps what each session of the client was told."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.told: dict[int, bytes] = {}
        """By the client's number, the last of it."""

    def received(self, number: int, payload: bytes) -> None:
        """See Ledger."""
        super().received(number, payload)
        if number in (DATA, EXTENDED) and self.logged_in:
            channel = int.from_bytes(payload[:4], "big")
            text = Reader(payload[4 if number == DATA else 8 :]).string()
            self.told[channel] = (self.told.get(channel, b"") + text)[-_KEPT:]


class Session:
    """A session that the client has open."""

    def __init__(self, number: int) -> None:
        self.number = number
        """The client's."""
        self.terminal = self.brief = False
        """It is on a terminal; what runs ends by itself."""
        self.typed = 0.0
        """When a key was last pressed, or the terminal came."""
        self.warned: float | None = None
        """When it was told that it would end."""

    def look(self, told: bytes, now: float, limit: float) -> None:
        """It goes on. Raises Wrong."""
        idle = now - self.typed
        if self.warned is None and _WARNING in told:
            self.warned = now
            if idle < limit - min(_NOTICE, limit * _NOTICE_SHARE) - _SLACK:
                raise Wrong("idle", f"a warning after {idle} of {limit} seconds")
        if limit and self.terminal and idle > limit + PIECE + _SLACK:
            raise Wrong("idle", f"a session goes on after {idle} of {limit} seconds")

    def ended(self, told: bytes, now: float, limit: float) -> None:
        """The server has ended it, and not the login. Raises Wrong."""
        idle = now - self.typed
        if self.brief:
            return
        if not (limit and self.terminal) or idle < limit - _SLACK or _IDLE not in told:
            raise Wrong("idle", f"a session ended after {idle} of {limit} seconds: {told!r}")
        if self.warned is None or now - self.warned < limit * _NOTICE_SHARE / 2:
            raise Wrong("idle", f"without a warning in time: {told!r}")


class Life:
    """One login, and its sessions."""

    def __init__(self, login: Login, ledger: TellingLedger) -> None:
        self.login, self.ledger = login, ledger
        self.sessions: dict[int, Session] = {}
        """By the client's numbers."""
        self.clock_set = False
        """The time of day was set meanwhile."""
        self._expired: float | None = None

    def look(
        self,
        over: bool,
        now: float,
        time_of_day: float,
        trust: list[Truth],
        engine: list[Known],
    ) -> None:
        """See whether it has ended (``over``) when it must, and only then. Raises Wrong."""
        expired = self._expired_since(now, time_of_day)
        revoked = [self.login.revoked(each) for each in trust]
        unknown = [self.login.unknown(each) for each in engine]
        reasons = {each for each in (*revoked, *unknown) if each}
        reasons |= {"expired"} if expired is not None else set()
        if over:
            self._look_at_words(reasons)
        elif all(revoked) or all(unknown):
            raise Wrong("stays", f"{self.login.user}, though {revoked} {unknown}")
        elif expired is not None and (not self.clock_set or now > expired + _SET_SECONDS + PIECE):
            raise Wrong("stays", f"{self.login.user}, by a certificate that has expired")

    def _expired_since(self, now: float, time_of_day: float) -> float | None:
        """Since when."""
        certificate = self.login.certificate
        if certificate is None or time_of_day < certificate.before:
            self._expired = None
        elif self._expired is None:
            self._expired = now
        return self._expired

    def _look_at_words(self, reasons: set[str]) -> None:
        words = self.ledger.words
        if not reasons:
            raise Wrong("put-out", f"{self.login.user}, for nothing: {words!r}")
        if not any(reason in words for reason in reasons) or not words.endswith("."):
            raise Wrong("words", f"{words!r}, and it is {reasons}")
        for number, session in self.sessions.items():
            told = self.ledger.told.get(number, b"")
            if words.encode() not in told and not session.brief:
                raise Wrong("words", f"a session is told {told!r}, and not {words!r}")

    def ended_sessions(self) -> list[Session]:
        """Those that the server has closed."""
        there = {
            channel.client_number
            for channel in self.ledger.channels.known.values()
            if not channel.closed_there
        }
        return [self.sessions.pop(number) for number in [*self.sessions] if number not in there]


def merged(judged: list[Judged]) -> Judged:
    """A certificate whose worth is not sure when not all of these are of one mind."""
    vouched, told = any(each.vouched for each in judged), all(each.told for each in judged)
    best = next((each for each in judged if each.worth is not Worth.BAD), judged[0])
    sure = all(each.worth is best.worth for each in judged)
    worth = best.worth if sure else Worth.LAX
    return best._replace(worth=worth, vouched=vouched, told=told)
