"""How an older SQLite file becomes one of this vmconsole, and what is kept of it."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from unittest import mock

from tests.engine_kit import short_directory
from tests.store_kit import (
    MOUNT,
    contents,
    may_mount,
)
from tests.test_upgrade import LATE, UpgradeTestCase


class FileUpgradeTests(UpgradeTestCase):
    """What is special with SQLite's file."""

    def copies(self) -> list[str]:
        """The files beside it, without SQLite's own."""
        names = [path.name for path in self.file.parent.iterdir()]
        return sorted(set(names) - {"engine.db", "engine.db-wal", "engine.db-shm"})

    def test_copy(self) -> None:
        """A copy of the old file is kept, for its owner only, that is a whole database."""
        with closing(sqlite3.connect(self.file)) as writer:
            # While somebody has it open, what was written last is in its log only.
            writer.execute(LATE)
            writer.commit()
            with closing(sqlite3.connect(self.file)) as reader:
                expected = list(reader.iterdump())
            store = self.closed()
            said = store.open()
            copy = self.file.with_name("engine.db.0001")
            self.assertIn(f"{copy} is as it was before", said)
            self.assertEqual(self.copies(), ["engine.db.0001"])
            self.assertEqual(copy.stat().st_mode & 0o777, 0o600)
            self.assertIn("late", {user.name for user in store.users()})
        with closing(sqlite3.connect(copy)) as kept:
            self.assertEqual(list(kept.iterdump()), expected)
            self.assertEqual(kept.execute("PRAGMA integrity_check").fetchall(), [("ok",)])
        # It can be opened as such, which upgrades it in its turn.
        other = self.another(f"sqlite:///{copy}")
        self.assertEqual(contents(other), contents(store))

    def test_owner(self) -> None:
        """Made by root, the copy is of the file's owner."""
        if os.geteuid() != 0:
            return
        for path in (self.file.parent, self.file):
            os.chown(path, 1234, 1234)
        self.another()
        copy = self.file.with_name("engine.db.0001").stat()
        self.assertEqual((copy.st_uid, copy.st_gid), (1234, 1234))

    def test_copy_is_swapped(self) -> None:
        """Root writes no copy through a link that somebody puts in its place meanwhile."""
        target = self.file.with_name("target")
        target.write_bytes(b"precious")
        new = self.file.with_name("engine.db.0001.new")
        fchown, owner = os.fchown, os.stat(self.file.parent)
        given = list[int]()

        def swap(descriptor: int, *_: int) -> None:
            new.unlink()
            new.symlink_to(target)
            given.append(descriptor)
            fchown(descriptor, owner.st_uid, owner.st_gid)

        with (
            mock.patch.object(os, "geteuid", lambda: 0),
            mock.patch.object(os, "fchown", swap),
            mock.patch.object(os, "chown", side_effect=AssertionError),
        ):
            self.closed().open()
        self.assertEqual(len(given), 1)
        self.assertEqual(target.read_bytes(), b"precious")

    def test_copy_of_small_pages(self) -> None:
        """A database with pages of another size than usual is copied as well."""
        with closing(sqlite3.connect(self.file)) as connection:
            connection.execute("PRAGMA journal_mode = DELETE")
            connection.execute("PRAGMA page_size = 1024")
            connection.execute("VACUUM")
        self.another()
        with closing(sqlite3.connect(self.file.with_name("engine.db.0001"))) as kept:
            self.assertEqual(kept.execute("PRAGMA page_size").fetchall(), [(1024,)])
            self.assertEqual(kept.execute("PRAGMA integrity_check").fetchall(), [("ok",)])

    def test_copy_fails(self) -> None:
        """Without a copy nothing is upgraded: it is said why, and nothing of it is left."""
        before = self.file.read_bytes()
        self.file.with_name("engine.db.0001").mkdir()
        store = self.closed()
        with self.refused("no copy of it could be made", "Nothing was changed"):
            store.open()
        store.close()
        self.assertEqual(self.copies(), ["engine.db.0001"])
        self.assertEqual(self.file.read_bytes(), before)
        self.file.with_name("engine.db.0001").rmdir()
        self.check_upgraded(self.another())

    def test_copy_again(self) -> None:
        """What an earlier try left, half a copy or a whole one, is in nobody's way."""
        with self.failing():
            self.assertRaises(OSError, self.closed().open)
        self.assertEqual(self.copies(), ["engine.db.0001"])
        self.file.with_name("engine.db.0001.new").write_bytes(b"half")
        with closing(sqlite3.connect(self.file)) as writer:
            writer.execute(LATE)
            writer.commit()
        self.another()
        self.assertEqual(self.copies(), ["engine.db.0001"])
        with closing(sqlite3.connect(self.file.with_name("engine.db.0001"))) as kept:
            self.assertEqual(kept.execute("SELECT count(*) FROM users").fetchall(), [(4,)])

    def test_no_copy_of_nothing(self) -> None:
        """A new database, and an empty file, have no copy."""
        self.another(self.empty_url())
        self.assertEqual(self.copies(), ["empty.db"])

    def empty_url(self) -> str:
        """Of an empty file."""
        empty = self.file.with_name("empty.db")
        empty.touch()
        store = self.closed(f"sqlite:///{empty}")
        store.open()
        store.close()
        return f"sqlite:///{empty}"

    def test_killed(self) -> None:
        """Killed at whichever statement, the old version is whole, and the next open succeeds."""
        for at in range(1, 100):
            file = self.file.with_name(f"killed{at}.db")
            self.fill(file)
            done = subprocess.run(
                [sys.executable, "-c", _KILLED, f"sqlite:///{file}", str(at)],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
                stdout=subprocess.PIPE,
            )
            if done.returncode == 0:
                break
            self.assertEqual(done.returncode, -signal.SIGKILL)
            with closing(sqlite3.connect(file)) as connection:
                query = "SELECT schema_version, revision FROM meta"
                self.assertEqual(connection.execute(query).fetchall(), [(1, 57)])
            self.check_upgraded(self.another(f"sqlite:///{file}"))
        self.assertEqual(done.stdout, b"done")
        self.assertGreater(at, 5)


