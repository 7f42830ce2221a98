"""The PostgreSQL server of the other tests: how it ends and starts, and that nothing stays."""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psycopg
from sqlalchemy import Engine, create_engine, make_url, text
from sqlalchemy.exc import OperationalError, ProgrammingError
from twisted.trial.unittest import SynchronousTestCase

from tests import postgres
from tests.postgres import Postgres, PostgresError

_TOP = Path(postgres.__file__).parents[1]


class PostgresTestCase(SynchronousTestCase):
    """An empty database in the server of all tests."""

    skip = postgres.missing() or None

    def setUp(self) -> None:
        self.server = postgres.get()
        self.url = self.server.database()
        self.addCleanup(self.server.drop, self.url)
        # A test that ends early leaves the others a server that runs.
        self.addCleanup(self.server.start)
        self.engine = self.make_engine(self.url)

    def make_engine(self, url: str) -> Engine:
        """A client with a pool of its own."""
        engine = create_engine(url)
        self.addCleanup(engine.dispose)
        return engine


def query(engine: Engine, statement: str) -> object:
    """The first value of the first row, in a transaction that is committed."""
    with engine.begin() as connection:
        result = connection.execute(text(statement))
        return result.scalar() if result.returns_rows else None


def postmaster(server: Postgres) -> int:
    """The number of the server's first process."""
    return int((server.directory / "data/postmaster.pid").read_text().split()[0])


def children(pid: int) -> list[int]:
    """The processes that this one has started."""
    return [child for child, _ in postgres._descendants(pid)]


class DatabaseTests(PostgresTestCase):
    """Databases in it."""

    def test_database(self) -> None:
        """A new one is empty, is no other's, and belongs to a user that is nothing special."""
        other = self.server.database()
        self.addCleanup(self.server.drop, other)
        query(self.engine, "CREATE TABLE t (a integer)")
        self.assertRaises(ProgrammingError, query, self.make_engine(other), "SELECT * FROM t")
        role = "SELECT rolsuper OR rolcreatedb OR rolcreaterole FROM pg_roles WHERE rolname = user"
        self.assertIs(query(self.engine, role), False)

    def test_drop(self) -> None:
        """One is dropped though somebody is connected to it, and need not be there."""
        with self.engine.connect() as connection:
            self.server.drop(self.url)
            self.assertRaises(OperationalError, connection.execute, text("SELECT 1"))
        self.assertRaises(OperationalError, query, self.engine, "SELECT 1")
        self.server.drop(self.url)

    def test_sql(self) -> None:
        """The superuser gets rows as lines, and psql's words when a statement fails."""
        query(self.engine, "CREATE TABLE t (a integer, b text)")
        query(self.engine, "INSERT INTO t VALUES (1, 'eins'), (2, 'zwei')")
        self.assertEqual(self.server.sql("SELECT * FROM t", self.url), "1|eins\n2|zwei")
        self.assertEqual(self.server.sql("SELECT usesuper FROM pg_user WHERE usename = user"), "t")
        error = self.assertRaises(PostgresError, self.server.sql, "SELECT * FROM t")
        self.assertIn('relation "t" does not exist', str(error))

    def test_settings(self) -> None:
        """It sorts unlike C, and is not in UTC."""
        self.assertIs(query(self.engine, "SELECT 'a' < 'B'"), True)
        self.assertEqual(query(self.engine, "SHOW timezone"), "Asia/Kolkata")
        self.assertEqual(query(self.engine, "SHOW server_encoding"), "UTF8")
        self.assertEqual(query(self.engine, "SHOW listen_addresses"), "")


