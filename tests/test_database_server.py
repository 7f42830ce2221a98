"""The embedded engine's PostgreSQL server: how it goes and comes back while a store is open."""

from __future__ import annotations

import select
import socket
import threading
from collections.abc import Callable
from pathlib import Path

from sqlalchemy import make_url
from twisted.trial.unittest import SynchronousTestCase

from tests import postgres
from tests.engine_kit import short_directory
from tests.postgres import Postgres
from tests.store_kit import OnPostgres, StoreTestCase, contents, ed25519_line
from vmconsole.engine.embedded.store import Store
from vmconsole.errors import StoreError, StoreUnavailable


class PostgresFailureTests(OnPostgres, StoreTestCase):
    """A server that goes and comes while a store is open."""

    def unavailable(self) -> None:
        """Each call fails with StoreUnavailable."""
        for call in (
            self.store.users,
            self.store.revisions,
            lambda: self.store.add_user("eve"),
            lambda: self.store.read_keys(None, self.fail),
            self.store.check,
            self.store.open,
            self.closed().open,
        ):
            with self.refused("The database postgresql+psycopg://", kind=StoreUnavailable):
                call()

    def test_restarted(self) -> None:
        """Of a server that was restarted nobody notices anything."""
        self.store.add_user("alice")
        for stop in (self.server.restart, lambda: self.server.restart("immediate")):
            before = contents(self.store)
            stop()
            self.assertEqual(contents(self.store), before)
            stop()
            self.store.add_user(f"u{len(before[0])}")  # type: ignore[arg-type]

    def test_down(self) -> None:
        """While it is down each call says so in one line; when it is back all go on."""
        self.store.add_user("alice")
        before = contents(self.store)
        for stop in (self.server.stop, self.server.kill):
            stop()
            self.unavailable()
            self.server.start()
            self.assertEqual(contents(self.store), before)
        self.store.add_user("bob")

    def test_killed_within(self) -> None:
        """What was under way when it went is not there, and is not said to be."""
        for stop in (self.server.kill, lambda: self.server.stop("immediate")):
            before = contents(self.store)
            with self.refused(kind=StoreUnavailable):
                with self.store._changing("test", "x", "access") as connection:
                    connection.exec_driver_sql("INSERT INTO users VALUES ('1', 'eve', 1)")
                    stop()
            self.server.start()
            self.assertEqual(contents(self.store), before)

    def test_hand_out_while_it_goes(self) -> None:
        """So it is when it goes between the private key's handing out and the commit."""
        self.store.add_user("alice")
        with self.unchanged_by_restart(), self.refused(kind=StoreUnavailable):
            self.store.add_keys("alice", ed25519_line(1), self.server.kill)

    def unchanged_by_restart(self) -> _Unchanged:
        """What was there is there, after starting the server again."""
        return _Unchanged(self, self.server.start)

    def test_ended_at_commit(self) -> None:
        """A commit that the server refuses is an error, and undone."""
        self.query(
            "CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS "
            "'BEGIN PERFORM pg_terminate_backend(pg_backend_pid()); RETURN NULL; END'"
        )
        self.query(
            "CREATE CONSTRAINT TRIGGER t AFTER INSERT ON users DEFERRABLE INITIALLY DEFERRED "
            "FOR EACH ROW EXECUTE FUNCTION fail()"
        )
        with self.unchanged(), self.refused(kind=StoreUnavailable):
            self.store.add_user("alice")
        self.query("DROP TRIGGER t ON users")
        self.store.add_user("alice")

    def test_lost_answer(self) -> None:
        """When the answer to a commit is lost, it is an error: it may be there, or not."""
        for passes in (True, False):
            relay = _Relay(self.server, short_directory(self))
            self.addCleanup(relay.close)
            query = {"host": str(relay.directory), "application_name": f"relayed{passes}"}
            url = make_url(self.url).update_query_dict(query)
            store = self.another(url.render_as_string(hide_password=False))
            name = f"u{passes}"
            store.add_user(f"{name}-before")
            relay.cut_at = b"COMMIT\0"
            relay.passes = passes
            with self.refused(kind=StoreUnavailable):
                store.add_user(name)
            relay.cut_at = b""
            # Until the server has seen what came before the end.
            while self.query(
                f"SELECT 1 FROM pg_stat_activity WHERE application_name = 'relayed{passes}'"
            ):
                pass
            self.assertEqual(name in {user.name for user in store.users()}, passes)
            if passes:
                with self.refused("already"):
                    store.add_user(name)
            self.assertEqual(store.revisions().all, len(store.last_changes()))

    def test_frozen(self) -> None:
        """A silent server: who waits gets the answer when it goes on; nobody else waits forever."""
        self.store.add_user("alice")
        users: list[object] = []
        self.server.freeze()
        reader = threading.Thread(target=lambda: users.extend(self.store.users()))
        reader.start()
        url = make_url(self.url).update_query_dict({"connect_timeout": "2"})
        with self.refused("timeout", kind=StoreUnavailable):
            self.closed(url.render_as_string(hide_password=False)).users()
        self.server.thaw()
        reader.join()
        self.assertEqual(len(users), 1)
        self.store.add_user("bob")

    def test_thrown_out(self) -> None:
        """Connections that an administrator ended, or that were idle for too long, are replaced."""
        self.store.add_user("alice")
        end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'vmconsole'"
        self.server.sql(end)
        self.assertEqual(len(self.store.users()), 1)
        with self.unchanged(), self.refused(kind=StoreUnavailable):
            with self.store._changing("test", "x", "access"):
                self.server.sql(end)
        with self.unchanged(), self.refused(kind=StoreUnavailable):
            with self.store._changing("test", "x", "access") as connection:
                connection.exec_driver_sql("SET idle_in_transaction_session_timeout = 1")
                # Until it has ended us.
                backend = connection.exec_driver_sql("SELECT pg_backend_pid()").scalar()
                while self.query(f"SELECT 1 FROM pg_stat_activity WHERE pid = {backend}"):
                    pass

    def test_locked(self) -> None:
        """A writer that hangs holds up others for a bounded time, which may be set in the URL."""
        url = make_url(self.url).update_query_dict({"options": "-c lock_timeout=10"})
        impatient = self.another(url.render_as_string(hide_password=False))
        with self.store._database.writing("access"):
            with self.refused("lock timeout", kind=StoreUnavailable):
                impatient.add_user("alice")
            self.assertEqual(impatient.users(), [])
            with impatient._database.reading() as connection:
                shown = connection.exec_driver_sql("SHOW lock_timeout").scalar()
            self.assertEqual(shown, "10ms")
        impatient.add_user("alice")

    def test_settings(self) -> None:
        """Sessions are bounded, so that one that hangs is noticed."""
        with self.store._database.reading() as connection:
            for setting, value in (
                ("lock_timeout", "10s"),
                ("statement_timeout", "1min"),
                ("idle_in_transaction_session_timeout", "1min"),
                ("application_name", "vmconsole"),
                ("transaction_isolation", "repeatable read"),
            ):
                shown = connection.exec_driver_sql(f"SHOW {setting}").scalar()
                self.assertEqual(shown, value, setting)

    def test_no_rights(self) -> None:
        """A database in which we may make nothing is a StoreError that says so."""
        name = make_url(self.url).database
        owner = f"ALTER DATABASE {name} OWNER TO"
        url = self.server.database()
        self.addCleanup(self.server.drop, url)
        other = make_url(url).database
        self.server.sql(f"{owner.replace(str(name), str(other))} postgres")
        self.server.sql("REVOKE CREATE ON SCHEMA public FROM PUBLIC, vmconsole", url)
        with self.refused("permission denied"):
            self.closed(url).open()

    def test_strangers(self) -> None:
        """Somebody else's database is refused, and left as it is."""
        url = self.server.database()
        self.addCleanup(self.server.drop, url)
        self.server.sql("CREATE TABLE albums (id integer)", url)
        store = self.closed(url)
        for call in (store.check, store.open):
            with self.refused("tables that are not vmconsole's"):
                call()
        self.assertEqual(
            self.server.sql("SELECT tablename FROM pg_tables WHERE schemaname = 'public'", url),
            "albums",
        )


