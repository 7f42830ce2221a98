"""The ports: paused, one connection a turn, and behind a balancer. On a reactor of their own,
which the test turns, with real sockets."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from twisted.internet.address import IPv4Address, IPv6Address, UNIXAddress
from twisted.internet.defer import succeed
from twisted.internet.endpoints import AdoptedStreamServerEndpoint
from twisted.internet.epollreactor import EPollReactor
from twisted.internet.error import CannotListenError
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.testing import StringTransport
from twisted.logger import Logger, capturedLogs, formatEvent
from twisted.trial.unittest import SynchronousTestCase

from tests.fakes import Events
from tests.sshpair import SSHPair
from tests.test_packets import ALL
from vmconsole.errors import ConfigError
from vmconsole.ssh.ports import Ports, SSHPort, make_port
from vmconsole.ssh.proxy_protocol import (
    BadHeader,
    BehindBalancer,
    Client,
    read_header,
    when_known,
)

SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"


def v2(command: int, family: int, body: bytes) -> bytes:
    """A header of version 2."""
    return SIGNATURE + struct.pack(">BBH", command, family, len(body)) + body


V2_TCP4 = v2(0x21, 0x11, bytes([192, 0, 2, 7, 10, 0, 0, 1]) + struct.pack(">HH", 4711, 2222))
V2_TCP6 = v2(
    0x21,
    0x21,
    socket.inet_pton(socket.AF_INET6, "2001:db8::7") + bytes(16) + struct.pack(">HH", 4711, 2222),
)


class Server(Protocol):
    """What is behind the port: notes what it gets, and who its client is."""

    def __init__(self) -> None:
        self.got = b""
        self.clients: list[Client] = []
        self.lost = False

    def connectionMade(self) -> None:
        when_known(self.transport, self.clients.append)

    def dataReceived(self, data: bytes) -> None:
        self.got += data

    def connectionLost(self, reason: Any = None) -> None:
        self.lost = True


class Servers(Factory):
    """Those that were built."""

    noisy = False

    def __init__(self) -> None:
        self.built: list[Server] = []
        self.running = 0

    def doStart(self) -> None:
        self.running += 1

    def doStop(self) -> None:
        self.running -= 1

    def buildProtocol(self, addr: object) -> Server:
        self.built.append(Server())
        return self.built[-1]


class PortTestCase(SynchronousTestCase):
    """Ports on a reactor that the test turns."""

    def setUp(self) -> None:
        self.reactor: Any = EPollReactor()
        self.addCleanup(self.close_reactor)
        self.sockets = ExitStack()
        self.addCleanup(self.sockets.close)
        self.servers = Servers()
        self.ports = Ports()

    def close_reactor(self) -> None:
        """It has descriptors of its own."""
        self.stop()
        for reader in self.reactor.removeAll():
            reader.connectionLost(None)
        for reader in list(self.reactor._internalReaders):
            self.reactor.removeReader(reader)
            reader.connectionLost(None)
        self.reactor._poller.close()

    def turn(self, times: int = 1) -> None:
        """What is due happens, and no more."""
        for _ in range(times):
            self.reactor.runUntilCurrent()
            self.reactor.doIteration(0)

    def listen(self, description: str = "tcp:0:interface=127.0.0.1") -> SSHPort:
        """A port that listens."""
        port = make_port(self.reactor, description, self.servers)
        self.start(port)
        return port

    def start(self, port: SSHPort) -> None:
        """Open it."""
        port.setServiceParent(self.ports)
        if not self.ports.running:
            self.ports.privilegedStartService()
            self.ports.startService()

    def stop(self) -> None:
        """Close all of them."""
        if self.ports.running:
            stopped = self.ports.stopService()
            self.turn(2)
            self.successResultOf(stopped)

    def connect(self, port: SSHPort, count: int = 1) -> list[socket.socket]:
        """So many connections, in the kernel's backlog."""
        assert port._port is not None
        address = port._port.getHost()
        return [
            self.sockets.enter_context(socket.create_connection((address.host, address.port)))
            for _ in range(count)
        ]


