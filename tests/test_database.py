"""The embedded engine's database: its file or server, what can go wrong there, and its URL."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from unittest import mock

from sqlalchemy import text
from twisted.trial.unittest import SynchronousTestCase

from tests.engine_kit import short_directory
from tests.store_kit import MOUNT, StoreTestCase, contents, may_mount
from vmconsole import config
from vmconsole.engine.embedded.database import database_file, database_url
from vmconsole.engine.embedded.store import Store
from vmconsole.errors import ConfigError

_SQLITE_MESSAGE = "The database sqlite:///"


def url_of(database: str) -> str:
    """What ``engine.embedded.database`` means."""
    return database_url(
        config.Config(
            engine=config.Engine(embedded=config.EmbeddedEngine(database=database)),
            state=config.State(directory="/state"),
        )
    )


class UrlTests(SynchronousTestCase):
    """``engine.embedded.database``."""

    def test_sqlite(self) -> None:
        """A relative file is in the state directory."""
        self.assertEqual(url_of("sqlite:///engine.db"), "sqlite:////state/engine.db")
        self.assertEqual(url_of("sqlite:////var/x.db"), "sqlite:////var/x.db")
        self.assertEqual(database_file("sqlite:////var/x.db"), Path("/var/x.db"))

    def test_postgresql(self) -> None:
        """It is reached by psycopg 3, which need not be named; the rest stays as it is."""
        for given in ("postgresql", "postgresql+psycopg"):
            self.assertEqual(
                url_of(f"{given}://u:se%40cret@db:5433/x?sslmode=verify-full"),
                "postgresql+psycopg://u:se%40cret@db:5433/x?sslmode=verify-full",
            )
        self.assertIsNone(database_file("postgresql+psycopg://db/x"))

    def test_refused(self) -> None:
        """All others are errors that name the option, and no password."""
        for wrong in (
            *("sqlite://", "sqlite:///:memory:", "engine.db", "", "postgresql://u:secret@db:x/y"),
            *("mysql://u:secret@db/x", "mysql://db/x?passwd=secret", "sqlite+aiosqlite:///x.db"),
            *("postgresql+psycopg2://u:secret@db/x", "postgresql+asyncpg://db/x?password=secret"),
            "postgres://u:secret@db/x",
        ):
            error = str(self.assertRaises(ConfigError, url_of, wrong))
            self.assertIn("engine.embedded.database", error)
            self.assertNotIn("secret", error)
            self.assertTrue(error.isprintable())

    def test_missing_package(self) -> None:
        """What is to be installed is said, and no password."""
        url = "postgresql+psycopg://u:secret@db/x?sslpassword=secret"
        with mock.patch.dict(sys.modules, {"psycopg": None}):
            error = str(self.assertRaises(ConfigError, Store, url))
        self.assertIn("needs a package that is missing: pip install 'vmconsole[postgresql]'", error)
        self.assertIn("postgresql+psycopg://u:***@db/x", error)
        self.assertNotIn("secret", error)


class FileTests(StoreTestCase):
    """The file of SQLite."""

    def test_private(self) -> None:
        """Only its owner can read the file, its side files and its directory."""
        self.store.add_user("alice")
        files = sorted(path.name for path in self.file.parent.iterdir())
        self.assertEqual(files, ["engine.db", "engine.db-shm", "engine.db-wal"])
        for name in files:
            self.assertEqual((self.file.parent / name).stat().st_mode & 0o777, 0o600, name)
        self.assertEqual(self.file.parent.stat().st_mode & 0o777, 0o700)

    def test_owner(self) -> None:
        """Made by root in somebody's directory, the file is that owner's."""
        if os.geteuid() != 0:
            return
        directory = Path(self.mktemp())
        directory.mkdir()
        os.chown(directory, 1234, 1234)
        store = self.another(f"sqlite:///{directory / 'engine.db'}")
        store.add_user("alice")
        for path in directory.iterdir():
            self.assertEqual((path.stat().st_uid, path.stat().st_gid), (1234, 1234), path)

    def test_owner_of_directory(self) -> None:
        """A directory that root makes is of the owner of the one above."""
        if os.geteuid() != 0:
            return
        above = Path(self.mktemp())
        above.mkdir()
        os.chown(above, 1234, 1234)
        self.another(f"sqlite:///{above / 'state' / 'engine.db'}").add_user("alice")
        for path in above.rglob("*"):
            self.assertEqual((path.stat().st_uid, path.stat().st_gid), (1234, 1234), path)

    def test_linked(self) -> None:
        """Root follows a link to the database only if it is root's own."""
        if os.geteuid() != 0:
            return
        directory = Path(self.mktemp()).absolute()
        directory.mkdir()
        target, link = directory / "target", directory / "engine.db"
        link.symlink_to(target)
        os.chown(link, 1234, 1234, follow_symlinks=False)
        with self.refused("a symbolic link that is not root's"):
            self.closed(f"sqlite:///{link}").open()
        self.assertFalse(target.exists())
        os.chown(link, 0, 0, follow_symlinks=False)
        self.another(f"sqlite:///{link}").add_user("alice")
        self.assertTrue(target.exists())

    def test_settings(self) -> None:
        """WAL; a confirmed write reaches the disk; references are held."""
        with self.store._database.reading() as connection:
            for pragma, value in (("journal_mode", "wal"), ("synchronous", 2), ("foreign_keys", 1)):
                self.assertEqual(connection.execute(text(f"PRAGMA {pragma}")).scalar(), value)

    def test_restored(self) -> None:
        """A file that came back from a backup, without WAL, has it again."""
        self.store.add_user("alice")
        copy = self.file.with_name("copy.db")
        self.query(f"VACUUM INTO '{copy}'")
        store = self.another(f"sqlite:///{copy}")
        self.assertEqual(contents(store), contents(self.store))
        with store._database.reading() as connection:
            self.assertEqual(connection.execute(text("PRAGMA journal_mode")).scalar(), "wal")

    def test_what_is_done(self) -> None:
        """``open`` says what it did, and does nothing where there is nothing to do."""
        store = self.closed(f"sqlite:///{self.file.with_name('new.db')}")
        self.assertEqual(
            store.open(), f"Made the database sqlite:///{self.file.with_name('new.db')}"
        )
        self.assertEqual(store.open(), "")
        self.assertEqual(self.closed().open(), "")
        self.assertEqual(len(list(self.file.parent.glob("*.0*"))), 0)

    def test_check_makes_nothing(self) -> None:
        """``check`` of a database that is not there yet finds nothing wrong, and makes nothing."""
        missing = self.file.parent / "deeper" / "new.db"
        self.closed(f"sqlite:///{missing}").check()
        self.assertFalse(missing.parent.exists())
        missing.parent.mkdir()
        self.closed(f"sqlite:///{missing}").check()
        self.assertEqual(list(missing.parent.iterdir()), [])
        missing.touch()
        self.closed(f"sqlite:///{missing}").check()
        self.assertEqual(missing.read_bytes(), b"")
        self.store.check()

    def test_no_database(self) -> None:
        """A file that is something else, or a directory, is a StoreError that names it."""
        garbage = self.file.with_name("garbage.db")
        garbage.write_bytes(b"garbage" * 1000)
        directory = self.file.with_name("directory.db")
        directory.mkdir()
        for path in (garbage, directory):
            store = self.closed(f"sqlite:///{path}")
            for call in (store.open, store.check):
                with self.refused(_SQLITE_MESSAGE, path.name):
                    call()
        self.assertEqual(garbage.read_bytes(), b"garbage" * 1000)
        with self.refused("cannot be made"):
            self.closed(f"sqlite:///{garbage / 'engine.db'}").open()

    def test_unreadable(self) -> None:
        """So is one that may not be read, or a directory that may not be written."""
        # Without its capabilities root may not read everything, and has all else.
        drop = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []
        directory = short_directory(self)
        file = directory / "engine.db"
        self.closed(f"sqlite:///{file}").open()
        script = "import sys; " + _OPEN
        for path, mode in ((file, 0o000), (directory, 0o000), (directory, 0o555)):
            directory.chmod(0o755)
            path.chmod(mode)
            name = "other.db" if mode == 0o555 else "engine.db"
            done = subprocess.run(
                [*drop, sys.executable, "-c", script, f"sqlite:///{directory / name}"],
                capture_output=True,
                text=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            )
            self.assertRegex(done.stdout, f"^Store.*: The database .*{name}.*\n$", done.stderr)
        directory.chmod(0o755)

    def test_strangers(self) -> None:
        """Somebody else's database is refused, and left byte for byte as it is."""
        for number, script in enumerate(
            (
                "CREATE TABLE albums (id INTEGER)",
                "CREATE TABLE users (id INTEGER)",
                "CREATE TABLE meta (name TEXT)",
                "CREATE TABLE alembic_version (version_num TEXT);"
                "INSERT INTO alembic_version VALUES ('0002')",
                "CREATE TABLE alembic_version (version_num TEXT); CREATE TABLE albums (id INTEGER)",
            )
        ):
            file = self.file.with_name(f"strange{number}.db")
            with closing(sqlite3.connect(file)) as connection:
                connection.executescript(script)
            before = file.read_bytes()
            store = self.closed(f"sqlite:///{file}")
            for call in (store.check, store.open):
                with self.refused("tables that are not vmconsole's", "Nothing was changed"):
                    call()
            store.close()
            self.assertEqual(file.read_bytes(), before)
            self.assertEqual(list(file.parent.glob(f"{file.name}?*")), [])