class _Unchanged:
    def __init__(self, test: StoreTestCase, start: Callable[[], None]) -> None:
        self.test = test
        self.start = start

    def __enter__(self) -> None:
        self.before = contents(self.test.store)

    def __exit__(self, *_: object) -> None:
        self.start()
        self.test.assertEqual(contents(self.test.store), self.before)


class PasswordTests(SynchronousTestCase):
    """A server on TCP, whose URLs have passwords."""

    skip = postgres.missing() or None

    def test_not_said(self) -> None:
        """Whatever goes wrong, the password is in no text; all are one visible line."""
        with Postgres(tcp=True) as server:
            url = make_url(server.database(tcp=True))
            password = url.password
            assert password is not None
            self.assertEqual(self.failures(url.render_as_string(False)), [])
            texts = self.failures(url.set(password=password[:-1] + "x").render_as_string(False))
            texts += self.failures(url.set(username="a\x1b[2Jb").render_as_string(False))
            query = url.set(password=None).update_query_dict({"password": password})
            self.assertEqual(self.failures(query.render_as_string(False)), [])
            server.stop()
            for each in (url, query):
                texts += self.failures(each.render_as_string(False))
                unknown = each.set(host="nowhere.invalid").render_as_string(False)
                texts += self.failures(unknown)
                texts += self.failures(
                    each.update_query_dict({"nonsense": "1"}).render_as_string(False)
                )
        self.assertEqual(len(texts), 8)
        for said in texts:
            self.assertNotIn(password[:-1], said)
            self.assertTrue(said.isprintable(), repr(said))
            self.assertNotIn("\\t", said)
            self.assertTrue(said.endswith("."))
            self.assertIn("The database postgresql+psycopg://", said)

    def failures(self, url: str) -> list[str]:
        """What opening it says."""
        store = Store(url, step=lambda: 1)
        self.addCleanup(store.close)
        try:
            store.open()
        except StoreError as error:
            return [str(error)]
        return []


class _Relay:
    """Before a server, on a socket of its own. Ends a connection when ``cut_at`` is asked."""

    def __init__(self, server: Postgres, directory: Path) -> None:
        self.directory = directory
        self.cut_at = b""
        self.passes = True
        self._server = str(server.directory / ".s.PGSQL.5432")
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(directory / ".s.PGSQL.5432"))
        self._listener.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Take no more."""
        # Wakes who waits for it.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.socket(socket.AF_UNIX)
            server.connect(self._server)
            threading.Thread(target=self._pass_on, args=[client, server], daemon=True).start()

    def _pass_on(self, client: socket.socket, server: socket.socket) -> None:
        with client, server:
            while True:
                ready, _, _ = select.select([client, server], [], [])
                for source in ready:
                    data = source.recv(65536)
                    if not data:
                        return
                    cut = source is client and self.cut_at and self.cut_at in data
                    if not cut or self.passes:
                        (server if source is client else client).sendall(data)
                    if cut:
                        return
