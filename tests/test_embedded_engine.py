"""The embedded engine as a whole: its service with real threads, database and socket."""

from __future__ import annotations

import socket
import sqlite3
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from typing import cast

from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater
from twisted.internet.threads import deferToThread
from twisted.logger import ILogObserver, LogEvent, Logger
from twisted.trial.unittest import TestCase

from tests.engine_kit import (
    EngineTestCase,
    all_keys,
    public_line,
    short_directory,
)
from tests.test_inventory import RecordingSource
from vmconsole import config, pki
from vmconsole.audit import Audit
from vmconsole.engine.client import EngineClient
from vmconsole.engine.embedded.listen import unix_address
from vmconsole.engine.embedded.records import Revisions
from vmconsole.engine.embedded.service import EmbeddedEngine
from vmconsole.engine.embedded.store import Store
from vmconsole.engine.http import make_engine_client
from vmconsole.errors import (
    ConfigError,
    EngineError,
    EngineUnreachable,
    StoreError,
)
from vmconsole.interfaces import Domain, DomainState


class ListenTests(EngineTestCase):
    """``engine.embedded.listen``."""

    def address(self, listen: str, directory: str = "/state") -> tuple[str, int]:
        path, mode = unix_address(
            config.Config(
                engine=config.Engine(embedded=config.EmbeddedEngine(listen=listen)),
                state=config.State(directory=directory),
            )
        )
        return str(path), mode

    def test_good(self) -> None:
        """Relative to the state directory, or absolute; for the owner only unless said."""
        for listen, expected in (
            ("unix:engine.sock:mode=600", ("/state/engine.sock", 0o600)),
            ("unix:engine.sock", ("/state/engine.sock", 0o600)),
            ("unix:address=/run/a.sock:mode=0660", ("/run/a.sock", 0o660)),
            ("unix:/run/a\\:b.sock", ("/run/a:b.sock", 0o600)),
        ):
            self.assertEqual(self.address(listen), expected)

    def test_bad(self) -> None:
        """Everything else is a ConfigError that names the setting."""
        for listen in ("", "unix", "tcp:8443", "unix:a:mode=abc", "unix:a:lockfile=0", "ssl:443"):
            error = self.assertRaises(ConfigError, self.address, listen)
            self.assertIn("engine.embedded.listen", str(error))
        error = self.assertRaises(ConfigError, self.address, "unix:engine.sock", "/x" * 60)
        self.assertIn("too long", str(error))


