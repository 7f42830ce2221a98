"""Notices what was changed in the store, by whomever: hosts are watched, changes are logged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec
from twisted.internet.defer import CancelledError
from twisted.logger import Logger

from vmconsole.audit import Audit
from vmconsole.engine.embedded.records import ChangeRecord, HostRecord, Revisions
from vmconsole.engine.embedded.store import Store
from vmconsole.engine.embedded.watch import HostWatch
from vmconsole.errors import EngineUnreachable, StoreError
from vmconsole.threads import InThread

# Changes that are logged after one look.
_AT_A_TIME = 1000


class _News(NamedTuple):
    revisions: Revisions
    hosts: Sequence[HostRecord] | None
    changes: Sequence[ChangeRecord]


class ChangeWatch:
    """Looks when it is told to. What was changed before the first look is in no log."""

    _log = Logger()

    def __init__(self, store: Store, hosts: HostWatch, audit: Audit, in_thread: InThread) -> None:
        self._store = store
        self._hosts = hosts
        self._audit = audit
        self._in_thread = in_thread
        self._seen: Revisions | None = None
        self._last_change: int | None = None
        self._trouble = ""

    async def look(self) -> None:
        """See what is new. What fails is told of once, and the next look goes on."""
        trouble = ""
        try:
            self._take(await self._in_thread(self._read))
        except (StoreError, EngineUnreachable) as error:
            trouble = str(error)
            if trouble != self._trouble:
                self._log.error("The embedded engine: {reason}", reason=trouble)
        except CancelledError:
            raise
        except Exception as error:
            trouble = repr(error)
            if trouble != self._trouble:
                self._log.failure("Looking at the embedded engine's database")
        if self._trouble and not trouble:
            self._log.info("The embedded engine's database works again")
        self._trouble = trouble

    def _take(self, news: _News) -> None:
        if news.hosts is not None:
            self._hosts.follow({host.name: host.uri for host in news.hosts})
        for change in news.changes:
            self._last_change = change.id
            self._audit.changed(change.actor, change.action, change.subject)
        # Last: what failed is taken again.
        self._seen = news.revisions

    def _read(self) -> _News:
        """In a thread."""
        seen = self._seen
        revisions = self._store.revisions()
        if revisions == seen:
            return _News(revisions, None, ())
        if self._last_change is None:
            self._last_change = max((each.id for each in self._store.last_changes(1)), default=0)
        changes = self._store.changes_after(self._last_change, _AT_A_TIME)
        if len(changes) == _AT_A_TIME:
            # There may be more: for the next look.
            revisions = msgspec.structs.replace(revisions, all=-1)
        same_hosts = seen is not None and seen.hosts == revisions.hosts
        return _News(revisions, None if same_hosts else self._store.hosts(), changes)
