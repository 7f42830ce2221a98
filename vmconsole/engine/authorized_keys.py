"""Whose key is this?"""

from __future__ import annotations

from collections.abc import Sequence

from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from vmconsole.errors import EngineError
from vmconsole.interfaces import AuthorizedKey, IEngine, User
from vmconsole.publickeys import fingerprint
from vmconsole.text import printable

# Strangers' keys must not make us ask more often than this, in seconds.
_SHORTEST_INTERVAL = 1.0


class AuthorizedKeys:
    """The engine's keys, indexed by blob, asked for again when older than ``cache_ttl`` seconds.

    A key that belongs to two users is refused for both: nobody could tell who logs in.
    """

    _log = Logger()

    def __init__(self, engine: IEngine, clock: IReactorTime, cache_ttl: float = 5.0) -> None:
        self._engine = engine
        self._clock = clock
        self._cache_ttl = cache_ttl
        self._keys: Sequence[AuthorizedKey] = ()
        self._index: dict[bytes, User | None] = {}
        self._indexed: float | None = None
        self._failed: tuple[float, EngineError] | None = None
        self._ambiguous: frozenset[bytes] = frozenset()

    async def lookup(self, blob: bytes) -> User | None:
        """The one user with this key, in RFC 4253's format; None: nobody. Raises EngineError."""
        good_for = self._cache_ttl if blob in self._index else _SHORTEST_INTERVAL
        if not self._is_younger(self._indexed, good_for):
            await self._refresh()
        return self._index.get(blob)

    async def _refresh(self) -> None:
        if self._failed and self._is_younger(self._failed[0], _SHORTEST_INTERVAL):
            raise self._failed[1]
        asked = self._clock.seconds()
        try:
            keys = await self._engine.authorized_keys()
        except EngineError as error:
            self._failed = (self._clock.seconds(), error)
            raise
        self._indexed = asked
        # All who waited for the same answer get the same object.
        if keys is not self._keys:
            self._keys = keys
            self._index_keys(keys)

    def _is_younger(self, moment: float | None, seconds: float) -> bool:
        # A clock that was set back must not make an answer last.
        return moment is not None and 0 <= self._clock.seconds() - moment < seconds

    def _index_keys(self, keys: Sequence[AuthorizedKey]) -> None:
        index: dict[bytes, User | None] = {}
        names: dict[bytes, set[str]] = {}
        for key in keys:
            known = index.setdefault(key.blob, User(key.user_id, key.user_name))
            if known is None or known.id != key.user_id:
                names.setdefault(key.blob, {known.name} if known else set()).add(key.user_name)
                index[key.blob] = None
        for blob in names.keys() - self._ambiguous:
            self._log.warn(
                "The key {fingerprint} belongs to several users and is refused for all of them: "
                "{users}",
                fingerprint=fingerprint(blob),
                users=", ".join(printable(name) for name in sorted(names[blob])),
            )
        self._index, self._ambiguous = index, frozenset(names)
