"""Connections that are admitted, wait, are refused or dropped: what their clients see of it."""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace
from twisted.trial.unittest import SynchronousTestCase

from tests.rawclient import DISCONNECT, KEXINIT, RawClient
from tests.sshpair import ALICE_KEY, SSHPair
from tests.test_packets import ALL
from vmconsole.config import Limits
from vmconsole.errors import EngineUnreachable
from vmconsole.ssh.proxy_protocol import BehindBalancer
from vmconsole.ssh.sources import BURST
from vmconsole.ssh.transport import LAST_WORDS

VERSION = b"SSH-2.0-vmconsole\r\n"


class AdmissionTestCase(SynchronousTestCase):
    """Clients of one server."""

    limits = Limits()

    def setUp(self) -> None:
        self.pair = SSHPair(replace(ALL, limits=self.limits))
        self.pair.client_io.loseConnection()
        self.pair.flush()
        self.admission = self.pair.admission

    def client(self, address: str = "198.51.100.1") -> RawClient:
        """A client that has just connected."""
        return RawClient(
            self.pair.factory.buildProtocol(None),
            address=address,
            turn=lambda: self.pair.clock.advance(0),
        )

    def leave(self, client: RawClient) -> None:
        """The client goes."""
        client.server.connectionLost(None)

    def use_up(self, address: str = "198.51.100.1") -> None:
        """Take all the tokens of an address."""
        for _ in range(int(BURST)):
            self.leave(self.client(address))

    def said(self, client: RawClient) -> bytes:
        """What the server has said."""
        return bytes(client.wire.value())


class WaitingTests(AdmissionTestCase):
    """An address whose connections do not log in."""

    def test_held(self) -> None:
        """The next connection hears nothing until its turn comes, and is served then with what it
        has sent meanwhile."""
        self.use_up()
        client = self.client()
        client.write(b"SSH-2.0-raw\r\n")
        self.assertEqual(client.numbers(), [])
        self.assertEqual(self.said(client), b"")
        self.pair.clock.advance(0.2)
        client.read()
        self.assertEqual(client.numbers(), [KEXINIT])
        client.exchange()
        client.login(b"vmproxy", ALICE_KEY)

    def test_others(self) -> None:
        """Other addresses are served at once."""
        self.use_up()
        self.assertEqual(self.client("198.51.100.2").numbers(), [KEXINIT])

    def test_logins_cost_nothing(self) -> None:
        """However many log in from an address, the next is served at once."""
        for _ in range(3 * int(BURST)):
            self.client().start().login(b"vmproxy", ALICE_KEY)
        self.assertEqual(self.client().numbers(), [KEXINIT])
        self.assertEqual(self.admission.unauthenticated, 1)

    def test_grace_runs(self) -> None:
        """The grace period runs while a connection waits, and it ends without a word: there was
        no version yet. That its turn comes then changes nothing."""
        self.pair.factory.limits = Limits(login_grace=1.0)
        self.use_up()
        last = [self.client() for _ in range(20)][-1]
        self.pair.clock.advance(0.9)
        self.assertFalse(last.wire.disconnecting)
        self.pair.clock.advance(0.1)
        self.assertTrue(last.wire.disconnecting)
        for _ in range(45):
            self.pair.clock.advance(0.1)
        self.assertEqual((last.wire.aborted, self.admission.waiting), (False, 0))
        self.assertEqual(self.said(last), b"")
        self.pair.clock.advance(LAST_WORDS - 4.4)
        self.assertTrue(last.wire.aborted)

    def test_sent_meanwhile(self) -> None:
        """What is sent before the turn comes is bounded, and a client that goes is noticed."""
        self.use_up()
        client = self.client()
        for _ in range(100):
            if client.wire.reading:
                client.server.dataReceived(bytes(1000))
        self.assertLess(len(client.server.buf), 40000)
        self.leave(client)
        self.assertEqual((self.admission.total, self.admission.waiting), (0, 0))
        self.assertEqual(self.pair.timers(), [])


class RefusalTests(AdmissionTestCase):
    """Too many connections."""

    limits = Limits(connections=5, per_address=2)

    def refused(self, client: RawClient) -> str:
        """The sentence that a client is refused with."""
        [(number, _)] = client.received
        self.assertEqual(number, DISCONNECT)
        disconnected = client.disconnected
        assert disconnected is not None
        self.assertEqual(disconnected[0], 12)
        self.assertTrue(client.wire.disconnecting)
        return disconnected[1]

    def test_per_address(self) -> None:
        """More than ``per_address``: a DISCONNECT that says so, which ssh shows; a place that is
        free again is free for others."""
        first = self.client()
        self.client()
        self.assertEqual(
            self.refused(self.client()),
            "too many connections from your address; try again later",
        )
        self.leave(first)
        self.assertEqual(self.client().numbers(), [KEXINIT])

    def test_total(self) -> None:
        """More than ``connections`` in all."""
        for number in range(5):
            self.client(f"192.0.2.{number + 1}")
        self.assertEqual(self.refused(self.client()), "too many connections; try again later")

    def test_gone_soon(self) -> None:
        """Who is refused, and stays nevertheless, is cut off a second later: it has a place among
        those that have not logged in."""
        clients = [self.client() for _ in range(3)]
        self.pair.clock.advance(0.9)
        self.assertFalse(clients[-1].wire.aborted)
        self.pair.clock.advance(0.2)
        self.assertEqual([client.wire.aborted for client in clients], [False, False, True])

    def test_logged_in_count(self) -> None:
        """Those who are logged in count, too."""
        for _ in range(2):
            self.client().start().login(b"vmproxy", ALICE_KEY)
        self.refused(self.client())