class ServerTests(PortTestCase):
    """The ssh server itself behind a port."""

    def setUp(self) -> None:
        super().setUp()
        self.pair = SSHPair(ALL)
        self.pair.factory.clock = self.reactor
        self.servers: Any = self.pair.factory

    def test_unix_socket(self) -> None:
        """A unix socket, which knows no TCP options, is served like any other."""
        path = Path(self.mktemp())
        self.listen(f"unix:{path}")
        client = self.sockets.enter_context(socket.socket(socket.AF_UNIX))
        client.connect(str(path))
        self.turn(3)
        self.assertTrue(client.recv(100).startswith(b"SSH-2.0-vmconsole\r\n"))

    def test_keystrokes_are_not_gathered(self) -> None:
        """A TCP connection is set up for small messages, and for clients that vanish."""
        port = self.listen()
        self.connect(port)
        self.turn(3)
        *_, entry = self.pair.admission._unauthenticated
        transport = entry.evict.__self__.transport  # type: ignore[attr-defined]
        self.assertTrue(transport.getTcpNoDelay())
        self.assertTrue(transport.getTcpKeepAlive())

    def test_dropped(self) -> None:
        """A client that is dropped for others gets its words, and its place is free at once."""
        port = self.listen()
        before = self.pair.admission.total
        [client] = self.connect(port)
        self.turn(3)
        self.assertEqual(self.pair.admission.total, before + 1)
        *_, entry = self.pair.admission._unauthenticated
        self.reactor.callLater(0, entry.evict, "away")
        self.turn(3)
        self.assertIn(b"away", client.recv(10000))
        self.assertEqual(self.pair.admission.total, before)


class PauseTests(PortTestCase):
    """Pausing and resuming, for each kind of port."""

    def adopted(self) -> SSHPort:
        """A port as systemd hands it over."""
        listening = self.sockets.enter_context(socket.create_server(("127.0.0.1", 0)))
        endpoint = AdoptedStreamServerEndpoint(
            self.reactor, os.dup(listening.fileno()), socket.AF_INET
        )
        port = SSHPort(endpoint, self.servers)
        self.start(port)
        return port

    def opened(self) -> Iterator[SSHPort]:
        """A port of each kind."""
        yield self.listen()
        yield self.adopted()
        yield self.listen("haproxy:tcp:0:interface=127.0.0.1")

    def test_paused_and_resumed(self) -> None:
        """While a port is paused the kernel has the connections; then they are accepted."""
        for port in self.opened():
            self.servers.built.clear()
            self.ports.pause()
            self.connect(port, 3)
            self.turn(5)
            self.assertEqual(self.servers.built, [])
            self.ports.resume()
            self.turn(5)
            self.assertEqual(len(self.servers.built), 3)

    def test_unix_socket(self) -> None:
        """A unix socket, too; whoever is on it has no address."""
        path = Path(self.mktemp())
        self.listen(f"unix:{path}")
        self.ports.pause()
        client = self.sockets.enter_context(socket.socket(socket.AF_UNIX))
        client.connect(str(path))
        self.turn(3)
        self.assertEqual(self.servers.built, [])
        self.ports.resume()
        self.turn(3)
        [server] = self.servers.built
        self.assertEqual(server.clients, [Client("unknown", False)])
        self.assertIsNone(server.clients[0].source)

    def test_all_ports(self) -> None:
        """All ports pause together."""
        ports = [self.listen(), self.listen()]
        self.ports.pause()
        for port in ports:
            self.connect(port)
        self.turn(3)
        self.assertEqual(self.servers.built, [])

    def test_opened_meanwhile(self) -> None:
        """A port that is opened while they are paused is paused, and resumes with the others."""
        self.ports.pause()
        port = self.listen()
        self.connect(port)
        self.turn(3)
        self.assertEqual(self.servers.built, [])
        self.ports.resume()
        self.turn(3)
        self.assertEqual(len(self.servers.built), 1)

    def test_close_while_paused(self) -> None:
        """A paused port closes cleanly, and late words to it are harmless."""
        port = self.listen()
        self.ports.pause()
        [client] = self.connect(port)
        stopped = self.ports.stopService()
        self.ports.resume()
        self.turn(2)
        self.successResultOf(stopped)
        self.ports.pause()
        self.ports.resume()
        self.turn(2)
        self.assertEqual((self.servers.built, self.servers.running), ([], 0))
        self.assertRaises(ConnectionResetError, client.recv, 1)

    def test_opened_again(self) -> None:
        """A port that was closed while paused, and is opened again after that, accepts."""
        port = self.listen()
        self.ports.pause()
        self.stop()
        self.ports.resume()
        self.start(port)
        self.connect(port)
        self.turn(3)
        self.assertEqual(len(self.servers.built), 1)

    def test_cannot_listen(self) -> None:
        """A port that is taken raises at the start."""
        taken = self.sockets.enter_context(socket.create_server(("127.0.0.1", 0)))
        number = taken.getsockname()[1]
        port = make_port(self.reactor, f"tcp:{number}:interface=127.0.0.1", self.servers)
        self.assertRaises(CannotListenError, port.privilegedStartService)

    def test_no_endpoint(self) -> None:
        """What is no endpoint is an error of the configuration, behind haproxy: as well."""
        for description in ("2222", "haproxy:", "haproxy:nonsense:1", "tcp:2222\\"):
            with self.assertRaises(ConfigError) as caught:
                make_port(self.reactor, description, self.servers)
            self.assertIn("ssh.listen", str(caught.exception))

    def test_cannot_be_paused(self) -> None:
        """A port of another kind is used all the same; the log says what it lacks."""

        class Endpoint:
            def listen(self, factory: object) -> Any:
                return succeed(Listening())

        class Listening:
            def stopListening(self) -> None:
                pass

        with capturedLogs() as logs:
            self.start(SSHPort(Endpoint(), self.servers))
        self.ports.pause()
        self.ports.resume()
        self.assertIn("cannot be paused", formatEvent(logs[-1]))


