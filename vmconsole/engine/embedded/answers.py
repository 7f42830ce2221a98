"""The two answers of the embedded engine, as JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
from twisted.internet.defer import Deferred

from vmconsole.engine.embedded.inventory import Inventory, matches
from vmconsole.engine.embedded.store import GrantRecord, KeyRecord, Snapshot, Store
from vmconsole.engine.keyline import KeyLine
from vmconsole.errors import VMConsoleError
from vmconsole.interfaces import Domain

# The part of an oVirt user's name after the @, which other proxies expect.
_DOMAIN = "internal"


class UnknownUser(VMConsoleError):
    """Nobody has this id."""


class _Book(msgspec.Struct, frozen=True):
    """A snapshot, with the answer that is made once for each."""

    snapshot: Snapshot
    key_list: bytes


class Answers:
    """Made of the store, as it is at each question, and of the inventory.

    ``in_thread`` runs a function in a thread; what it is given waits for the database.
    """

    def __init__(
        self,
        store: Store,
        inventory: Inventory,
        in_thread: Callable[[Callable[[], _Book]], Deferred[_Book]],
    ) -> None:
        self._store = store
        self._inventory = inventory
        self._in_thread = in_thread
        self._book: _Book | None = None

    async def snapshot(self) -> Snapshot:
        """What the store holds now. Raises StoreError."""
        return (await self._current()).snapshot

    async def key_list(self) -> bytes:
        """The reply to ``public_keys``. Raises StoreError."""
        return (await self._current()).key_list

    async def console_list(self, user_id: str) -> bytes:
        """The reply to ``available_consoles``. Raises UnknownUser, StoreError."""
        snapshot = await self.snapshot()
        if user_id not in snapshot.user_ids:
            raise UnknownUser("There is no user with this id.")
        mine = snapshot.grants.get(user_id, ())
        consoles = [
            {
                "vmid": placement.domain.id,
                "vmname": placement.domain.name,
                "host": placement.host,
                "console": "default",
            }
            for placement in self._inventory.placements()
            if _may_operate(mine, placement.domain)
        ]
        return console_list(consoles)

    async def _current(self) -> _Book:
        known = self._book
        book = await self._in_thread(lambda: self._read(known))
        # Two questions may overtake each other.
        if self._book is None or book.snapshot.revision > self._book.snapshot.revision:
            self._book = book
        return book

    def _read(self, known: _Book | None) -> _Book:
        snapshot = self._store.snapshot(known.snapshot if known else None)
        if known is not None and snapshot is known.snapshot:
            return known
        return _Book(snapshot, _key_list(snapshot.keys))


def console_list(consoles: Sequence[dict[str, str]]) -> bytes:
    """The reply with these consoles."""
    return msgspec.json.encode({"version": "1", "content": "console_list", "consoles": consoles})


def _key_list(keys: Sequence[KeyRecord]) -> bytes:
    entries = [
        {
            "entityid": key.user_id,
            "entity": f"{key.user}@{_DOMAIN}",
            "key": str(KeyLine(key.type, key.blob, key.comment)),
        }
        for key in keys
    ]
    return msgspec.json.encode({"version": "1", "content": "key_list", "keys": entries})


def _may_operate(grants: Sequence[GrantRecord], domain: Domain) -> bool:
    # Who may only watch gets nothing here: a client that knows no roles would let them type.
    return any(grant.role == "operator" and matches(grant.pattern, domain) for grant in grants)
