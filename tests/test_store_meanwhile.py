"""What others do to the embedded engine's database while a store has it open."""

from __future__ import annotations

import sqlite3
from contextlib import closing

from sqlalchemy import create_engine, text

from tests.engine_kit import NOW
from tests.store_kit import OnPostgres, StoreTestCase, ed25519_line
from vmconsole.engine.embedded.records import Access, KeyRecord, Rule
from vmconsole.engine.embedded.store import Store
from vmconsole.errors import StoreUnavailable


class UpgradedTests(StoreTestCase):
    """It is upgraded by a newer vmconsole."""

    def execute(self, statement: str) -> list[object]:
        engine = create_engine(self.url)
        with engine.begin() as connection:
            result = connection.execute(text(statement))
            rows = list(result) if result.returns_rows else []
        engine.dispose()
        return list(rows)

    def test_newer(self) -> None:
        """Then the store neither reads nor writes any more, and says what to do: it would leave out
        what it does not know."""
        self.store.add_user("alice")
        self.execute("UPDATE alembic_version SET version_num = '9999'")
        for use in (
            self.store.revisions,
            self.store.users,
            lambda: self.store.read_keys(None, self.fail),
            lambda: self.store.access("x"),
            lambda: self.store.add_user("bob"),
        ):
            with self.refused("upgraded to version 9999 meanwhile: restart"):
                use()
        self.execute("UPDATE alembic_version SET version_num = '0002'")
        self.assertEqual([user.name for user in self.store.users()], ["alice"])

    def test_former_version(self) -> None:
        """What the former version asked for first is there no more: it fails, too."""
        with self.assertRaises(Exception) as caught:
            self.execute("SELECT revision FROM meta")
        self.assertIn("revision", str(caught.exception))


class PostgresUpgradedTests(OnPostgres, UpgradedTests):
    """On PostgreSQL."""


class FileTests(StoreTestCase):
    """Its file is changed by other means than ours."""

    def test_replaced(self) -> None:
        """Another file in its place is not gone on with: what is written into one would not be
        read from the other."""
        self.store.add_user("alice")
        other = self.file.with_name("other.db")
        with closing(sqlite3.connect(self.file)) as source, closing(sqlite3.connect(other)) as copy:
            source.backup(copy)
        other.replace(self.file)
        for use in (self.store.users, lambda: self.store.add_user("bob")):
            with self.refused("was replaced by another file", "engine.db-wal"):
                use()
        self.store.close()
        self.assertEqual([user.name for user in self.another().users()], ["alice"])

    def test_gone(self) -> None:
        """A file that is gone is no empty database."""
        away = self.file.with_name("away.db")
        self.file.rename(away)
        for use in (self.store.users, lambda: self.store.add_user("bob")):
            with self.refused("is gone", kind=StoreUnavailable):
                use()
        self.assertFalse(self.file.exists())
        away.rename(self.file)
        self.store.add_user("bob")

    def test_set_back(self) -> None:
        """When a backup is restored, as many changes as were lost do not bring back what was known
        of the lost ones."""
        store = Store(self.url, NOW.timestamp)
        self.addCleanup(store.close)
        store.open()
        alice, _ = store.add_user("alice"), store.add_user("bob")
        backup = sqlite3.connect(":memory:")
        self.addCleanup(backup.close)
        with closing(sqlite3.connect(self.file)) as source:
            source.backup(backup)
        store.add_keys("alice", ed25519_line(1))
        store.grant("alice", "*")
        before = store.revisions()
        access = store.access(alice.id)
        assert access is not None
        self.assertEqual(access.rules, (Rule("*", "operator"),))
        with closing(sqlite3.connect(self.file)) as target:
            backup.backup(target)
        store.add_keys("bob", ed25519_line(2))
        store.grant("bob", "*")
        keys: list[KeyRecord] = []
        self.assertNotEqual(store.read_keys(before.keys, keys.extend), before.keys)
        self.assertEqual([key.user for key in keys], ["bob"])
        again = store.access(alice.id, access)
        assert isinstance(again, Access)
        self.assertEqual(again.rules, ())
        self.assertNotEqual(store.revisions(), before)