class ServiceTests(TestCase):
    """``EmbeddedEngine`` with its real threads, database, socket and client."""

    timeout = 60

    def setUp(self) -> None:
        self.directory = short_directory(self) / "state"
        self.config = config.Config(state=config.State(directory=str(self.directory)))
        self.source = RecordingSource()
        self.engine = EmbeddedEngine(reactor, self.config, self.source)
        self.client = self.client_of(self.engine)

    def client_of(self, engine: EmbeddedEngine) -> EngineClient:
        return make_engine_client(reactor, self.config, engine.credentials)

    def start(self, engine: EmbeddedEngine | None = None) -> None:
        engine = engine or self.engine
        engine.startService()
        self.addCleanup(engine.stopService)

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await deferLater(reactor, 0.05)

    async def in_store(self, change: Callable[[Store], object]) -> None:
        """As the command does, beside the running service."""

        def run() -> None:
            store = Store(f"sqlite:///{self.directory / 'engine.db'}")
            store.open()
            change(store)
            store.close()

        await deferToThread(run)

    async def fails(self, engine: EmbeddedEngine) -> str:
        """Why it did not start."""
        try:
            await engine.ready()
        except (EngineError, StoreError) as error:
            return str(error)
        self.fail("it started")

    async def test_first_start(self) -> None:
        """It begins at nothing; the first request waits for it, and is answered."""
        with self.assertRaises(EngineUnreachable):
            await self.client.authorized_keys()
        self.start()
        self.assertEqual(await all_keys(self.client), ())
        path = self.directory / "engine.sock"
        self.assertEqual(path.stat().st_mode & 0o777, 0o600)
        await self.until(lambda: bool(self.source.told))
        self.assertEqual(self.source.told, [("watch", "localhost", "qemu:///system")])

    async def test_whole(self) -> None:
        """A user, a key, a host and a grant, made while it runs, count within seconds."""
        self.start()
        await self.engine.ready()
        await self.until(lambda: ("watch", "localhost", "qemu:///system") in self.source.told)

        def change(store: Store) -> None:
            store.add_user("alice")
            store.add_keys("alice", public_line("alice"))
            store.add_host("node1", "test:///default")
            store.grant("alice", "web*")

        await self.in_store(change)
        [key] = await all_keys(self.client)
        await self.until(lambda: ("watch", "node1", "test:///default") in self.source.told)
        self.assertIn(("unwatch", "localhost"), self.source.told)
        observer = self.source.observer
        assert observer is not None
        observer.domains_listed("node1", [Domain("1", "web1", DomainState.RUNNING)])
        [console] = await self.client.consoles(key.user_id)
        self.assertEqual((console.vm_name, console.host), ("web1", "node1"))
        await self.in_store(lambda store: store.revoke("alice", "web*"))
        self.assertEqual(await self.client.consoles(key.user_id), ())

    async def test_stop(self) -> None:
        """After stopping there is no socket, nothing is watched, and the client is told."""
        self.engine.startService()
        await self.engine.ready()
        await self.until(lambda: bool(self.source.told))
        await self.engine.stopService()
        self.assertFalse((self.directory / "engine.sock").exists())
        self.assertEqual(self.source.told[-1], ("unwatch", "localhost"))
        self.assertIsNone(self.source.observer)
        with self.assertRaises(EngineUnreachable):
            await self.client.authorized_keys()

    async def test_stop_at_once(self) -> None:
        """It can be stopped while it starts, and before it was ever started."""
        await self.engine.stopService()
        self.engine.startService()
        await self.engine.stopService()
        self.assertFalse((self.directory / "engine.sock").exists())

    async def test_stop_while_it_looks(self) -> None:
        """A look at the database that is under way ends before the database is closed."""
        self.engine.startService()
        await self.engine.ready()
        store, events = self.engine._store, list[str]()
        revisions, close = store.revisions, store.close
        enough = threading.Event()
        self.addCleanup(enough.set)

        def slow() -> Revisions:
            events.append("look")
            enough.wait(30)
            events.append("looked")
            return revisions()

        def closing() -> None:
            events.append("close")
            close()

        self.patch(store, "revisions", slow)
        self.patch(store, "close", closing)
        await self.until(lambda: bool(events))
        stopped = self.engine.stopService()
        # Time for a stop that does not wait.
        await deferLater(reactor, 0.3)
        enough.set()
        await stopped
        self.assertEqual(events, ["look", "looked", "close"])

    async def test_changes_are_logged(self) -> None:
        """What somebody changes is an event of the audit, once; what was before is not."""
        events: list[LogEvent] = []
        audit = Audit(Logger("vmconsole.audit", observer=cast(ILogObserver, events.append)))

        def before(store: Store) -> None:
            store.add_user("bob")

        self.directory.mkdir(mode=0o700)
        await self.in_store(before)
        self.engine = EmbeddedEngine(reactor, self.config, self.source, audit)
        self.start()
        await self.engine.ready()
        await self.until(lambda: bool(self.source.told))

        def change(store: Store) -> None:
            store.add_user("alice")
            store.grant("alice", "web*", "viewer")

        await self.in_store(change)
        await self.until(lambda: len(events) >= 2)
        await self.in_store(lambda store: store.remove_user("alice"))
        await self.until(lambda: len(events) >= 3)
        self.assertEqual(
            [(each["actor"], each["action"], each["subject"]) for each in events],
            [
                ("vmconsole", "user.add", "alice"),
                ("vmconsole", "grant", "alice web* viewer"),
                ("vmconsole", "user.remove", "alice"),
            ],
        )

    async def test_again(self) -> None:
        """It can be started after it was stopped, with what it had."""
        self.engine.startService()
        first = await self.engine.ready()
        await self.in_store(lambda store: store.add_user("alice"))
        await self.engine.stopService()
        self.start()
        self.assertEqual((await self.engine.ready()).certificate, first.certificate)
        self.assertEqual([each.name for each in await all_keys(self.client)], ["alice@internal"])

    async def test_stale_socket(self) -> None:
        """The socket of a killed process is replaced."""
        self.directory.mkdir()
        left = socket.socket(socket.AF_UNIX)
        left.bind(str(self.directory / "engine.sock"))
        left.close()
        self.start()
        self.assertEqual(await all_keys(self.client), ())

    async def test_second(self) -> None:
        """A second one in the same state directory does not start; the first goes on."""
        self.start()
        await self.engine.ready()
        second = EmbeddedEngine(reactor, self.config, RecordingSource())
        self.start(second)
        self.assertIn("Another vmconsole", await self.fails(second))
        with self.assertRaises(EngineUnreachable):
            await self.client_of(second).authorized_keys()
        self.assertEqual(await all_keys(self.client), ())

    async def test_something_in_the_way(self) -> None:
        """A file that is no socket is not removed: it does not start."""
        self.directory.mkdir()
        (self.directory / "engine.sock").write_bytes(b"precious")
        self.start()
        self.assertIn("engine.sock cannot be listened on", await self.fails(self.engine))
        self.assertEqual((self.directory / "engine.sock").read_bytes(), b"precious")

    async def test_bad_database(self) -> None:
        """A database that cannot be opened: it does not start, the client says why."""
        self.directory.mkdir()
        (self.directory / "engine.db").write_bytes(b"garbage" * 1000)
        self.start()
        self.assertIn("engine.db", await self.fails(self.engine))
        with self.assertRaises(EngineUnreachable) as caught:
            await self.client.authorized_keys()
        self.assertIn("engine.db", str(caught.exception))

    async def test_database_breaks(self) -> None:
        """A database that breaks while it runs: errors, and all is well when it is whole again."""
        self.start()
        await self.engine.ready()
        await self.in_store(lambda store: store.add_user("alice"))

        def rename(source: str, target: str) -> None:
            with sqlite3.connect(self.directory / "engine.db") as connection:
                connection.execute(f"ALTER TABLE {source} RENAME TO {target}")
                connection.execute("UPDATE meta SET keys_revision = keys_revision + 1")
            connection.close()

        await deferToThread(rename, "keys", "keys_away")
        with self.assertRaises(EngineError) as caught:
            await self.client.authorized_keys()
        self.assertIn("500", str(caught.exception))
        await deferLater(reactor, 1.2)
        await deferToThread(rename, "keys_away", "keys")
        self.assertEqual([each.name for each in await all_keys(self.client)], ["alice@internal"])

    async def test_body_is_capped(self) -> None:
        """Of a body of 50 MiB nothing is kept, and it is refused."""
        self.start()
        await self.engine.ready()

        def send() -> bytes:
            peer = socket.socket(socket.AF_UNIX)
            peer.connect(str(self.directory / "engine.sock"))
            size = 50 * 1024 * 1024
            peer.sendall(
                b"POST /services/vmconsole-proxy HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
                b"Content-Length: %d\r\n\r\n" % size
            )
            for _ in range(50):
                peer.sendall(b"x" * 1024 * 1024)
            reply = b""
            while more := peer.recv(65536):
                reply += more
            peer.close()
            return reply

        reply = await deferToThread(send)
        self.assertTrue(reply.startswith(b"HTTP/1.1 500"), reply[:100])
        self.assertTrue(reply.endswith(b"\r\n\r\n"))

    async def test_other_authority(self) -> None:
        """With engine.embedded.ticket_ca, tickets of that CA are taken as well."""
        now = datetime.now(UTC)
        other = pki.make_authority("other", now)
        self.directory.mkdir(mode=0o700)
        (self.directory / "other.pem").write_bytes(other.certificate_pem())
        self.config = config.Config(
            engine=config.Engine(embedded=config.EmbeddedEngine(ticket_ca="other.pem")),
            state=self.config.state,
        )
        engine = EmbeddedEngine(reactor, self.config, self.source)
        self.start(engine)
        await engine.ready()
        self.assertEqual(await all_keys(self.client_of(engine)), ())
        identity = pki.issue(other, "proxy", "ticket", now, key_size=2048)

        async def credentials() -> pki.Identity:
            return identity

        client = make_engine_client(reactor, self.config, credentials)
        self.assertEqual(await all_keys(client), ())

    async def test_renewed_and_withdrawn(self) -> None:
        """What the old CA issued counts when it was replaced because of its age, not when its
        files were removed."""
        now = datetime.now(UTC)
        self.directory.mkdir(mode=0o700)
        old = pki.make_authority("vmconsole tickets", now, 80)
        old.save(self.directory / "ticket-ca.cer", self.directory / "ticket-ca.key")
        identities = [pki.issue(old, "proxy", "ticket", now, key_size=2048)]

        async def credentials() -> pki.Identity:
            return identities[-1]

        self.start()
        await self.engine.ready()
        client = make_engine_client(reactor, self.config, credentials)
        self.assertEqual(await all_keys(client), ())
        new = pki.Identity.load(self.directory / "ticket-ca.cer", self.directory / "ticket-ca.key")
        identities.append(pki.issue(new, "proxy", "ticket", now, key_size=2048))
        self.assertEqual(await all_keys(client), ())
        for path in self.directory.glob("ticket-ca.???"):
            path.unlink()
        await Deferred.fromCoroutine(self.engine._renew())
        while identities:
            with self.assertRaises(EngineError):
                await client.authorized_keys()
            identities.pop()
        self.assertEqual(await all_keys(self.client), ())
