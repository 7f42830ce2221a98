"""What a client sends must not make memory or CPU grow: each guard, and what happens without it."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable
from typing import Any

from twisted.conch.ssh.common import NS
from twisted.trial.unittest import SynchronousTestCase

from tests.fakes import console
from tests.rawclient import (
    CHANNEL_DATA,
    CHANNEL_REQUEST,
    IGNORE,
    KEX_REPLY,
    SERVICE_REQUEST,
    USERAUTH_REQUEST,
    RawClient,
)
from tests.sshpair import ALICE, ALICE_KEY, PTY, SSHPair
from tests.test_packets import ALL
from vmconsole.ssh import packets, session
from vmconsole.ssh.handshakes import ExchangeBudget
from vmconsole.ssh.session import SessionChannel
from vmconsole.ssh.transport import ConsoleTransport

MIB = 1048576


class GuardTestCase(SynchronousTestCase):
    """``harm`` does something to a server, and tells how much it cost: with the guard little,
    without it much. So the test would notice if the guard were gone."""

    def setUp(self) -> None:
        self.pair = SSHPair(ALL)
        self.pair.engine.vms[ALICE.id] = [console("vm1")]

    def turn(self) -> None:
        """The server's reactor goes round."""
        self.pair.clock.advance(0)

    def client(self) -> RawClient:
        """A client with keys."""
        server = self.pair.factory.buildProtocol(None)
        return RawClient(server, turn=self.turn).start()

    def user(self) -> RawClient:
        """A client that is logged in."""
        return self.client().login(b"vmproxy", ALICE_KEY)

    def compare(
        self, harm: Callable[[], float], limit: float, target: Any, name: str, without: Any
    ) -> None:
        """With the guard ``harm`` is at most ``limit``; with ``target.name`` replaced by
        ``without``, more than twice as much."""
        self.assertLessEqual(harm(), limit)
        self.setUp()
        undo = self.patch(target, name, without)
        self.assertGreater(harm(), 2 * limit)
        undo.restore()
        self.flushLoggedErrors()

    def growth(self, work: Callable[[], object]) -> int:
        """Bytes that are still held after ``work``."""
        tracemalloc.start()
        try:
            work()
            return tracemalloc.get_traced_memory()[0]
        finally:
            tracemalloc.stop()


class BeforeLoginTests(GuardTestCase):
    """Strangers."""

    def test_packet(self) -> None:
        """A packet that never ends: nothing of it is kept once its length is known."""

        def harm() -> float:
            client = self.client()
            packet = client.sealed(IGNORE, NS(bytes(200000)))
            for at in range(0, 195000, 1000):
                if not client.server.ending:
                    client.server.dataReceived(packet[at : at + 1000])
            return len(client.server.buf)

        self.compare(harm, packets.MAX_PACKET_BEFORE_LOGIN, ConsoleTransport, "max_packet", MIB)

    def test_version(self) -> None:
        """A version that never ends."""

        def harm() -> float:
            client = RawClient(self.pair.factory.buildProtocol(None))
            for _ in range(1000):
                client.server.dataReceived(b"SSH-2.0-xx")
            return len(client.server.buf)

        self.compare(harm, 300, packets, "_LONGEST_VERSION", MIB)

    def test_key_queries(self) -> None:
        """Keys that are asked about without end."""
        asked = (
            USERAUTH_REQUEST,
            b"".join(
                (
                    NS(b"vmproxy"),
                    NS(b"ssh-connection"),
                    NS(b"publickey") + b"\0",
                    NS(b"ssh-ed25519"),
                    NS(NS(b"ssh-ed25519") + NS(bytes(32))),
                )
            ),
        )

        def harm() -> float:
            client = self.client()
            client.send(SERVICE_REQUEST, NS(b"ssh-userauth"))
            return client.flood(*asked, times=200)

        def no_count(auth: Any, has_signature: bool) -> None:
            pass

        auth = self.pair.factory.services[b"ssh-userauth"]
        self.compare(harm, 65, auth, "_count", no_count)

    def test_client_that_reads_nothing(self) -> None:
        """Messages that are answered, from a client that takes no answers: soon they are not even
        read."""

        def harm() -> float:
            client = self.client()
            client.wire.taken = False
            client.flood(15, b"", 10000)
            return client.wire.waiting

        self.compare(harm, 2 * 65536, ConsoleTransport, "pauseProducing", lambda _: None)

    def test_storm(self) -> None:
        """Many clients at once: so many key exchanges are computed in one turn of the reactor."""

        def harm() -> float:
            clients = []
            for _ in range(10):
                client = RawClient(self.pair.factory.buildProtocol(None))
                client.write(b"SSH-2.0-raw\r\n")
                client.send_kexinit()
                clients.append(client)
            for client in clients:
                client.send_init()
            return sum(client.numbers().count(KEX_REPLY) for client in clients)

        def at_once(handshakes: Any, exchange: Callable[[], None], logged_in: bool) -> None:
            exchange()

        self.compare(harm, 1, type(self.pair.factory.handshakes), "run", at_once)