class LastWordsTests(AdmissionTestCase):
    """How a connection is closed from here."""

    def test_half_closed(self) -> None:
        """Only our half: the other half is read, and dropped, until the client closes it. To
        close a connection with unread input would take back what was said. Who stays is cut off."""
        closed: list[str] = []
        client = self.client().start()
        client.wire.loseWriteConnection = lambda: closed.append("half")  # type: ignore[attr-defined]
        client.wire.loseConnection = lambda: closed.append("all")  # type: ignore[method-assign]
        client.send(90)
        self.assertEqual(closed, ["half"])
        self.assertTrue(client.wire.reading)
        client.server.dataReceived(bytes(100000))
        self.assertEqual(client.server.buf, b"")
        self.pair.clock.advance(LAST_WORDS)
        self.assertTrue(client.wire.aborted)


class BanTests(AdmissionTestCase):
    """``ban_after``."""

    limits = Limits(ban_after=3, ban_seconds=600.0)

    def fail(self) -> None:
        """A connection that ends without a login."""
        client = self.client().start()
        client.send(5, b"\0\0\0\x0cssh-userauth")
        self.leave(client)

    def try_to_log_in(self) -> RawClient:
        """With a good key."""
        client = self.client().start()
        try:
            client.login(b"vmproxy", ALICE_KEY)
        except AssertionError:
            pass
        return client

    def test_banned(self) -> None:
        """After so many in a row an address is turned away with a word, for so long."""
        for _ in range(3):
            self.fail()
        told = self.client().disconnected
        assert told is not None
        self.assertIn("ended without a login; try again in 10 minutes", told[1])
        self.pair.clock.advance(601)
        self.assertEqual(self.client().numbers(), [KEXINIT])

    def test_login_between(self) -> None:
        """A login makes good."""
        for _ in range(3):
            self.fail()
            self.fail()
            self.client().start().login(b"vmproxy", ALICE_KEY)
        self.assertEqual(self.client().numbers(), [KEXINIT])

    def test_engine_away(self) -> None:
        """Where the engine does not answer, it is nobody's fault."""
        self.pair.engine.error = EngineUnreachable("It does not answer.")
        for _ in range(5):
            client = self.try_to_log_in()
            self.assertIn("does not answer", client.server.tries.refusal)
            self.leave(client)
        self.pair.engine.error = None
        self.pair.clock.advance(60)
        self.assertEqual(self.client().numbers(), [KEXINIT])


class DropTests(AdmissionTestCase):
    """All places held by connections that do not log in."""

    limits = Limits(unauthenticated=4)

    def test_dropped(self) -> None:
        """One of them is cut off, with a word, once they are two seconds old."""
        clients = [self.client(f"192.0.2.{number + 1}") for number in range(4)]
        self.pair.clock.advance(1.9)
        self.assertFalse(any(client.wire.disconnecting for client in clients))
        for _ in range(5):
            self.pair.clock.advance(0.1)
        [first, *_] = clients
        self.assertTrue(first.wire.disconnecting)
        self.assertTrue(first.wire.aborted)
        first.read()
        self.assertEqual(
            first.disconnected, (12, "too many connections do not log in; try again later")
        )


class BalancerTests(AdmissionTestCase):
    """Behind ``haproxy:``."""

    limits = Limits(per_address=1)

    def through(self, header: bytes) -> RawClient:
        """A client whose balancer sends this header."""
        factory = BehindBalancer(self.pair.factory, self.pair.clock)
        wrapper: Any = factory.buildProtocol(None)  # type: ignore[arg-type]
        client = RawClient(wrapper, address="10.0.0.1")
        client.server.dataReceived(header)
        client.read()
        return client

    def test_clients_address(self) -> None:
        """Limits, audit and ``from=`` go by the address in the header."""
        header = b"PROXY TCP4 %s 10.0.0.1 4711 22\r\n"
        first = self.through(header % b"203.0.113.5")
        self.assertEqual(first.numbers(), [KEXINIT])
        self.assertEqual(first.server.wrappedProtocol.address, "203.0.113.5")
        self.assertEqual(self.through(header % b"203.0.113.6").numbers(), [KEXINIT])
        told = self.through(header % b"203.0.113.5").disconnected
        assert told is not None
        self.assertIn("from your address", told[1])

    def test_before_the_header(self) -> None:
        """Nothing is said before it is there."""
        client = self.through(b"PROXY TCP4 203.0")
        self.assertEqual(self.said(client), b"")

    def test_health_checks(self) -> None:
        """The balancer's own connections are not limited by their address."""
        for _ in range(3 * int(BURST)):
            self.assertEqual(self.through(b"PROXY UNKNOWN\r\n").numbers(), [KEXINIT])
