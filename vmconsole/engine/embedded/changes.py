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
# Stands before the first change: ids begin with 1.
_NONE = ChangeRecord(0, 0, "", "", "")


class _News(NamedTuple):
    revisions: Revisions
    hosts: Sequence[HostRecord] | None
    last: ChangeRecord
    """After which ``changes`` were made."""
    changes: Sequence[ChangeRecord] = ()
    set_back: bool = False


class ChangeWatch:
    """Looks when it is told to. What was changed before the first look is in no log."""

    _log = Logger()

    def __init__(self, store: Store, hosts: HostWatch, audit: Audit, in_thread: InThread) -> None:
        self._store = store
        self._hosts = hosts
        self._audit = audit
        self._in_thread = in_thread
        self._seen: Revisions | None = None
        self._last_change: ChangeRecord | None = None
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
        if news.set_back:
            self._log.warn(
                "The embedded engine's database was set back: what was changed in it before this "
                "moment may be in no log. See `vmconsole changes`."
            )
        self._last_change = news.last
        if news.hosts is not None:
            self._hosts.follow({host.name: host.uri for host in news.hosts})
        for change in news.changes:
            self._audit.changed(change.actor, change.action, change.subject)
            self._last_change = change
        # Last: what failed is taken again.
        self._seen = news.revisions

    def _read(self) -> _News:
        """In a thread."""
        seen, last = self._seen, self._last_change
        revisions = self._store.revisions()
        if last is None:
            return _News(revisions, self._store.hosts(), self._newest())
        if revisions == seen and self._hosts.follows:
            return _News(revisions, None, last)
        # With the last one again: it shows whether this is still the database that it was in.
        again = 0 if last is _NONE else 1
        changes = self._store.changes_after(last.id - again, _AT_A_TIME + again)
        if again and last not in changes[:1]:
            # Its revisions, too, may be those of other contents.
            return _News(revisions, self._store.hosts(), self._newest(), set_back=True)
        del changes[:again]
        if len(changes) == _AT_A_TIME:
            # There may be more: for the next look.
            revisions = msgspec.structs.replace(revisions, all=-1)
        same_hosts = seen is not None and seen.hosts == revisions.hosts and self._hosts.follows
        return _News(revisions, None if same_hosts else self._store.hosts(), last, changes)

    def _newest(self) -> ChangeRecord:
        return next(iter(self._store.last_changes(1)), _NONE)