_OPEN = """
from vmconsole.engine.embedded.store import Store
from vmconsole.errors import StoreError
try:
    Store(sys.argv[1]).open()
except StoreError as error:
    print(f"{type(error).__name__}: {error}")
"""

_FULL = """
import os, sys
from pathlib import Path
from tests.store_kit import contents, ed25519_line
from vmconsole.engine.embedded.store import Store
from vmconsole.errors import StoreUnavailable
directory = Path(sys.argv[1])
store = Store(f"sqlite:///{directory / 'engine.db'}", step=lambda: 1)
store.open()
store.add_user("alice")
number = 0
def fill(size=4096):
    with open(directory / "ballast", "ab", 0) as ballast:
        try:
            while True:
                ballast.write(b"x" * size)
        except OSError:
            pass
def write():
    global number
    number += 1
    store.add_keys("alice", ed25519_line(number, "c" * 4000))
errors = []
def writes():
    before = contents(store)
    try:
        for _ in range(200):
            before = contents(store)
            write()
    except StoreUnavailable as error:
        assert "disk is full" in str(error), error
        assert str(error).isprintable()
        errors.append(error)
        # Reading goes on, and nothing is half there.
        assert contents(store) == before, (contents(store), before)
        assert store.access(store.users()[0].id).rules == ()
        return before
    raise AssertionError("never full")
for _ in range(5):
    fill()
    before = writes()
    assert contents(store) == before
    # Again, while it is full.
    assert writes() == before
    os.truncate(directory / "ballast", 0)
    write()
    store.grant("alice", "*")
    store.revoke("alice", "*")
keys = len(store.keys())
changes = store.last_changes()
assert sum(change.action == "key.add" for change in changes) == keys
assert store.revisions().all == len(changes)
fill()
writes()
other = Store(f"sqlite:///{directory / 'engine.db'}")
other.open()
assert contents(other) == contents(store)
print("done", keys, len(errors))
"""


class FullDiskTests(SynchronousTestCase):
    """A disk without room."""

    if not may_mount():
        skip = "no file system of our own can be mounted here"

    def test_full(self) -> None:
        """Writing fails in clear words, reading goes on; with room again, so does writing."""
        directory = short_directory(self)
        done = subprocess.run(
            [*MOUNT, sys.executable, "-c", _FULL, str(directory)],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        self.assertRegex(done.stdout, "^done ", done.stderr)