class UserTests(GuardTestCase):
    """Users, who are no better."""

    def test_rekeys(self) -> None:
        """Key exchanges without end: after the first few, two in a second."""

        def harm() -> float:
            client = self.user()
            for _ in range(50):
                client.send_kexinit()
                client.send_init()
                if KEX_REPLY not in client.numbers():
                    break
                client.send_newkeys()
            return client.server.exchanges

        self.compare(harm, 10, ExchangeBudget, "delay", lambda budget, traffic: 0.0)

    def test_rekeys_go_on(self) -> None:
        """Whoever exchanges keys too often waits, and is served."""
        client = self.user()
        for _ in range(20):
            client.send_kexinit()
            client.send_init()
            self.pair.clock.advance(0.5)
            client.read()
            client.send_newkeys()
        self.assertEqual(client.server.exchanges, 21)

    def test_window(self) -> None:
        """A window of 4 GiB, and a client that reads nothing, on a guest that prints on and on."""

        def harm() -> float:
            client = self.user()
            channel = client.open_session(window=0xFFFFFFFF)
            client.request(channel, b"pty-req", PTY)
            client.request(channel, b"exec", NS(b"vm1"))
            self.pair.clock.advance(0.005)
            client.read()
            client.wire.taken = False
            for _ in range(64):
                self.pair.guests.guest.print(bytes(65536))
                self.pair.clock.advance(0.005)
            return client.wire.waiting

        self.compare(harm, 4 * 65536, ConsoleTransport, "pauseProducing", lambda _: None)

    def test_window_overflow(self) -> None:
        """Windows beyond 2^32 - 1 end the connection (RFC 4254, section 5.2)."""
        client = self.user()
        channel = client.open_session(window=0xFFFFFFFF)
        client.send(93, struct.pack(">LL", channel, 1))
        self.assertEqual(client.disconnected, (2, "protocol error"))

    def test_requests(self) -> None:
        """Requests that want an answer, from a client that takes none."""

        def harm() -> float:
            client = self.user()
            channel = client.open_session()
            client.wire.taken = False
            request = struct.pack(">L", channel) + NS(b"no-such-thing") + b"\x01"
            client.flood(CHANNEL_REQUEST, request, 10000)
            return client.wire.waiting

        self.compare(harm, 2 * 65536, ConsoleTransport, "pauseProducing", lambda _: None)

    def test_environment(self) -> None:
        """Variables without end: none is kept."""

        def harm() -> float:
            client = self.user()
            channel = client.open_session()

            def send() -> None:
                for number in range(100):
                    name = b"LC_%d" % number
                    client.request(channel, b"env", NS(name) + NS(bytes(30000)), reply=False)

            return self.growth(send)

        def keep(kept: SessionChannel, data: bytes) -> bool:
            kept.__dict__.setdefault("environment", []).append(bytes(data))
            return True

        self.compare(harm, MIB // 2, SessionChannel, "request_env", keep)

    def test_unknown_channels(self) -> None:
        """Data for channels that are not there: the first ends the connection, cleanly."""

        def harm() -> float:
            client = self.user()
            return client.flood(CHANNEL_DATA, struct.pack(">L", 77) + NS(b"x"), 100)

        def careless(transport: Any, error: Exception) -> None:
            pass

        self.compare(harm, 1, ConsoleTransport, "broken_packet", careless)

    def test_channel_without_a_shell(self) -> None:
        """A channel that is fed for ever, on which nothing runs: its window stays shut."""

        def harm() -> float:
            client = self.user()
            channel = client.open_session()
            data = struct.pack(">L", channel) + NS(bytes(32768))
            [opened] = client.server.service.channels.values()
            fed = 0
            while fed < 100 and opened.localWindowLeft >= 32768:
                client.send(CHANNEL_DATA, data)
                fed += 1
            return len(opened._waiting_input)

        self.compare(harm, 2 * 65536, SessionChannel, "held", False)

    def test_more_than_the_window(self) -> None:
        """A client that sends more than it may is ended."""

        def harm() -> float:
            client = self.user()
            channel = client.open_session()
            return client.flood(CHANNEL_DATA, struct.pack(">L", channel) + NS(bytes(32768)), 100)

        self.assertLessEqual(harm(), 5)
        self.assertEqual(self.flushLoggedErrors(), [])

    def test_channels(self) -> None:
        """Channels without end."""
        opening = NS(b"session") + struct.pack(">3L", 7, 1 << 20, 32768)

        def harm() -> float:
            client = self.user()
            client.flood(90, opening, 200)
            return len(client.server.service.channels)

        self.compare(
            harm,
            8,
            type(self.pair.factory.session_counts),
            "refusal",
            lambda *arguments: None,
        )

    def test_answers_during_an_exchange(self) -> None:
        """A client that never ends a key exchange and asks on: what waits for it is bounded."""

        def harm() -> float:
            client = self.user()
            client.server.sendKexInit()
            client.flood(80, NS(b"x") + b"\x01", 2000)
            return len(client.server._blocked or ())

        self.compare(harm, packets._MAX_BLOCKED + 1, packets, "_MAX_BLOCKED", 1 << 30)

    def test_input_for_a_slow_menu(self) -> None:
        """Keys that are each answered with a page, from a client that takes none of them."""

        def harm() -> float:
            self.pair.engine.vms[ALICE.id] = [console(f"vm{number}") for number in range(200)]
            client = self.user()
            channel = client.open_session(window=0)
            client.request(channel, b"pty-req", PTY)
            client.request(channel, b"shell")
            self.pair.clock.advance(0.005)
            [opened] = client.server.service.channels.values()
            for _ in range(200):
                if opened.localWindowLeft >= 1000:
                    client.send(CHANNEL_DATA, struct.pack(">L", channel) + NS(b"\r" * 1000))
            return opened._waiting_output

        self.compare(harm, session.MAX_WAITING_OUTPUT, SessionChannel, "flush", unheld)


def unheld(channel: SessionChannel) -> None:
    """A flush that pauses nobody."""
