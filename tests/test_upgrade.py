"""How a database of an older vmconsole becomes one of this: whole, or not at all."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from base64 import b64decode
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest import mock

from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, create_engine
from sqlalchemy.schema import CreateIndex, CreateTable
from twisted.trial.unittest import SynchronousTestCase

from tests.store_kit import OnPostgres, StoreTestCase, at_once, ed25519_line, sqlite_script
from vmconsole.engine.embedded import upgrade
from vmconsole.engine.embedded.schema import metadata
from vmconsole.engine.embedded.store import Store
from vmconsole.publickeys import fingerprint

# As the first version made it, which did not count its versions by alembic.
_TABLES = """
CREATE TABLE meta (
    id INTEGER NOT NULL, schema_version INTEGER NOT NULL, revision BIGINT NOT NULL,
    PRIMARY KEY (id));
CREATE TABLE users (
    id VARCHAR(36) NOT NULL, name VARCHAR(64) NOT NULL, created BIGINT NOT NULL,
    PRIMARY KEY (id), UNIQUE (name));
CREATE TABLE hosts (
    name VARCHAR(253) NOT NULL, uri VARCHAR(1024) NOT NULL, PRIMARY KEY (name));
CREATE TABLE keys (
    fingerprint VARCHAR(64) NOT NULL, user_id VARCHAR(36) NOT NULL, type VARCHAR(64) NOT NULL,
    blob BLOB NOT NULL, comment TEXT NOT NULL, created BIGINT NOT NULL,
    PRIMARY KEY (fingerprint),
    FOREIGN KEY(user_id) REFERENCES users (id) ON DELETE CASCADE);
CREATE INDEX ix_keys_user_id ON keys (user_id);
CREATE TABLE grants (
    user_id VARCHAR(36) NOT NULL, pattern VARCHAR(255) NOT NULL, role VARCHAR(16) NOT NULL,
    created BIGINT NOT NULL, PRIMARY KEY (user_id, pattern),
    FOREIGN KEY(user_id) REFERENCES users (id) ON DELETE CASCADE);
INSERT INTO meta (id, schema_version, revision) VALUES (1, 1, 57);
INSERT INTO users VALUES ('id-b', 'bob', 1000), ('id-a', 'alice', 1001), ('id-Z', 'Zoe', 1002);
INSERT INTO hosts VALUES ('node1', ''), ('fe80::1', 'qemu:///system');
INSERT INTO grants VALUES
    ('id-a', '*', 'operator', 1003), ('id-a', 'web*', 'viewer', 1004),
    ('id-b', '100%', 'viewer', 1005);
