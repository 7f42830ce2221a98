"""The embedded engine: its servlet in memory, and the whole service with its socket."""

from __future__ import annotations

import json
import socket
import sqlite3
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast
from unittest import mock

from cryptography import x509
from treq.testing import StubTreq
from twisted.internet import reactor
from twisted.internet.address import IPv4Address
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionDone
from twisted.internet.task import deferLater
from twisted.internet.testing import StringTransport
from twisted.internet.threads import deferToThread
from twisted.logger import ILogObserver, LogEvent, Logger
from twisted.python.failure import Failure
from twisted.trial.unittest import TestCase
from twisted.web.resource import Resource
from twisted.web.server import Request

from tests.engine_kit import (
    EngineInMemory,
    EngineTestCase,
    all_keys,
    public_line,
    short_directory,
    signer,
)
from tests.test_inventory import RecordingSource
from vmconsole import config, pki
from vmconsole.audit import Audit
from vmconsole.engine.client import EngineClient
from vmconsole.engine.embedded import answers, refusals, servlet
from vmconsole.engine.embedded.answers import Features, Reply, UnknownUser
from vmconsole.engine.embedded.identity import ticket_authority, ticket_identities
from vmconsole.engine.embedded.listen import unix_address
from vmconsole.engine.embedded.records import Revisions
from vmconsole.engine.embedded.service import EmbeddedEngine
from vmconsole.engine.embedded.store import Store
from vmconsole.engine.http import make_engine_client
from vmconsole.engine.ticket import sign_ticket
from vmconsole.errors import (
    ConfigError,
    EngineError,
    EngineUnreachable,
    StoreError,
    StoreUnavailable,
)
from vmconsole.interfaces import Domain, DomainState

ALL = Features(role=True, key_options=True, console_problem=True)
PATH = "http://engine/services/vmconsole-proxy"
KEYS = {"command": "public_keys", "version": 1, "key_fp": "", "key_type": "", "key_content": ""}


def _sk_line() -> str:
    """A key in hardware (PROTOCOL.u2f of OpenSSH): its type, the public point, the application."""
    fields = (b"sk-ssh-ed25519@openssh.com", b"k" * 32, b"ssh:")
    blob = b"".join(len(field).to_bytes(4, "big") + field for field in fields)
    return f"sk-ssh-ed25519@openssh.com {b64encode(blob).decode()} token"