class TurnTests(PortTestCase):
    """How much one turn of the reactor accepts."""

    def test_one_a_turn(self) -> None:
        """However many wait, one is accepted in a turn, from the first to the last."""
        port = self.listen()
        self.connect(port, 30)
        for count in range(1, 31):
            self.turn()
            self.assertEqual(len(self.servers.built), count)

    def test_pause_counts_at_once(self) -> None:
        """Who pauses as one is accepted gets no other."""
        port = self.listen()
        self.connect(port, 5)
        built = self.servers.buildProtocol

        def pausing(addr: object) -> Server:
            self.ports.pause()
            return built(addr)

        self.servers.buildProtocol = pausing  # type: ignore[method-assign]
        self.turn(5)
        self.assertEqual(len(self.servers.built), 1)


class BalancerTests(PortTestCase):
    """Connections with a PROXY header."""

    def proxied(self) -> tuple[socket.socket, Server]:
        """One, which has sent nothing yet."""
        port = self.listen("haproxy:tcp:0:interface=127.0.0.1")
        [client] = self.connect(port)
        self.turn(2)
        return client, self.servers.built[-1]

    def test_client_is_known(self) -> None:
        """With the header the client is known, before it says anything; it gets what follows."""
        for header, address in (
            (b"PROXY TCP4 192.0.2.7 10.0.0.1 4711 2222\r\n", "192.0.2.7"),
            (b"PROXY TCP6 2001:db8::7 ::1 4711 2222\r\n", "2001:db8::7"),
            (V2_TCP4, "192.0.2.7"),
            (V2_TCP6, "2001:db8::7"),
        ):
            client, server = self.proxied()
            self.assertEqual(server.clients, [])
            client.sendall(header)
            self.turn()
            self.assertEqual(server.clients, [Client(address, False)])
            transport: Any = server.transport
            self.assertEqual((transport.getPeer().host, transport.getPeer().port), (address, 4711))
            client.sendall(b"SSH-2.0-x\r\n")
            self.turn()
            self.assertEqual(server.got, b"SSH-2.0-x\r\n")
            self.assertEqual(len(server.clients), 1)

    def test_header_with_data(self) -> None:
        """What comes in one piece with the header is not lost, and comes after the news."""
        client, server = self.proxied()
        client.sendall(V2_TCP4 + b"SSH-2.0-x\r\n")
        self.turn()
        self.assertEqual(
            (server.clients, server.got), ([Client("192.0.2.7", False)], b"SSH-2.0-x\r\n")
        )

    def test_balancers_own(self) -> None:
        """LOCAL, UNKNOWN, and clients that are none of IP are the balancer's own connections:
        shown with its address, and limited by none."""
        for header in (
            b"PROXY UNKNOWN\r\n",
            b"PROXY UNKNOWN ffff::1 ffff::2 1 2\r\n",
            v2(0x20, 0x00, b""),
            v2(0x20, 0x11, V2_TCP4[16:]),
            v2(0x21, 0x00, b""),
            v2(0x21, 0x31, b"/some/socket".ljust(216, b"\0")),
        ):
            client, server = self.proxied()
            client.sendall(header)
            self.turn()
            self.assertEqual(server.clients, [Client("127.0.0.1", True)], header)
            self.assertIsNone(server.clients[0].source)

    def test_no_header(self) -> None:
        """Without a header the connection ends, and one line tells of all of them."""
        events = Events()
        self.patch(BehindBalancer, "_log", Logger("proxy", observer=events))
        port = self.listen("haproxy:tcp:0:interface=127.0.0.1")
        for _ in range(3):
            [client] = self.connect(port)
            client.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
            self.turn(3)
            server = self.servers.built[-1]
            self.assertEqual((server.clients, server.got, server.lost), ([], b"", True))
        self.assertEqual(
            [formatEvent(event) for event in events.seen],
            ["Refused a connection without a PROXY header: 127.0.0.1: it is no PROXY header"],
        )
        for call in self.reactor.getDelayedCalls():
            call.cancel()

    def test_endless_header(self) -> None:
        """A header that does not end is not waited for."""
        client, server = self.proxied()
        client.sendall(b"PROXY TCP4 ")
        self.turn()
        client.sendall(b"1" * 100)
        self.turn(3)
        self.assertTrue(server.lost)

    def test_only_where_configured(self) -> None:
        """Any other port takes a PROXY header for what it is there: what a client sent."""
        port = self.listen()
        [client] = self.connect(port)
        self.turn(2)
        client.sendall(V2_TCP4)
        self.turn()
        [server] = self.servers.built
        self.assertEqual(server.clients, [Client("127.0.0.1", False)])
        self.assertEqual(server.got, V2_TCP4)

    def test_refused_with_the_header(self) -> None:
        """A protocol that ends the connection as it hears of its client leaves no trouble."""
        client, server = self.proxied()
        transport: Any = server.transport
        transport.when_known(lambda _: transport.abortConnection())
        client.sendall(V2_TCP4 + b"more")
        self.turn(3)
        self.assertTrue(server.lost)
        self.assertEqual(self.flushLoggedErrors(), [])