"""
_BLOBS = {name: ed25519_line(at) for at, name in enumerate(("id-a", "id-Z", "id-b"))}
# What is only in the write-ahead log, if somebody was killed.
LATE = "INSERT INTO users VALUES ('id-l', 'late', 1006)"


def old_rows() -> list[str]:
    """The statements that make the first version, with its rows."""
    script = [each for each in _TABLES.split(";") if each.strip()]
    for id, line in _BLOBS.items():
        kind, blob = line.split()
        raw = b64decode(blob)
        values = f"'{fingerprint(raw)}', '{id}', '{kind}', X'{raw.hex()}', 'ä {id}', 1010"
        script.append(f"INSERT INTO keys VALUES ({values})")
    return script


class UpgradeTestCase(StoreTestCase):
    """There is a database of the first version."""

    def setUp(self) -> None:
        self.url = self.new_url()
        self.make_old()

    def make_old(self) -> None:
        """Make it."""
        self.file.parent.mkdir(parents=True)
        self.fill(self.file)

    def fill(self, file: Path) -> None:
        """Make it in this file."""
        with closing(sqlite3.connect(file)) as connection:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.executescript(";".join(old_rows()))
        file.chmod(0o600)

    def check_upgraded(self, store: Store) -> None:
        """Nothing is lost, and all that is new works."""
        users = [(user.id, user.name, user.created) for user in store.users()]
        self.assertEqual(
            users, [("id-Z", "Zoe", 1002), ("id-a", "alice", 1001), ("id-b", "bob", 1000)]
        )
        grants = [(each.subject, each.pattern, each.role, each.created) for each in store.grants()]
        self.assertEqual(
            grants,
            [
                ("alice", "*", "operator", 1003),
                ("alice", "web*", "viewer", 1004),
                ("bob", "100%", "viewer", 1005),
            ],
        )
        hosts = [(host.name, host.uri) for host in store.hosts()]
        self.assertEqual(hosts, [("fe80::1", "qemu:///system"), ("node1", "")])
        keys = {
            (key.user_id, f"{key.type} {key.comment} {key.created} {key.options}", key.fingerprint)
            for key in store.keys()
        }
        self.assertEqual(
            keys,
            {
                (id, f"ssh-ed25519 ä {id} 1010 ", fingerprint(_blob(line)))
                for id, line in _BLOBS.items()
            },
        )
        self.assertEqual({key.blob for key in store.keys()}, set(map(_blob, _BLOBS.values())))
        self.assertEqual((store.groups(), store.last_changes()), ([], []))
        self.assertEqual(store.revisions().all, 57)
        before = store.revisions()
        store.add_group("ops")
        store.add_member("ops", "alice")
        store.grant("@ops", "db*")
        store.grant("alice", "*", "viewer")
        store.add_keys("alice", f'from="::1" {ed25519_line(77)}')
        self.assertEqual(store.revisions().all, before.all + 5)
        self.assertEqual(store.revisions().access, before.access + 4)
        access = store.access("id-a")
        assert access is not None
        self.assertEqual([rule.pattern for rule in access.rules], ["*", "db*", "web*"])
        store.remove_user("alice")
        self.assertEqual([key.user for key in store.keys()], ["Zoe", "bob"])
        self.assertEqual([each.subject for each in store.grants()], ["@ops", "bob"])

    def failing(self) -> Any:
        """Within it, the last thing that an upgrade does fails."""
        return mock.patch("alembic.op.drop_column", side_effect=OSError("the end"))


class UpgradeTests(UpgradeTestCase):
    """From the first version."""

    def test_upgraded(self) -> None:
        """Opening it is all: nothing is lost, and ``open`` says what it did, once."""
        store = self.closed()
        store.check()
        self.assertIn("from version 0001 to 0002", store.open())
        self.check_upgraded(store)
        store.check()
        self.assertEqual(store.open(), "")
        self.assertEqual(self.closed().open(), "")

    def test_checked(self) -> None:
        """To check it changes nothing."""
        self.closed().check()
        tables = self.query(
            "SELECT table_name FROM information_schema.columns WHERE column_name = 'schema_version'"
            if self.url.startswith("postgresql")
            else "SELECT name FROM sqlite_master WHERE name IN ('groups', 'alembic_version')"
        )
        self.assertEqual(tables, [("meta",)] if self.url.startswith("postgresql") else [])

    def test_fails(self) -> None:
        """An upgrade that fails leaves the old version; the next one succeeds."""
        before = self.dump()
        store = self.closed()
        with self.failing():
            self.assertRaises(OSError, store.open)
        self.assertEqual(self.dump(), before)
        self.assertIn("from version 0001", store.open())
        self.check_upgraded(store)

    def dump(self) -> list[str]:
        """All that is in it."""
        with closing(sqlite3.connect(self.file)) as connection:
            return list(connection.iterdump())

    def test_at_once(self) -> None:
        """Of several who open it at once, one upgrades it, and all can use it."""
        stores = [self.closed() for _ in range(8)]
        said: list[str] = []

        def open_and_use(store: Store) -> None:
            said.append(store.open())
            self.assertEqual(len(store.users()), 3)

        calls = [lambda store=store: open_and_use(store) for store in stores]
        self.assertEqual(at_once(*calls), [])
        self.assertEqual(sum(bool(each) for each in said), 1, said)
        self.check_upgraded(stores[0])

    def test_processes_at_once(self) -> None:
        """So it is with processes, also where there is nothing yet."""
        for url in (self.url, self.empty()):
            done = subprocess.run(
                [sys.executable, "-c", _OPEN, url],
                capture_output=True,
                text=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            )
            said = done.stdout.splitlines()
            self.assertEqual(len(said), 8, done.stderr)
            self.assertEqual(sorted(map(bool, said)), [False] * 7 + [True], said)

    def empty(self) -> str:
        """The URL of a database with nothing in it."""
        return f"sqlite:///{self.file.with_name('empty.db')}"

    def test_tables(self) -> None:
        """What the steps leave is what the code goes by: alembic finds no difference."""
        self.another()
        self.another(url := self.empty())
        for each in (self.url, url):
            engine = create_engine(each)
            with engine.connect() as connection:
                context = MigrationContext.configure(
                    connection, opts={"compare_type": True, "include_object": _is_ours}
                )
                self.assertEqual(compare_metadata(context, metadata), [])
                self.check_tables(connection)
            engine.dispose()

    def check_tables(self, connection: Connection) -> None:
        """What alembic does not compare: of SQLite, the columns and constraints word by word."""
        self.assertEqual(
            connection.exec_driver_sql("PRAGMA foreign_key_check").all(),
            [],
        )
        with closing(sqlite3.connect(":memory:")) as other:
            for table in metadata.sorted_tables:
                other.execute(str(CreateTable(table).compile(dialect=connection.dialect)))
                for index in table.indexes:
                    other.execute(str(CreateIndex(index).compile(dialect=connection.dialect)))
            for table in metadata.sorted_tables:
                for pragma in ("table_info", "foreign_key_list", "index_list"):
                    statement = f"PRAGMA {pragma}({table.name})"
                    rows = connection.exec_driver_sql(statement).all()
                    self.assertEqual(
                        sorted(map(_comparable, rows)),
                        sorted(map(_comparable, other.execute(statement).fetchall())),
                        statement,
                    )

    def test_newer(self) -> None:
        """A database of a newer vmconsole is refused in clear words, and left as it is."""
        self.another().close()
        self.query("UPDATE alembic_version SET version_num = '9999'")
        if self.url.startswith("sqlite"):
            # As a backup may be.
            sqlite_script(self.file, "PRAGMA journal_mode = DELETE")
        before = self.raw()
        for call in (Store.open, Store.check):
            store = self.closed()
            with self.refused("has version 9999", "up to 0002", "a newer vmconsole", "Install"):
                call(store)
            store.close()
            self.assertEqual(self.raw(), before)

    def raw(self) -> object:
        """What is there, byte for byte."""
        return {
            path.name: path.read_bytes() for path in self.file.parent.iterdir() if path.is_file()
        }


class PostgresUpgradeTests(OnPostgres, UpgradeTests):
    """On PostgreSQL."""

    def make_old(self) -> None:
        """Make the database of the first version."""
        self.old_url = self.url
        for statement in old_rows():
            statement = statement.replace("BLOB", "BYTEA").replace("X'", "'\\x")
            statement = statement.replace("id INTEGER", "id SERIAL")
            self.query(statement)

    def empty(self) -> str:
        """The URL of a database with nothing in it."""
        url = self.server.database()
        self.addCleanup(self.server.drop, url)
        return url

    def dump(self) -> list[str]:
        """The columns and rows that there are."""
        return [str(each) for each in self.raw()]

    def raw(self) -> list[object]:
        """What is there."""
        columns = self.query(
            "SELECT table_name, column_name, data_type, collation_name, column_default "
            "FROM information_schema.columns WHERE table_schema = 'public' ORDER BY 1, 2"
        )
        tables = sorted({str(column[0]) for column in columns})
        rows = [sorted(map(str, self.query(f"SELECT * FROM {name}"))) for name in tables]
        return [columns, rows]

    def check_tables(self, connection: Connection) -> None:
        """What alembic does not compare: the catalogue is that of a database made at once."""
        url = self.empty()
        engine = create_engine(url)
        metadata.create_all(engine)
        with engine.connect() as other:
            for query in _CATALOGUE:
                self.assertEqual(
                    connection.exec_driver_sql(query).all(), other.exec_driver_sql(query).all()
                )
        engine.dispose()


# Columns but for their order; then constraints, then indexes, both
# without names that PostgreSQL gave.
_CATALOGUE = (
    "SELECT table_name, column_name, data_type, character_maximum_length, is_nullable, "
    "  collation_name, column_default "
    "FROM information_schema.columns "
    "WHERE table_schema = 'public' AND table_name <> 'alembic_version' ORDER BY 1, 2",
    "SELECT conrelid::regclass::text, pg_get_constraintdef(oid) FROM pg_constraint "
    "WHERE connamespace = 'public'::regnamespace AND conrelid::regclass::text <> "
    "'alembic_version' ORDER BY 1, 2",
    "SELECT tablename, regexp_replace(indexdef, 'INDEX [a-z_]+ ', 'INDEX ') FROM pg_indexes "
    "WHERE schemaname = 'public' AND tablename <> 'alembic_version' ORDER BY 1, 2",
)


# Forked, since to import all this takes longer than what is to happen at the same time.
_OPEN = """
import os, sys
from vmconsole.engine.embedded.store import Store
ready, go = os.pipe()
store = Store(sys.argv[1])
for _ in range(8):
    if not os.fork():
        os.close(go)
        os.read(ready, 1)
        said = store.open()
        store.users()
        os.write(1, f"{said}\\n".encode())
        os._exit(0)
os.close(go)
while True:
    try:
        os.wait()
    except ChildProcessError:
        break
"""


class StepsTests(SynchronousTestCase):
    """The steps themselves."""

    def test_in_a_row(self) -> None:
        """There is one newest version, and one way there."""
        scripts: ScriptDirectory = upgrade._scripts()
        found = [script.revision for script in scripts.walk_revisions()]
        self.assertEqual(found, ["0002", "0001"])
        self.assertEqual(upgrade.newest_version(), "0002")


def _blob(line: str) -> bytes:
    return b64decode(line.split()[1])


def _is_ours(_: object, name: str, kind: str, *__: object) -> bool:
    return (kind, name) != ("table", "alembic_version")


def _comparable(row: Any) -> tuple[str, ...]:
    """A row of SQLite's pragmas, without numbers and names that it gave."""
    return tuple(str(each) for each in row[1:] if "sqlite_autoindex" not in str(each))
