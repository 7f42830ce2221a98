"""What strangers and users send on a connection must not make memory or CPU grow: each guard, and
what happens without it. test_guards_sessions.py has those of channels."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from twisted.conch.ssh import transport as conch
from twisted.conch.ssh.common import NS, getNS
from twisted.logger import globalLogPublisher

from tests.guard_kit import GuardTestCase
from tests.rawclient import (
    EXT_INFO,
    IGNORE,
    KEX_REPLY,
    SERVICE_REQUEST,
    UNIMPLEMENTED,
    USERAUTH_REQUEST,
    RawClient,
)
from vmconsole.ssh import packets, transport
from vmconsole.ssh.handshakes import ExchangeBudget
from vmconsole.ssh.transport import ConsoleTransport

MIB = 1048576


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

    def test_packets(self) -> None:
        """Packets without end."""

        def harm() -> float:
            return self.client().flood(IGNORE, NS(b""), 3000)

        self.compare(harm, 500, transport, "MORE_PACKETS_BEFORE_LOGIN", MIB)
        self.assertGreater(self.client().flood(IGNORE, NS(b""), 200), 199)

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

    def test_client_that_reads_nothing(self) -> None:
        """Messages that are answered, from a client that takes no answers: soon they are not even
        read."""

        def harm() -> float:
            client = self.user()
            client.wire.taken = False
            client.flood(15, b"", 20000)
            return client.wire.waiting

        self.compare(harm, 3 * 65536, ConsoleTransport, "pauseProducing", lambda _: None)

    def test_many_packets(self) -> None:
        """Many packets in one piece: so many are handled in one turn of the reactor, and all of
        them in the end."""

        def harm() -> float:
            client = self.user()
            heard = client.server.heard
            client.server.dataReceived(b"".join(client.sealed(IGNORE) for _ in range(1000)))
            at_once = client.server.heard - heard
            self.assertEqual(client.wire.reading, at_once == 1000)
            for _ in range(4):
                self.turn()
            self.assertEqual(client.server.heard - heard, 1000)
            self.turn()
            self.assertTrue(client.wire.reading)
            return int(at_once)

        self.compare(harm, 200, packets, "_PACKETS_A_TURN", MIB)

    def test_large_packets(self) -> None:
        """Large packets in one piece: likewise, so many bytes."""

        def harm() -> float:
            client = self.user()
            heard = client.server.heard
            large = (client.sealed(IGNORE, NS(bytes(16000))) for _ in range(100))
            client.server.dataReceived(b"".join(large))
            at_once = client.server.heard - heard
            for _ in range(40):
                self.turn()
            self.assertEqual(client.server.heard - heard, 100)
            self.assertTrue(client.wire.reading)
            return int(at_once)

        self.compare(harm, 3, packets, "_BYTES_A_TURN", 100 * MIB)

    def test_extensions(self) -> None:
        """A list of extensions, the reading of which would take time by its square."""

        def harm() -> float:
            client = self.user()
            read = getNS

            def counted(data: bytes, count: int = 1) -> Any:
                self.bytes_read += len(data)
                return read(data, count)

            self.bytes_read = 0
            undo = self.patch(conch, "getNS", counted)
            client.send(EXT_INFO, struct.pack(">L", 10000) + bytes(80000))
            undo.restore()
            self.assertFalse(client.server.ending)
            return self.bytes_read

        self.compare(
            harm, MIB, ConsoleTransport, "ssh_EXT_INFO", conch.SSHTransportBase.ssh_EXT_INFO
        )

    def test_log(self) -> None:
        """Word that the client did not understand us, again and again: the log has none of it."""
        lines: list[Any] = []
        globalLogPublisher.addObserver(lines.append)
        self.addCleanup(globalLogPublisher.removeObserver, lines.append)

        def harm() -> float:
            client = self.user()
            lines.clear()
            client.flood(UNIMPLEMENTED, bytes(4), 100)
            self.assertFalse(client.server.ending)
            return len(lines)

        stock = conch.SSHTransportBase.ssh_UNIMPLEMENTED
        self.compare(harm, 0, ConsoleTransport, "ssh_UNIMPLEMENTED", stock)