class ServletTests(EngineTestCase):
    """Statuses and replies, as the reference has them."""

    def setUp(self) -> None:
        super().setUp()
        directory = Path(self.mktemp())
        directory.mkdir()
        self.engine = EngineInMemory(directory, self.clock)
        self.treq: Any = StubTreq(self.engine.root)
        self.salts = 0

    def ticket(self, command: object, usage: pki.Usage = "ticket") -> bytes:
        self.salts += 1
        text = command if isinstance(command, str) else json.dumps(command)
        now = datetime.fromtimestamp(self.clock.seconds(), UTC)
        return sign_ticket(text, signer(usage), now, self.salts.to_bytes(8, "big"))

    def request(
        self, body: bytes, method: str = "POST", url: str = PATH
    ) -> tuple[int, bytes, dict[str, Any]]:
        response = self.successResultOf(self.treq.request(method, url, data=body))
        headers = {
            name.decode().lower(): values for name, values in response.headers.getAllRawHeaders()
        }
        return response.code, self.successResultOf(self.treq.content(response)), headers

    def command(self, command: object) -> tuple[int, Any]:
        """Status and reply to a signed command; no reply has an empty body."""
        status, body, _ = self.request(self.ticket(command))
        return status, json.loads(body) if body else None

    def test_methods(self) -> None:
        """405 with Allow for everything but POST."""
        for method in ("GET", "HEAD", "PUT", "DELETE", "OPTIONS"):
            status, body, headers = self.request(b"", method)
            self.assertEqual((status, body, headers["allow"]), (405, b"", [b"POST"]), method)

    def test_paths(self) -> None:
        """At the root and below /ovirt-engine; nothing elsewhere."""
        for url, status in (
            (PATH, 200),
            ("http://engine/ovirt-engine/services/vmconsole-proxy", 200),
            ("http://engine/", 404),
            ("http://engine/x/services/vmconsole-proxy", 404),
            ("http://engine/services", 404),
            ("http://engine/ovirt-engine/services/other", 404),
        ):
            self.assertEqual(self.request(self.ticket(KEYS), url=url)[0], status, url)

    def test_refusals(self) -> None:
        """403 for a ticket that proves nothing, 500 for none; both with empty bodies, logged."""
        for body, status in (
            (self.ticket(KEYS, "client"), 403),
            (b"", 500),
            (b"garbage", 500),
            (b"x" * 100000, 500),
        ):
            self.assertEqual(self.request(body)[:2], (status, b""))
        again = self.ticket(KEYS)
        self.assertEqual(self.request(again)[0], 200)
        self.assertEqual(self.request(again)[:2], (403, b""))
        self.assertEqual(len(self.logged("Refused a ticket")), 2)
        # Two are no base64, or nothing, which is the same, and one is too large.
        self.assertEqual(len(self.logged("Failed on a request")), 2)

    def salted(self, size: int) -> bytes:
        """What anybody can send: of no signer, with a salt of this size."""
        now = datetime.fromtimestamp(self.clock.seconds(), UTC)
        return sign_ticket("", signer("client"), now, b"x" * size)

    def test_refusals_are_counted(self) -> None:
        """However many are refused for one reason, one line in ten seconds tells how many; and
        after a pause the next one is told at once."""
        line = "Refused a ticket: The salt has 7 bytes, not 8"
        for seconds, requests, lines in (
            (0.0, 1, [f"{line}."]),
            (0.0, 20, []),
            (9.0, 21, []),
            (1.0, 2, [f"{line}, and 41 more like it"]),
            (9.9, 1, []),
            (100.0, 1, [f"{line}, and 2 more like it"]),
            (10.0, 1, [f"{line}."]),
            # Somebody set the clock back.
            (-3600.0, 1, [f"{line}."]),
        ):
            self.events.clear()
            self.clock.rightNow += seconds
            for _ in range(requests):
                self.assertEqual(self.request(self.salted(7))[0], 403)
            self.assertEqual(self.logged(""), lines)

    def test_refusals_apart(self) -> None:
        """Other reasons have lines of their own, and so have other statuses."""
        self.fail_reading(StoreUnavailable("The database is gone."))
        for _ in range(3):
            self.request(self.salted(7))
            self.request(self.salted(9))
            self.request(b"garbage")
            self.request(self.ticket(KEYS))
        self.assertEqual(len(self.logged("")), 4)
        self.clock.advance(10)
        self.request(self.ticket(KEYS))
        self.assertEqual(
            self.logged("gone"),
            [
                "There is no answer now: The database is gone.",
                "There is no answer now: The database is gone, and 2 more like it",
            ],
        )

    def test_many_reasons(self) -> None:
        """Of too many reasons the others are told in one line; and those that are over make room,
        so that nothing is remembered for ever."""
        self.patch(refusals, "_KINDS", 3)
        sizes = [size for size in range(20) if size != 8]
        for size in sizes:
            self.request(self.salted(size))
        self.assertEqual(len(self.logged("The salt has")), 4)
        self.clock.advance(9)
        self.request(self.salted(19))
        self.request(self.salted(0))
        self.assertEqual(len(self.logged("The salt has")), 4)
        self.clock.advance(1)
        self.events.clear()
        for size in reversed(sizes):
            self.request(self.salted(size))
        self.assertEqual(
            self.logged(""),
            [
                *(f"Refused a ticket: The salt has {size} bytes, not 8." for size in (19, 18, 17)),
                "Refused a ticket: The salt has 16 bytes, not 8, and 16 more, for many reasons",
            ],
        )

    def test_large_body(self) -> None:
        """Of a large body no more is kept than shows that it is too large."""
        sizes: list[int] = []

        class Probe(Resource):
            isLeaf = True

            def render(self, request: Request) -> bytes:
                assert request.content is not None
                sizes.append(len(request.content.read()))
                return b""

        site = self.engine.site
        site.resource = Probe()
        peer = site.buildProtocol(IPv4Address("TCP", "127.0.0.1", 1))
        assert peer is not None
        peer.makeConnection(StringTransport())
        peer.dataReceived(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n")
        for _ in range(10):
            peer.dataReceived(b"x" * 100000)
        peer.connectionLost(Failure(ConnectionDone()))
        self.assertEqual(sizes, [65537])

    def test_key_list(self) -> None:
        """Exactly the reply of the real Engine: all values are strings."""
        self.assertEqual(
            self.command(KEYS), (200, {"version": "1", "content": "key_list", "keys": []})
        )
        user = self.engine.store.add_user("alice")
        self.engine.store.add_user("bob")
        self.engine.store.add_keys("alice", f"restrict {public_line('alice')}")
        status, body, headers = self.request(self.ticket(KEYS))
        self.assertEqual(status, 200)
        self.assertEqual(headers["content-type"], [b"application/json"])
        entry = {"entityid": user.id, "entity": "alice@internal", "key": public_line("alice")}
        self.assertEqual(json.loads(body), {"version": "1", "content": "key_list", "keys": [entry]})

    def test_console_list(self) -> None:
        """Exactly the reply of the real Engine, by id; a name may be anything."""
        user = self.engine.store.add_user("alice")
        self.engine.store.grant("alice", "*")
        self.engine.inventory.domains_listed(
            "node1",
            [Domain("b", 'ä"\x1b', DomainState.RUNNING), Domain("a", "z", DomainState.RUNNING)],
        )
        command = {"command": "available_consoles", "version": "1", "user_id": user.id.upper()}
        entries = [
            {"vmid": "a", "vmname": "z", "host": "node1", "console": "default"},
            {"vmid": "b", "vmname": 'ä"\x1b', "host": "node1", "console": "default"},
        ]
        self.assertEqual(
            self.command(command),
            (200, {"version": "1", "content": "console_list", "consoles": entries}),
        )

    def test_roles(self) -> None:
        """Who may only watch is told so if the client knows what that means; else of nothing, since
        the client would let them type."""
        user = self.engine.store.add_user("alice")
        self.engine.store.add_group("ops")
        self.engine.store.add_member("ops", "alice")
        self.engine.store.grant("@ops", "*", "viewer")
        self.engine.store.grant("alice", "web", "operator")
        self.engine.inventory.domains_listed(
            "node1",
            [Domain("1", "web", DomainState.RUNNING), Domain("2", "db", DomainState.RUNNING)],
        )
        command = {"command": "available_consoles", "version": 1, "user_id": user.id}
        web = {"vmid": "1", "vmname": "web", "host": "node1", "console": "default"}
        for features in ({}, {"features": ""}, {"features": "key_options,roles"}):
            _, reply = self.command({**command, **features})
            self.assertEqual(reply["consoles"], [web])
        db = {"vmid": "2", "vmname": "db", "host": "node1", "console": "default"}
        _, reply = self.command({**command, "features": "x, role"})
        self.assertEqual(reply["consoles"], [web, {**db, "role": "viewer"}])

    def test_problems(self) -> None:
        """Why a console cannot be opened is told to a client that asks; the VM is listed anyway."""
        user = self.engine.store.add_user("alice")
        self.engine.store.grant("alice", "*", "viewer")
        self.engine.inventory.domains_listed(
            "node1", [Domain("1", "web", DomainState.RUNNING, 'has "none"')]
        )
        command = {"command": "available_consoles", "version": 1, "user_id": user.id}
        _, reply = self.command({**command, "features": "role"})
        self.assertNotIn("problem", reply["consoles"][0])
        _, reply = self.command({**command, "features": "role,console_problem"})
        self.assertEqual(reply["consoles"][0]["problem"], 'has "none"')
        self.assertEqual(reply["consoles"][0]["role"], "viewer")

    def test_key_options(self) -> None:
        """A key with options, or of a type that others cannot read, is there for a client that
        knows of options alone; its options stand in a field of their own, and the key is bare."""
        self.engine.store.add_user("alice")
        bare, restricted = public_line("alice"), public_line("at home")
        hardware = _sk_line()
        for line in (f"restrict {bare}", f'from="10.0.0.0/8" {restricted}', hardware):
            self.engine.store.add_keys("alice", line)

        def keys(**more: str) -> list[tuple[str, str | None]]:
            _, reply = self.command({**KEYS, **more})
            return sorted((each["key"], each.get("options")) for each in reply["keys"])

        self.assertEqual(keys(), [(bare, None)])
        self.assertEqual(keys(features="role,console_problem"), [(bare, None)])
        self.assertEqual(
            keys(features="role,key_options"),
            sorted([(bare, None), (restricted, 'from="10.0.0.0/8"'), (hardware, None)], key=str),
        )

    def test_user_ids(self) -> None:
        """A user id that is none: an empty list; one of nobody: 500."""
        command: dict[str, object] = {"command": "available_consoles", "version": 1}
        empty = {"version": "1", "content": "console_list", "consoles": []}
        for user_id in ("", "alice", "1234", 7, None):
            self.assertEqual(self.command({**command, "user_id": user_id}), (200, empty))
        self.assertEqual(self.command(command), (200, empty))
        nobody = "11111111-2222-3333-4444-555555555555"
        self.assertEqual(self.command({**command, "user_id": nobody}), (500, None))

    def test_commands(self) -> None:
        """Version 1 as number or string, extra keys are ignored; anything else is a 500."""
        for version in (1, "1"):
            command = {"command": "public_keys", "version": version, "features": "role"}
            self.assertEqual(self.command(command)[0], 200)
        bad_commands: tuple[object, ...] = (
            {},
            [],
            "garbage",
            "\x00",
            "[" * 10000,
            {"command": "public_keys"},
            {"command": "public_keys", "version": 2},
            {"command": "public_keys", "version": "1.0"},
            {"command": "public_keys", "version": 1.0},
            {"command": "public_keys", "version": True},
            {"command": "public_keys", "version": None},
            {"command": "public_keys", "version": [1]},
            {"command": "public_keys", "version": 1, "extra": {}},
            {"command": "shutdown\n", "version": 1},
            {"version": 1},
        )
        for bad in bad_commands:
            self.assertEqual(self.command(bad), (500, None), bad)
        self.assertEqual(len(self.logged("Unknown command shutdown\\n")), 1)

    def test_changes_count_at_once(self) -> None:
        """What another process writes is in the next reply, and an unchanged reply is kept."""
        kept = self.result(self.engine.answers.key_list(Features()))
        self.assertIs(self.result(self.engine.answers.key_list(Features())), kept)
        self.engine.store.add_user("alice")
        self.engine.store.grant("alice", "*")
        self.assertIs(self.result(self.engine.answers.key_list(Features())), kept)
        [key] = self.engine.store.add_keys("alice", public_line("alice"))
        self.assertEqual(len(self.command(KEYS)[1]["keys"]), 1)
        self.engine.store.remove_key(key.fingerprint)
        self.assertEqual(len(self.command(KEYS)[1]["keys"]), 0)

    def consoles(self, user_id: str, features: Features = ALL) -> Reply:
        return self.result(self.engine.answers.console_list(user_id, features))

    def test_console_lists_are_kept(self) -> None:
        """The same list serves until the user's grants or the VMs change, for each kind of client
        apart."""
        alice, bob = self.engine.store.add_user("alice"), self.engine.store.add_user("bob")
        self.engine.store.grant("alice", "*", "viewer")
        self.engine.inventory.domains_listed("node1", [Domain("1", "web", DomainState.RUNNING)])
        kept = self.consoles(alice.id)
        plain = self.consoles(alice.id, Features())
        self.assertIn(b"web", b"".join(kept))
        self.assertNotIn(b"web", b"".join(plain))
        self.engine.store.grant("bob", "*")
        self.assertIs(self.consoles(alice.id), kept)
        self.assertIn(b"web", b"".join(self.consoles(bob.id)))
        self.engine.inventory.domain_changed("node1", Domain("1", "db", DomainState.RUNNING))
        self.assertIn(b'"db"', b"".join(self.consoles(alice.id)))
        self.engine.store.revoke("alice", "*")
        self.assertNotIn(b"db", b"".join(self.consoles(alice.id)))
        self.engine.store.remove_user("alice")
        self.failure(self.engine.answers.console_list(alice.id, ALL), UnknownUser)
        self.assertNotIn((alice.id, ALL), self.engine.answers._consoles)

    def test_console_lists_are_made_once(self) -> None:
        """Many who ask at the same time after a change wait for one list."""
        alice = self.engine.store.add_user("alice")
        self.engine.store.grant("alice", "*")
        self.engine.inventory.domains_listed("node1", [Domain("1", "web", DomainState.RUNNING)])
        made: list[Deferred[None]] = []
        make = self.engine.answers._make_console_list

        async def slow(*arguments: Any) -> Reply:
            made.append(Deferred())
            await made[-1]
            return await make(*arguments)

        self.patch(self.engine.answers, "_make_console_list", slow)
        asked = [
            Deferred.fromCoroutine(self.engine.answers.console_list(alice.id, ALL))
            for _ in range(8)
        ]
        self.assertEqual(len(made), 1)
        # A change in the meantime is not lost: the list that was begun is not that of later ones.
        self.engine.inventory.domain_changed("node1", Domain("1", "db", DomainState.RUNNING))
        made[0].callback(None)
        self.successResultOf(asked[0])
        self.assertEqual(len(made), 2)
        made[1].callback(None)
        replies = [self.successResultOf(each) for each in asked[1:]]
        self.assertEqual({id(reply) for reply in replies}, {id(replies[0])})
        self.assertIn(b'"db"', b"".join(replies[0]))
        self.assertEqual(len(made), 2)

    def test_console_lists_are_bounded(self) -> None:
        """Of the lists that are kept, those that were used last stay."""
        self.patch(answers, "_KEPT", 4000)
        self.engine.inventory.domains_listed(
            "node1", [Domain(str(n), f"vm{n}", DomainState.RUNNING) for n in range(10)]
        )
        ids = []
        for name in ("a", "b", "c"):
            ids.append(self.engine.store.add_user(name).id)
            self.engine.store.grant(name, "*")
        a, b, c = ids
        first = self.consoles(a)
        self.consoles(b)
        self.assertIs(self.consoles(a), first)
        self.consoles(c)
        self.assertIs(self.consoles(a), first)
        self.assertLessEqual(self.engine.answers._kept, 4000)
        self.assertEqual(len(self.engine.answers._consoles), 2)

    def test_read_once(self) -> None:
        """Who asks for keys while they are being read waits, and gets what holds then."""
        reads: list[Callable[[], None]] = []

        def later(function: Callable[[], Any]) -> Deferred[Any]:
            answer: Deferred[Any] = Deferred()
            reads.append(lambda: answer.callback(function()))
            return answer

        self.engine.answers._in_thread = later
        first = Deferred.fromCoroutine(self.engine.answers.key_list(ALL))
        second = Deferred.fromCoroutine(self.engine.answers.key_list(ALL))
        self.assertEqual(len(reads), 1)
        reads[0]()
        self.assertNotIn(b"alice", b"".join(self.successResultOf(first)))
        self.engine.store.add_user("alice")
        self.engine.store.add_keys("alice", public_line("alice"))
        reads[1]()
        self.assertIn(b"alice", b"".join(self.successResultOf(second)))

    def fail_reading(self, error: Exception) -> None:
        def fail(*arguments: object) -> None:
            raise error

        self.engine.store.read_keys = fail  # type: ignore[method-assign, assignment]

    def test_database_fails(self) -> None:
        """A database that fails is a 500 with a line in the log, and no traceback; and the next
        question is asked all the same."""
        read = self.engine.store.read_keys
        self.fail_reading(StoreError("The database is broken."))
        self.assertEqual(self.command(KEYS), (500, None))
        self.assertEqual(self.logged("broken"), ["Failed on a request: The database is broken."])
        self.engine.store.read_keys = read  # type: ignore[method-assign]
        self.assertEqual(self.command(KEYS)[0], 200)

    def test_database_away(self) -> None:
        """One that is away for a while is a 503: clients go by what they know."""
        self.fail_reading(StoreUnavailable("The database is gone."))
        self.assertEqual(self.command(KEYS), (503, None))
        self.assertEqual(self.logged("gone"), ["There is no answer now: The database is gone."])

    def test_database_hangs(self) -> None:
        """When too many questions wait for it, the next ones are a 503 at once."""
        self.patch(servlet, "_ASKING", 3)
        waiting: list[Deferred[Any]] = []

        def never(function: Callable[[], Any]) -> Deferred[Any]:
            waiting.append(Deferred())
            return waiting[-1]

        self.engine.answers._in_thread = never
        for _ in range(3):
            self.treq.request("POST", PATH, data=self.ticket(KEYS))
        self.assertEqual(self.command(KEYS), (503, None))
        self.assertEqual(len(waiting), 1)

    def test_mistake_of_ours(self) -> None:
        """A mistake of ours is a 500, with a traceback in the log."""
        self.fail_reading(ZeroDivisionError("oops"))
        self.assertEqual(self.command(KEYS), (500, None))
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)


