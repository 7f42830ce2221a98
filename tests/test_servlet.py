"""The embedded engine's servlet, in memory: statuses and replies."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from treq.testing import StubTreq
from twisted.internet.address import IPv4Address
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionDone
from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure
from twisted.web.resource import Resource
from twisted.web.server import Request

from tests.engine_kit import (
    EngineInMemory,
    EngineTestCase,
    public_line,
    signer,
)
from vmconsole import pki, refusals
from vmconsole.engine.embedded import answers, servlet
from vmconsole.engine.embedded.answers import Features, Reply, UnknownUser
from vmconsole.engine.ticket import sign_ticket
from vmconsole.errors import (
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

    def test_clock_is_set(self) -> None:
        """A ticket is judged by the time of day."""
        ticket = self.ticket(KEYS)
        self.clock.time_of_day = lambda: self.clock.seconds() + 3600
        self.assertEqual(self.request(ticket)[0], 403)
        del self.clock.time_of_day
        self.assertEqual(self.request(ticket)[0], 200)

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

    def test_keyless_users(self) -> None:
        """A user without a key is there for a client that asks for such, with an empty key; one
        with a key only once, also when the client cannot be told of the key."""
        alice, bob = self.engine.store.add_user("alice"), self.engine.store.add_user("bob")
        self.engine.store.add_keys("bob", f'from="10.0.0.0/8" {public_line("bob")}')
        empty = {"entityid": alice.id, "entity": "alice@internal", "key": ""}
        for features, expected in (
            ("", []),
            ("key_options", [bob.id]),
            ("keyless_users", [empty["entityid"]]),
            ("key_options,keyless_users", [bob.id, alice.id]),
        ):
            _, reply = self.command({**KEYS, "features": features})
            self.assertEqual([each["entityid"] for each in reply["keys"]], expected)
        self.assertEqual(reply["keys"][-1], empty)

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
        entries = self.command({**KEYS, "features": "keyless_users"})[1]["keys"]
        self.assertEqual([each["entity"] for each in entries], ["alice@internal"])
        kept = self.result(self.engine.answers.key_list(Features()))
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