class ServerTests(PostgresTestCase):
    """The server ends, comes back, and falls silent."""

    def setUp(self) -> None:
        super().setUp()
        query(self.engine, "CREATE TABLE t (a integer)")
        query(self.engine, "INSERT INTO t VALUES (1)")

    def assert_broken_and_back(self) -> None:
        """Connections are lost, and what was committed is not."""
        self.assertRaises(OperationalError, query, self.engine, "SELECT a FROM t")
        self.server.start()
        self.engine.dispose()
        self.assertEqual(query(self.engine, "SELECT a FROM t"), 1)

    def test_stop(self) -> None:
        """After its end it can be started, and again without effect, but not be ended again."""
        for mode in ("fast", "immediate"):
            self.server.stop(mode)
            for method in (self.server.stop, self.server.kill, self.server.freeze):
                self.assertIn("not running", str(self.assertRaises(PostgresError, method)))
            self.assert_broken_and_back()
        process = postmaster(self.server)
        self.server.start()
        self.assertEqual(postmaster(self.server), process)
        self.assertRaises(ValueError, self.server.stop, "smart")

    def test_restart(self) -> None:
        """In one go."""
        process = postmaster(self.server)
        self.server.restart()
        self.assertNotEqual(postmaster(self.server), process)
        self.assert_broken_and_back()

    def test_kill(self) -> None:
        """All processes are gone at once, and it recovers."""
        processes = [postmaster(self.server), *children(postmaster(self.server))]
        self.assertGreater(len(processes), 3)
        self.server.kill()
        self.assertEqual([pid for pid in processes if Path(f"/proc/{pid}").exists()], [])
        self.assert_broken_and_back()

    def test_killed_by_others(self) -> None:
        """``get`` gives a server that runs, though somebody killed the first process."""
        process = postmaster(self.server)
        descriptor = os.pidfd_open(process)
        self.addCleanup(os.close, descriptor)
        os.kill(process, signal.SIGKILL)
        self.assertTrue(select.select([descriptor], [], [], 10.0)[0])
        self.assertIs(postgres.get(), self.server)
        self.assert_broken_and_back()

    def test_freeze(self) -> None:
        """Frozen it says nothing, neither to those connected nor to others, until it thaws."""
        connection = self.connect()
        self.server.freeze()
        connection.pgconn.send_query(b"SELECT a FROM t")
        self.assertFalse(select.select([connection], [], [], 0.2)[0])
        self.assertRaises(psycopg.OperationalError, self.connect, timeout=2)
        self.server.thaw()
        self.assertTrue(select.select([connection], [], [], 10.0)[0])
        answer = connection.pgconn.get_result()
        assert answer is not None
        self.assertEqual(answer.get_value(0, 0), b"1")

    def test_stop_frozen(self) -> None:
        """A frozen server can be ended and killed, and ``start`` thaws it."""
        self.server.freeze()
        self.server.start()
        self.assertEqual(query(self.engine, "SELECT a FROM t"), 1)
        for end in (self.server.stop, self.server.kill):
            self.server.freeze()
            end()
            self.assert_broken_and_back()

    def connect(self, timeout: int = 10) -> psycopg.Connection:
        """A connection without SQLAlchemy."""
        url = make_url(self.url).set(drivername="postgresql")
        connection = psycopg.connect(url.render_as_string(False), connect_timeout=timeout)
        self.addCleanup(connection.close)
        return connection


class OwnServerTests(PostgresTestCase):
    """One more server."""

    def test_own(self) -> None:
        """It listens on the loopback address, wants a password there, and writes for good."""
        with Postgres(tcp=True, fsync=True) as server:
            url = server.database(tcp=True)
            self.assertEqual(query(self.make_engine(url), "SHOW fsync"), "on")
            wrong = make_url(url).set(password="wrong").render_as_string(False)
            error = self.assertRaises(OperationalError, query, self.make_engine(wrong), "SELECT 1")
            self.assertIn("password authentication failed", str(error))
            server.restart()
            self.assertEqual(query(self.make_engine(url), "SELECT 1"), 1)
        self.assertFalse(server.directory.exists())
        self.assertRaises(PostgresError, server.start)
        server.close()

    def test_unix_only(self) -> None:
        """The server of all tests has no such URL."""
        self.assertRaises(PostgresError, self.server.database, tcp=True)

    def test_taken_port(self) -> None:
        """When somebody is faster at a port, it takes another."""
        with Postgres(tcp=True) as first:
            ports = [first.port, first.port + 1]
            self.patch(postgres, "_free_port", lambda: ports.pop(0))
            with Postgres(tcp=True) as second:
                self.assertEqual(second.port, first.port + 1)

    def test_missing(self) -> None:
        """Without PostgreSQL's programs it says what is missing."""
        self.patch(postgres, "_DEBIAN", Path("/nonexistent"))
        self.patch(shutil, "which", lambda _name: None)
        self.assertIn("initdb, pg_ctl", postgres.missing())
        self.assertRaises(PostgresError, Postgres)


class LeftoverTests(SynchronousTestCase):
    """The server ends with the process that started it."""

    skip = postgres.missing() or None

    script = (
        "import sys\n"
        "from tests import postgres\n"
        "server = postgres.get()\n"
        "print(server.directory, flush=True)\n"
        "sys.stdin.read()\n"
    )

    def start(self) -> tuple[subprocess.Popen[bytes], Path, list[int]]:
        """A Python with a server. With its directory and its processes."""
        python = subprocess.Popen(
            [sys.executable, "-c", self.script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(_TOP)},
        )
        self.addCleanup(python.__exit__, None, None, None)
        self.addCleanup(python.kill)
        assert python.stdout is not None
        directory = Path(python.stdout.readline().decode().strip())
        process = int((directory / "data/postmaster.pid").read_text().split()[0])
        return python, directory, [process, *children(process)]

    def assert_nothing_left(
        self, python: subprocess.Popen[bytes], directory: Path, processes: list[int]
    ) -> None:
        """No process and no file, when all that hold our pipe have ended."""
        self.assertGreater(len(processes), 3)
        python.communicate(timeout=20.0)
        self.assertEqual([pid for pid in processes if Path(f"/proc/{pid}").exists()], [])
        self.assertFalse(directory.exists())

    def test_end(self) -> None:
        """When Python ends."""
        python, directory, processes = self.start()
        self.assert_nothing_left(python, directory, processes)
        self.assertEqual(python.returncode, 0)

    def test_interrupt(self) -> None:
        """When Python is interrupted."""
        python, directory, processes = self.start()
        python.send_signal(signal.SIGINT)
        self.assert_nothing_left(python, directory, processes)

    def test_kill(self) -> None:
        """When Python is killed, and the server is frozen at that."""
        python, directory, processes = self.start()
        for pid in processes:
            os.kill(pid, signal.SIGSTOP)
        python.kill()
        self.assert_nothing_left(python, directory, processes)