class ReplyTests(EngineTestCase):
    """How a long reply is written."""

    def setUp(self) -> None:
        super().setUp()
        directory = Path(self.mktemp())
        directory.mkdir()
        self.engine = EngineInMemory(directory, self.clock)
        self.engine.answers.key_list = self.pieces  # type: ignore[method-assign]
        self.transport = StringTransport()
        peer = self.engine.site.buildProtocol(IPv4Address("TCP", "127.0.0.1", 1))
        assert peer is not None
        self.peer: Any = peer
        self.peer.makeConnection(self.transport)
        self.taken = 0

    async def pieces(self, features: Features) -> Any:
        class Pieces(tuple[bytes, ...]):
            def __iter__(pieces) -> Iterator[bytes]:
                for piece in tuple.__iter__(pieces):
                    self.taken += 1
                    yield piece

        return Pieces([b"x" * 1000] * 10)

    def ask(self) -> None:
        now = datetime.fromtimestamp(self.clock.seconds(), UTC)
        body = sign_ticket(json.dumps(KEYS), signer(), now, b"12345678")
        self.peer.dataReceived(
            b"POST /services/vmconsole-proxy HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
            % len(body)
            + body
        )

    def test_pace(self) -> None:
        """When the client reads no more, nothing more is written until it does."""
        write, limit = self.transport.write, 3000

        def bounded(data: bytes) -> None:
            write(data)
            if len(self.transport.value()) > limit and self.transport.producer:
                self.transport.producer.pauseProducing()

        self.transport.write = bounded  # type: ignore[method-assign]
        self.ask()
        self.assertLess(len(self.transport.value()), 4500)
        limit = 10**6
        self.transport.producer.resumeProducing()
        head, _, body = self.transport.value().partition(b"\r\n\r\n")
        self.assertIn(b"Content-Length: 10000", head)
        self.assertNotIn(b"Server", head)
        self.assertEqual(body, b"x" * 10000)

    def test_gone(self) -> None:
        """When the client goes in the middle, no more is written, and nothing is logged."""
        write = self.transport.write

        def bounded(data: bytes) -> None:
            write(data)
            if self.transport.producer:
                self.transport.producer.pauseProducing()

        self.transport.write = bounded  # type: ignore[method-assign]
        self.ask()
        self.peer.connectionLost(Failure(ConnectionDone()))
        size = len(self.transport.value())
        self.assertLess(size, 3000)
        self.assertEqual(self.flushLoggedErrors(), [])


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


