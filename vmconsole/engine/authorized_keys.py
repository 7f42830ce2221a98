"""Whose key is this?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from vmconsole.engine.last_answer import Answer, LastAnswer, Lifetimes, Outage
from vmconsole.engine.slices import in_slices
from vmconsole.errors import EngineUnreachable, KeyRefused
from vmconsole.interfaces import AuthorizedKey, IEngine, KeyOwner, User
from vmconsole.keyoptions import NO_OPTIONS, KeyOptions
from vmconsole.publickeys import fingerprint
from vmconsole.text import ago, printable

# Strangers' keys must not make us ask more often than this, in seconds.
_SHORTEST_INTERVAL = 1.0
# A user's lines with the same key and different options: each is looked at, at each login.
_MAX_LINES = 16
# Of users who share a key, how many are named; and how many such keys are logged.
_MAX_NAMES = 10
_MAX_LOGGED = 100


class Index:
    """Users by their keys' blobs; of the keys no objects are made. ``digest`` is the answer's.

    A key that belongs to two users is refused for both: nobody could tell who logs in.
    """

    def __init__(self, digest: bytes) -> None:
        self.digest = digest
        self.users: dict[bytes, User | None] = {}
        """None: the key belongs to several users."""
        self.sharers: dict[bytes, set[str]] = {}
        """The names of those users, or of some of them."""
        self.overfull: set[bytes] = set()
        """Keys that stand in more lines with options than count."""
        self._options: dict[bytes, list[KeyOptions]] = {}

    def add(self, keys: Iterable[AuthorizedKey | None]) -> Iterator[None]:
        """Add ``keys``, one at each step."""
        users: dict[str, User] = {}
        for key in keys:
            if key is not None:
                user = users.setdefault(key.user_id, User(key.user_id, key.user_name))
                self._add(key, user)
            yield

    def _add(self, key: AuthorizedKey, user: User) -> None:
        if key.blob not in self.users:
            self.users[key.blob] = user
            if key.options != NO_OPTIONS:
                self._options[key.blob] = [key.options]
        elif self.users[key.blob] is not user:
            known = self.users[key.blob]
            names = self.sharers.setdefault(key.blob, {known.name} if known else set())
            if len(names) < _MAX_NAMES:
                names.add(user.name)
            self.users[key.blob] = None
        elif key.blob in self._options:
            lines = self._options[key.blob]
            if len(lines) < _MAX_LINES:
                lines.append(key.options)
            else:
                self.overfull.add(key.blob)

    def empty(self) -> Iterator[None]:
        """Take all out again, one at each step: to free many small objects takes its time, too."""
        while self.users:
            self.users.popitem()
            yield

    def owner(self, blob: bytes, address: str, now: float) -> KeyOwner | None:
        """Who may log in with this key, from ``address``, at ``now``. Raises KeyRefused.

        A user's key may stand in several lines: one that lets it in is enough.
        """
        user = self.users.get(blob)
        if user is None:
            return None
        lines = self._options.get(blob, [NO_OPTIONS])
        refusals = [line.refusal(address, now) for line in lines]
        letting_in = [line for line, refusal in zip(lines, refusals, strict=True) if not refusal]
        if not letting_in:
            raise KeyRefused(refusals[0])
        return KeyOwner(user, all(line.verify_required for line in letting_in))


class AuthorizedKeys:
    """The engine's keys, indexed. Asked for again when older than ``cache_ttl``."""

    _log = Logger()

    def __init__(
        self, engine: IEngine, clock: IReactorTime, lifetimes: Lifetimes, outage: Outage
    ) -> None:
        self._engine = engine
        self._clock = clock
        self._outage = outage
        self._last = LastAnswer(self._ask, clock, lifetimes, outage)

    async def owner(self, blob: bytes, address: str) -> KeyOwner | None:
        """See IPermissions."""
        answer = await self._answer_for(blob)
        now = self._clock.seconds()
        owner = answer.value.owner(blob, address, now)
        if answer.answered is None:
            return owner
        if owner is None:
            raise EngineUnreachable(
                "The engine does not answer, and its last answer, from "
                f"{ago(now - answer.answered)}, names no one user with this key."
            )
        return KeyOwner(owner.user, owner.verify_required, answer.answered)

    async def fresh(self) -> Index:
        """What the engine just said. Raises EngineError."""
        return await self._last.fresh()

    async def user_ids(self) -> Sequence[str]:
        """See IPermissions."""
        users = list((await self.fresh()).users.values())
        found: dict[str, None] = {}
        steps = (found.setdefault(user.id) for user in users if user is not None)
        await in_slices(steps, self._clock)
        return list(found)

    async def _answer_for(self, blob: bytes) -> Answer[Index]:
        index = self._last.value
        if index is not None and blob in index.users:
            return await self._last.get(ahead=True)
        # In an outage nobody knows whether it is a new one, however young the last answer is.
        return await self._last.get(0.0 if self._outage.known else _SHORTEST_INTERVAL)

    async def _ask(self, last: Index | None) -> Index:
        keys = await self._engine.authorized_keys()
        if last is not None and last.digest == keys.digest:
            return last
        index = Index(keys.digest)
        await in_slices(index.add(keys.keys), self._clock)
        await in_slices(self._log_unusable(index, last), self._clock)
        if last is not None:
            # Later: until this returns it is still the one that answers.
            self._clock.callLater(0, self._drop, last)
        return index

    def _log_unusable(self, index: Index, last: Index | None) -> Iterator[None]:
        shared = index.sharers.keys() - (last.sharers.keys() if last else ())
        for blob in islice(shared, _MAX_LOGGED):
            self._log.warn(
                "The key {fingerprint} belongs to several users and is refused for all of them: "
                "{users}",
                fingerprint=fingerprint(blob),
                users=", ".join(printable(name) for name in sorted(index.sharers[blob])),
            )
            yield
        if len(shared) > _MAX_LOGGED:
            self._log.warn("So are {count} more keys", count=len(shared) - _MAX_LOGGED)
        for blob in islice(index.overfull - (last.overfull if last else set()), _MAX_LOGGED):
            self._log.warn(
                "The key {fingerprint} stands in more than {count} lines with options: the others "
                "do not count",
                fingerprint=fingerprint(blob),
                count=_MAX_LINES,
            )
            yield

    def _drop(self, index: Index) -> None:
        Deferred.fromCoroutine(in_slices(index.empty(), self._clock))
