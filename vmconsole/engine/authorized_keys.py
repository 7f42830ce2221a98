"""Whose key is this, and who is called so?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from vmconsole.clocks import posix_now
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
    """Users by their keys' blobs and by name; of the keys no objects are made.

    ``digest`` is the answer's. A key, or a name, that belongs to two users is refused for both:
    nobody could tell who logs in.
    """

    def __init__(self, digest: bytes) -> None:
        self.digest = digest
        self.users: dict[bytes, User | None] = {}
        """None: the key belongs to several users."""
        self.sharers: dict[bytes, set[str]] = {}
        """The names of those users, or of some of them."""
        self.overfull: set[bytes] = set()
        """Keys that stand in more lines with options than count."""
        self.names: dict[str, User | None] = {}
        """None: several users have the name."""
        self.keyless: list[User] = []
        """Users without a key, as far as the engine tells of them."""
        self._options: dict[bytes, list[KeyOptions]] = {}

    def add(self, keys: Iterable[AuthorizedKey | User | None]) -> Iterator[None]:
        """Add ``keys``, one at each step."""
        users: dict[str, User] = {}
        for entry in keys:
            if isinstance(entry, User):
                if entry.id not in users:
                    self.keyless.append(entry)
                self._add_user(users, entry)
            elif entry is not None:
                self._add(entry, self._add_user(users, User(entry.user_id, entry.user_name)))
            yield

    def _add_user(self, users: dict[str, User], user: User) -> User:
        known = users.setdefault(user.id, user)
        if known is user and self.names.setdefault(user.name, user) is not user:
            self.names[user.name] = None
        return known

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
        for part in (self.users, self.names):
            while part:
                part.popitem()
                yield
        while self.keyless:
            self.keyless.pop()
            yield

    def user_named(self, names: Sequence[str]) -> User | None:
        """See IPermissions."""
        known = [name for name in names if name in self.names]
        for name in known:
            user = self.names[name]
            if user is not None:
                return user
        if known:
            raise KeyRefused(f"several users are called {printable(known[0], 100)}")
        return None

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
        answer = await self._answer(lambda index: blob in index.users)
        owner = answer.value.owner(blob, address, posix_now(self._clock))
        if answer.answered is None:
            return owner
        if owner is None:
            raise self._not_in_old(answer.answered, "with this key")
        return KeyOwner(owner.user, owner.verify_required, answer.answered)

    async def user_named(self, names: Sequence[str]) -> KeyOwner | None:
        """See IPermissions."""
        answer = await self._answer(lambda index: any(name in index.names for name in names))
        user = answer.value.user_named(names)
        if user is not None:
            return KeyOwner(user, answered=answer.answered)
        if answer.answered is not None:
            raise self._not_in_old(answer.answered, "of this name")
        return None

    async def fresh(self) -> Index:
        """What the engine just said. Raises EngineError."""
        return await self._last.fresh()

    async def user_ids(self) -> Sequence[str]:
        """See IPermissions."""
        index = await self.fresh()
        users = [*index.users.values(), *index.keyless]
        found: dict[str, None] = {}
        steps = (found.setdefault(user.id) for user in users if user is not None)
        await in_slices(steps, self._clock)
        return list(found)

    async def _answer(self, knows: Callable[[Index], bool]) -> Answer[Index]:
        index = self._last.value
        if index is not None and knows(index):
            return await self._last.get(ahead=True)
        # In an outage nobody knows whether it is a new one, however young the last answer is.
        return await self._last.get(0.0 if self._outage.known else _SHORTEST_INTERVAL)

    def _not_in_old(self, answered: float, who: str) -> EngineUnreachable:
        age = ago(self._clock.seconds() - answered)
        return EngineUnreachable(
            f"The engine does not answer, and its last answer, from {age}, names no one user {who}."
        )

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
