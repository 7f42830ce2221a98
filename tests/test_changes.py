"""What the embedded engine notices of changes in its store."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import cast

from twisted.logger import ILogObserver, LogEvent, Logger

from tests.engine_kit import EngineTestCase, at_once
from tests.test_inventory import RecordingSource
from vmconsole.audit import Audit
from vmconsole.engine.embedded import changes
from vmconsole.engine.embedded.changes import ChangeWatch
from vmconsole.engine.embedded.inventory import Inventory
from vmconsole.engine.embedded.records import Revisions
from vmconsole.engine.embedded.store import Store
from vmconsole.engine.embedded.watch import HostWatch
from vmconsole.errors import StoreUnavailable


class ChangeWatchTests(EngineTestCase):
    """``ChangeWatch`` on a real store."""

    def setUp(self) -> None:
        super().setUp()
        self.file = Path(self.mktemp()) / "engine.db"
        self.store = Store(f"sqlite:///{self.file}", self.clock.seconds, actor="root\n")
        self.store.open()
        self.addCleanup(self.store.close)
        self.store.add_user("before")
        self.source = RecordingSource()
        self.hosts = HostWatch(self.source, Inventory())
        self.hosts.start()
        self.audited: list[LogEvent] = []
        observer = cast(ILogObserver, self.audited.append)
        audit = Audit(Logger("vmconsole.audit", observer=observer))
        self.watch = ChangeWatch(self.store, self.hosts, audit, at_once)

    def look(self) -> list[str]:
        """The subjects of the changes that one more look noticed."""
        self.audited.clear()
        self.result(self.watch.look())
        return [event["subject"] for event in self.audited]

    def test_audit(self) -> None:
        """What was changed after the first look is an event of the audit, once, in its order."""
        self.assertEqual(self.look(), [])
        self.store.add_user("alice")
        self.store.grant("alice", "*", "viewer")
        self.assertEqual(self.look(), ["alice", "alice * viewer"])
        event = self.audited[-1]
        self.assertEqual((event["actor"], event["action"]), ("root\\\\n", "grant"))
        self.assertEqual(event["event"], "changed")
        self.assertEqual(self.look(), [])

    def test_many(self) -> None:
        """More changes than one look takes are for the next ones; none is left out."""
        self.patch(changes, "_AT_A_TIME", 3)
        self.look()
        names = [f"u{number}" for number in range(7)]
        for name in names:
            self.store.add_user(name)
        self.assertEqual([self.look(), self.look(), self.look()], [names[:3], names[3:6], ["u6"]])
        self.assertEqual(self.look(), [])

    def test_hosts(self) -> None:
        """Hosts are watched from the first look on, and anew when they were changed alone."""
        self.look()
        self.assertEqual(self.source.told, [("watch", "localhost", "qemu:///system")])
        self.store.add_user("alice")
        self.look()
        self.assertEqual(len(self.source.told), 1)
        self.store.add_host("node1")
        self.look()
        self.assertEqual(self.source.told[1:], [("unwatch", "localhost"), ("watch", "node1", "")])

    def fail(self, error: Exception) -> None:  # type: ignore[override]
        def revisions() -> Revisions:
            raise error

        self.patch(self.store, "revisions", revisions)

    def test_database_away(self) -> None:
        """A database that fails is told of once, and what was changed meanwhile is not lost."""
        self.look()
        working = self.store.revisions
        self.fail(StoreUnavailable("The database is gone."))
        for _ in range(3):
            self.assertEqual(self.look(), [])
        self.assertEqual(self.logged("gone"), ["The embedded engine: The database is gone."])
        self.store.add_user("alice")
        self.store.revisions = working  # type: ignore[method-assign]
        self.assertEqual(self.look(), ["alice"])
        self.assertEqual(len(self.logged("works again")), 1)

    def test_mistake_of_ours(self) -> None:
        """A mistake of ours is logged once, with its traceback, and ends nothing."""
        working = self.store.revisions
        self.fail(ZeroDivisionError("oops"))
        for _ in range(3):
            self.look()
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        self.store.revisions = working  # type: ignore[method-assign]
        self.look()
        self.assertEqual(len(self.source.told), 1)

    def test_hosts_fail(self) -> None:
        """Hosts that could not be followed are followed at the next look."""
        follow = self.hosts.follow

        def fail(_: object) -> None:
            raise ZeroDivisionError("oops")

        self.patch(self.hosts, "follow", fail)
        self.look()
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        self.patch(self.hosts, "follow", follow)
        self.look()
        self.assertEqual(len(self.source.told), 1)

    def test_hosts_again(self) -> None:
        """Stopped and started again, the hosts are watched though nothing was changed."""
        self.look()
        self.hosts.stop()
        self.look()
        self.source.told.clear()
        self.hosts.start()
        for _ in range(2):
            self.look()
        self.assertEqual(self.source.told, [("watch", "localhost", "qemu:///system")])

    def test_audit_fails(self) -> None:
        """A change of which the audit was not told is told at the next look."""
        self.look()
        self.store.add_user("alice")
        self.store.add_user("bob")
        audit, told = self.watch._audit, list[str]()

        class Failing(Audit):
            def changed(self, actor: str, action: str, subject: str) -> None:
                told.append(subject)
                if subject == "bob":
                    raise ZeroDivisionError("oops")

        self.watch._audit = Failing()
        self.look()
        self.assertEqual(told, ["alice", "bob"])
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        self.watch._audit = audit
        self.assertEqual(self.look(), ["bob"])
        self.assertEqual(self.look(), [])

    def save(self) -> None:
        """A backup of the database."""
        self.store.close()
        shutil.copy(self.file, self.file.with_name("backup"))
        self.store.open()

    def restore(self) -> None:
        """The database is as it was when it was saved."""
        self.store.close()
        for left in self.file.parent.glob("engine.db-*"):
            left.unlink()
        shutil.copy(self.file.with_name("backup"), self.file)
        self.store.open()

    def test_set_back(self) -> None:
        """A database that was set back is told of once; what is changed from then on is told."""
        self.look()
        self.store.add_user("alice")
        self.save()
        for name in ("bob", "carol"):
            self.store.add_user(name)
        self.assertEqual(self.look(), ["alice", "bob", "carol"])
        self.restore()
        self.assertEqual(self.look(), [])
        [warning] = self.logged("set back")
        self.assertIn("`vmconsole changes`", warning)
        self.store.add_user("dave")
        self.assertEqual(self.look(), ["dave"])
        self.assertEqual(self.look(), [])
        self.assertEqual(len(self.logged("set back")), 1)

    def test_set_back_and_grown(self) -> None:
        """So is one that has more changes by now than before: they are others."""
        self.look()
        self.save()
        self.store.add_user("alice")
        self.assertEqual(self.look(), ["alice"])
        self.restore()
        for name in ("bob", "carol", "dave"):
            self.store.add_user(name)
        self.assertEqual(self.look(), [])
        self.assertEqual(len(self.logged("set back")), 1)
        self.store.add_user("eve")
        self.assertEqual(self.look(), ["eve"])

    def test_set_back_to_nothing(self) -> None:
        """One without any change; and its hosts are read whatever its revisions are."""
        self.look()
        self.store.add_user("alice")
        self.look()
        with closing(sqlite3.connect(self.file)) as connection, connection:
            for line in (
                "DELETE FROM changes",
                "DELETE FROM sqlite_sequence WHERE name = 'changes'",
                "INSERT INTO hosts (name, uri) VALUES ('node1', '')",
                "UPDATE meta SET all_revision = all_revision - 1",
            ):
                connection.execute(line)
        self.assertEqual(self.look(), [])
        self.assertEqual(len(self.logged("set back")), 1)
        self.assertEqual(self.source.told[-1], ("watch", "node1", ""))
        self.store.add_user("bob")
        self.assertEqual(self.look(), ["bob"])