# Every 4th statement will do: it takes a process each.
_KILLED = """
import os, signal, sys
from sqlalchemy import event
from vmconsole.engine.embedded.store import Store
store = Store(sys.argv[1])
count = 0
def before(*_):
    global count
    count += 1
    if count == int(sys.argv[2]) * 4:
        os.kill(os.getpid(), signal.SIGKILL)
event.listen(store._database._engine, "before_cursor_execute", before)
store.open()
print("done", end="")
"""

_NO_ROOM = """
import os, shutil, sqlite3, sys
from pathlib import Path
from tests.store_kit import contents
from vmconsole.engine.embedded.store import Store
from vmconsole.errors import StoreError
directory = Path(sys.argv[2])
file = directory / "engine.db"
shutil.copy(sys.argv[1], file)
def dump():
    connection = sqlite3.connect(file)
    lines = list(connection.iterdump())
    connection.close()
    return lines
before = dump()
texts = set()
# Each time with a little more room, up to enough.
for room in range(0, 2_000_000, 16_384):
    ballast = directory / "ballast"
    with open(ballast, "wb", 0) as output:
        try:
            while True:
                output.write(b"x" * 4096)
        except OSError:
            pass
        size = output.tell()
        output.truncate(max(0, size - room))
    store = Store(f"sqlite:///{file}")
    try:
        store.open()
    except StoreError as error:
        assert str(error).isprintable(), error
        texts.add(str(error))
    else:
        break
    finally:
        store.close()
        ballast.unlink()
    assert dump() == before
    assert not list(directory.glob("*.new*")), list(directory.iterdir())
for text in sorted(texts):
    print(text)
print("users", len(store.users()))
"""


class NoRoomTests(UpgradeTestCase):
    """A disk that is full."""

    if not may_mount():
        skip = "no file system of our own can be mounted here"

    def test_no_room(self) -> None:
        """Whether for the copy or for the upgrade: it is said, and nothing is changed."""
        directory = short_directory(self)
        done = subprocess.run(
            [*MOUNT, sys.executable, "-c", _NO_ROOM, str(self.file), str(directory)],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        self.assertTrue(done.stdout.endswith("users 3\n"), done.stdout + done.stderr)
        self.assertIn("no copy of it could be made", done.stdout)
        self.assertIn("engine.db failed: database or disk is full.", done.stdout)
