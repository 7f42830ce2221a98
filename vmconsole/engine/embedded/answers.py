"""The two answers of the embedded engine, as JSON: made once for each change, and kept."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec
from twisted.internet.defer import DeferredLock
from twisted.internet.interfaces import IReactorTime

from vmconsole.engine.embedded.console_index import ConsoleIndex
from vmconsole.engine.embedded.inventory import Inventory
from vmconsole.engine.embedded.records import Access, KeyRecord, UserRecord
from vmconsole.engine.embedded.store import Store
from vmconsole.engine.keyline import KeyLine
from vmconsole.engine.slices import in_slices
from vmconsole.errors import VMConsoleError
from vmconsole.interfaces import Role
from vmconsole.threads import InThread

# The part of an oVirt user's name after the @, which other proxies expect.
DOMAIN = "internal"
_SIMPLE_TYPE = re.compile("[A-Za-z0-9-]+")
# Bytes of console lists that are kept.
_KEPT = 64 * 1024 * 1024


class UnknownUser(VMConsoleError):
    """Nobody has this id."""


class Features(NamedTuple):
    """What a client understands beyond the protocol; see docs/engine-protocol.md."""

    role: bool = False
    key_options: bool = False
    console_problem: bool = False
    keyless_users: bool = False

    @classmethod
    def parse(cls, text: str) -> Features:
        """Of the names in ``text``, separated by commas, those that are known."""
        names = {name.strip() for name in text.split(",")}
        return cls(*(name in names for name in cls._fields))


Reply = Sequence[bytes]
"""The body of an answer, in pieces."""


class _Keys(NamedTuple):
    revision: int
    replies: Mapping[tuple[bool, bool], Reply]
    """By the features ``key_options`` and ``keyless_users``."""


class _Consoles(NamedTuple):
    access: Access
    version: int
    reply: Reply


class Answers:
    """Made of the store, as it is at each question, and of the inventory.

    ``in_thread`` runs a function in a thread; what it is given waits for the database. Long
    answers are made there, or a millisecond at a time.
    """

    def __init__(
        self, store: Store, inventory: Inventory, in_thread: InThread, clock: IReactorTime
    ) -> None:
        self._store = store
        self._index = ConsoleIndex(inventory)
        self._in_thread = in_thread
        self._clock = clock
        self._keys: _Keys | None = None
        self._one_reader = DeferredLock()
        self._one_maker = DeferredLock()
        # What was used last stands last.
        self._consoles: dict[tuple[str, Features], _Consoles] = {}
        self._kept = 0

    async def key_list(self, features: Features) -> Reply:
        """The reply to ``public_keys``. Raises StoreError.

        To a client that does not know of options, and of keys in hardware, keys with options and
        of such types are not there: it would let them in from anywhere, or refuse everybody. Users
        without a key are there for one that knows of them.
        """
        # After one another: who comes while a new list is made gets that one.
        keys = await self._one_reader.run(self._current_keys)
        return keys.replies[features.key_options, features.keyless_users]

    async def console_list(self, user_id: str, features: Features) -> Reply:
        """The reply to ``available_consoles``. Raises UnknownUser, StoreError.

        To a client that does not know of roles, VMs that the user may only watch are not there.
        """
        kept = self._consoles.get((user_id, features))
        known = kept.access if kept else None
        access = await self._in_thread(lambda: self._store.access(user_id, known))
        if access is None:
            self._drop((user_id, features))
            raise UnknownUser("There is no user with this id.")
        reply = self._find((user_id, features), access)
        if reply is not None:
            return reply
        # After one another: each takes a millisecond of every turn of the reactor.
        return await self._one_maker.run(self._find_or_make, (user_id, features), access)

    async def _find_or_make(self, key: tuple[str, Features], access: Access) -> Reply:
        reply = self._find(key, access)
        if reply is None:
            version = self._index.version
            reply = await self._make_console_list(access, key[1])
            self._keep(key, _Consoles(access, version, reply))
        return reply

    def _find(self, key: tuple[str, Features], access: Access) -> Reply | None:
        """The reply that is kept, if it still is the right one."""
        kept = self._consoles.get(key)
        if kept is None or kept.version != self._index.version or kept.access.rules != access.rules:
            return None
        if access.revision >= kept.access.revision:
            kept = _Consoles(access, kept.version, kept.reply)
        self._keep(key, kept)
        return kept.reply

    async def _current_keys(self) -> _Keys:
        known = self._keys
        keys = self._keys = await self._in_thread(lambda: self._read_keys(known))
        return keys

    def _read_keys(self, known: _Keys | None) -> _Keys:
        """In a thread."""
        full: list[bytes] = []
        plain: list[bytes] = []
        keyless: list[bytes] = []

        def take_users(users: Sequence[UserRecord]) -> None:
            keyless.append(_encode([_entry(user.id, user.name, "") for user in users]))

        def take(keys: Sequence[KeyRecord]) -> None:
            everything = _encode([_key_entry(key) for key in keys])
            simple = [_key_entry(key) for key in keys if _is_simple(key)]
            full.append(everything)
            # Mostly the same, and then the same bytes.
            plain.append(everything if len(simple) == len(keys) else _encode(simple))

        revision = self._store.read_keys(known.revision if known else None, take, take_users)
        if known is not None and revision == known.revision:
            return known
        replies = {
            (key_options, keyless_users): _reply(
                "key_list",
                "keys",
                [*(full if key_options else plain), *(keyless if keyless_users else ())],
            )
            for key_options in (False, True)
            for keyless_users in (False, True)
        }
        return _Keys(revision, replies)

    async def _make_console_list(self, access: Access, features: Features) -> Reply:
        roles: dict[str, Role] = {}
        await in_slices(self._index.roles(access.rules, roles), self._clock)
        parts: list[bytes] = []
        steps = self._index.entries(
            roles, parts, viewers=features.role, problems=features.console_problem
        )
        await in_slices(steps, self._clock)
        return console_list(parts)

    def _keep(self, key: tuple[str, Features], consoles: _Consoles) -> None:
        self._drop(key)
        self._consoles[key] = consoles
        self._kept += _size(consoles.reply)
        while self._kept > _KEPT:
            self._drop(next(iter(self._consoles)))

    def _drop(self, key: tuple[str, Features]) -> None:
        before = self._consoles.pop(key, None)
        if before is not None:
            self._kept -= _size(before.reply)


def console_list(parts: Sequence[bytes]) -> Reply:
    """The reply with the consoles in ``parts``, each of which has some, or none."""
    return _reply("console_list", "consoles", parts)


def _reply(content: str, name: str, parts: Sequence[bytes]) -> Reply:
    """A reply with one list, of which each part has some entries, or none."""
    pieces = [b'{"version":"1","content":"%b","%b":[' % (content.encode(), name.encode())]
    for part in filter(None, parts):
        if len(pieces) > 1:
            pieces.append(b",")
        pieces.append(part)
    pieces.append(b"]}")
    return tuple(pieces)


def _size(reply: Reply) -> int:
    # With what Python needs to keep it.
    return sum(map(len, reply)) + 1024


def _is_simple(key: KeyRecord) -> bool:
    # Some clients refuse a whole list for a type with another character than these.
    return not key.options and _SIMPLE_TYPE.fullmatch(key.type) is not None


def _encode(entries: Sequence[Mapping[str, str]]) -> bytes:
    return msgspec.json.encode(entries)[1:-1]


def _entry(user_id: str, user: str, key: str) -> dict[str, str]:
    return {"entityid": user_id, "entity": f"{user}@{DOMAIN}", "key": key}


def _key_entry(key: KeyRecord) -> dict[str, str]:
    line = str(KeyLine(key.type, key.blob, key.comment))
    entry = _entry(key.user_id, key.user, line)
    return {**entry, "options": key.options} if key.options else entry