class IdentityTests(EngineTestCase):
    """What is made at first start."""

    def setUp(self) -> None:
        super().setUp()
        self.directory = Path(self.mktemp())
        self.now = datetime.fromtimestamp(self.clock.seconds(), UTC)
        self.made = ticket_identities(self.directory, self.now)

    def again(self, days: int = 0) -> tuple[bool, bool]:
        """Whether the CA and the certificate are the same when read again, and fit."""
        now = self.now + timedelta(days=days)
        read = ticket_identities(self.directory, now)
        self.assertTrue(read.authority.is_pair() and read.proxy.is_pair())
        self.assertTrue(pki.issued_by(read.proxy.certificate, read.authority.certificate))
        return (
            read.authority.certificate == self.made.authority.certificate,
            read.proxy.certificate == self.made.proxy.certificate,
        )

    def test_kept(self) -> None:
        """Made once, in a private directory, with private keys."""
        self.assertEqual(self.again(), (True, True))
        self.assertEqual(self.directory.stat().st_mode & 0o777, 0o700)
        for name in ("ticket-ca.key", "ticket.key"):
            self.assertEqual((self.directory / name).stat().st_mode & 0o777, 0o600)

    def test_healed(self) -> None:
        """What a killed first start left half is made again, and our proxy's pair always."""
        other = signer()
        for name, spoil, expected in (
            ("ticket.cer", lambda whole: whole[: len(whole) // 2], (True, False)),
            ("ticket.cer", lambda whole: other.certificate_pem(), (True, False)),
            ("ticket.key", lambda whole: other.key_pem(), (True, False)),
            ("ticket.key", lambda whole: b"", (True, False)),
            ("ticket-ca.cer", None, (False, False)),
        ):
            self.made = ticket_identities(self.directory, self.now)
            path = self.directory / name
            whole = path.read_bytes()
            path.unlink()
            if spoil is not None:
                path.write_bytes(spoil(whole))
            self.assertEqual(self.again(), expected, name)

    def test_renewed(self) -> None:
        """A certificate that ends within 90 days is made anew, by the same CA."""
        self.assertEqual(self.again(825 - 91), (True, True))
        self.assertEqual(self.again(825 - 89), (True, False))
        self.assertEqual(self.again(3650 - 89), (False, False))

    def former(self, days: int) -> list[x509.Certificate]:
        """Which replaced CAs are trusted then."""
        return list(ticket_identities(self.directory, self.now + timedelta(days=days)).former)

    def test_damaged_authority(self) -> None:
        """Is never replaced silently: what it issued, on other machines, would be void."""
        other = signer()
        for name, content, words in (
            ("ticket-ca.key", None, "ticket-ca.key is missing"),
            ("ticket-ca.key", b"", "ticket-ca.key is damaged"),
            ("ticket-ca.key", other.key_pem(), "ticket-ca.key is not the key of"),
            ("ticket-ca.cer", b"", "ticket-ca.cer is damaged"),
            ("ticket-ca.cer", b"garbage", "ticket-ca.cer is damaged"),
        ):
            path = self.directory / name
            whole = path.read_bytes()
            path.unlink()
            if content is not None:
                path.write_bytes(content)
            for make in (ticket_identities, ticket_authority):
                error = str(self.assertRaises(EngineError, make, self.directory, self.now))
                self.assertIn(words, error)
                self.assertIn("restore it, or remove both files", error)
                self.assertIn("vmconsole pki ticket --renew", error)
            self.assertEqual(path.read_bytes() if path.exists() else None, content)
            path.write_bytes(whole)
            self.assertEqual(self.again(), (True, True))

    def test_former(self) -> None:
        """A CA that was replaced because it ended soon is trusted to its end, also after a
        restart."""
        self.assertEqual(self.former(0), [])
        old = self.made.authority.certificate
        for days in (3650 - 89, 3650 - 1):
            self.assertEqual(self.former(days), [old])
        mode = (self.directory / "ticket-ca.former.cer").stat().st_mode & 0o777
        self.assertEqual(mode, 0o644)
        self.assertEqual(self.former(3651), [])

    def test_withdrawn(self) -> None:
        """A CA whose files somebody removed is not trusted any more, nor one before it."""
        self.assertEqual(len(self.former(3650 - 89)), 1)
        for name in ("ticket-ca.cer", "ticket-ca.key"):
            (self.directory / name).unlink()
        self.assertEqual(self.former(3650 - 88), [])
        self.assertEqual(self.former(3650 - 88), [])

    def test_damaged_former(self) -> None:
        """Is in nobody's way."""
        (self.directory / "ticket-ca.former.cer").write_bytes(b"garbage")
        self.assertEqual(self.former(0), [])
        self.assertEqual(len(self.logged("ticket-ca.former.cer is damaged")), 1)

    def test_killed_renewal(self) -> None:
        """Killed between the new CA's key and certificate, it begins again; the old is trusted."""
        write = pki.write_public

        def killed(path: Path, content: bytes) -> None:
            if path.name == "ticket-ca.cer":
                raise KeyboardInterrupt
            write(path, content)

        with mock.patch.object(pki, "write_public", killed):
            self.assertRaises(KeyboardInterrupt, self.former, 3650 - 89)
        self.assertEqual(self.former(3650 - 89), [self.made.authority.certificate])
        self.assertEqual(self.again(3650 - 89), (False, False))

    def test_beside(self) -> None:
        """Who works beside the service takes its CA as it is, and makes one only where none is."""
        later = self.now + timedelta(days=3650 - 1)
        self.assertEqual(
            ticket_authority(self.directory, later).certificate, self.made.authority.certificate
        )
        new = self.directory.with_name("new")
        made = ticket_authority(new, self.now)
        self.assertEqual(ticket_identities(new, self.now).authority.certificate, made.certificate)

    def test_at_the_same_time(self) -> None:
        """Who comes while another one makes the CA waits, and takes that one."""
        new = self.directory.with_name("raced")
        make, made = pki.make_authority, list[pki.Identity]()

        def slow(*arguments: Any) -> pki.Identity:
            time.sleep(0.3)
            return make(*arguments)

        with mock.patch.object(pki, "make_authority", slow):
            threads = [
                threading.Thread(target=lambda: made.append(ticket_authority(new, self.now)))
                for _ in range(2)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        self.assertEqual(made[0].certificate, made[1].certificate)

    def test_lock_is_no_link(self) -> None:
        """A link in the lock's place is not followed."""
        target = self.directory.with_name("target")
        target.touch()
        (self.directory / "ticket-ca.lock").unlink()
        (self.directory / "ticket-ca.lock").symlink_to(target.absolute())
        self.assertRaises(EngineError, ticket_identities, self.directory, self.now)

    def test_unwritable(self) -> None:
        """A state directory that cannot be is an EngineError that names it."""
        self.directory.with_name("file").write_bytes(b"")
        below = self.directory.with_name("file") / "state"
        error = self.assertRaises(EngineError, ticket_identities, below, self.now)
        self.assertIn(str(below), str(error))


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

        def slow() -> Revisions:
            events.append("look")
            time.sleep(0.5)
            events.append("looked")
            return revisions()

        def closing() -> None:
            events.append("close")
            close()

        self.patch(store, "revisions", slow)
        self.patch(store, "close", closing)
        await self.until(lambda: bool(events))
        await self.engine.stopService()
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
        self.assertEqual(await all_keys(self.client), ())

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
        self.assertEqual(await all_keys(self.client), ())

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