class HeaderTests(SynchronousTestCase):
    """The header itself."""

    def test_in_pieces(self) -> None:
        """A header may come byte by byte; what follows it is not of it."""
        for header in (
            b"PROXY TCP4 192.0.2.7 10.0.0.1 4711 2222\r\n",
            b"PROXY UNKNOWN\r\n",
            V2_TCP4,
            v2(0x20, 0x00, b"\x03\x00\x04\x12\x34\x56\x78"),
        ):
            for size in range(len(header)):
                self.assertIsNone(read_header(header[:size]), header[:size])
            whole = read_header(header + b"SSH-2.0-x\r\n")
            assert whole is not None
            self.assertEqual(whole.size, len(header))

    def test_garbage(self) -> None:
        """What is no header, one that is cut, too long, or of no such address."""
        for data in (
            b"SSH-2.0-x\r\n",
            b"P\xff",
            b"PROXY\r\n",
            b"PROXY \r\n",
            b"PROXY TCP4\r\n",
            b"PROXY TCP5 192.0.2.7 10.0.0.1 1 2\r\n",
            b"PROXY TCP4 gateway 10.0.0.1 1 2\r\n",
            b"PROXY TCP4 2001:db8::7 ::1 1 2\r\n",
            b"PROXY TCP6 192.0.2.7 10.0.0.1 1 2\r\n",
            b"PROXY TCP4 192.0.2.7 10.0.0.1 x 2\r\n",
            b"PROXY TCP4 192.0.2.7 10.0.0.1 1 2 3\r\n",
            b"PROXY TCP4 \xff\xfe 10.0.0.1 1 2\r\n",
            b"PROXY " + b"x" * 200,
            b"\r\n\r\n\0\r\nQUIT\r",
            v2(0x11, 0x11, V2_TCP4[16:]),
            v2(0x22, 0x11, V2_TCP4[16:]),
            v2(0x21, 0x11, b"\1\2\3"),
            v2(0x21, 0x11, b"\1\2\3") + b"SSH-2.0-OpenSSH_9.2\r\n",
            v2(0x21, 0x21, b"x" * 35),
            SIGNATURE + b"\x21\x11\xff\xff",
        ):
            self.assertRaises(BadHeader, read_header, data)

    def test_other_transports(self) -> None:
        """Elsewhere the client is known at once."""
        for peer, client in (
            (IPv4Address("TCP", "192.0.2.7", 1), Client("192.0.2.7", False)),
            (IPv6Address("TCP", "2001:db8::7", 1), Client("2001:db8::7", False)),
            (UNIXAddress(b"/x"), Client("unknown", False)),
        ):
            clients: list[Client] = []
            when_known(StringTransport(peerAddress=peer), clients.append)
            self.assertEqual(clients, [client])

    def test_sources(self) -> None:
        """Limits count for a client's address, and for no balancer's."""
        self.assertEqual(Client("2001:db8::7", False).source, "2001:db8::/64")
        self.assertIsNone(Client("192.0.2.7", True).source)
