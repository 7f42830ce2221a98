"""What users send on channels must not make memory or CPU grow: each guard, and what happens
without it."""

from __future__ import annotations

import gc
import struct
from typing import Any

from twisted.conch.ssh.common import NS
from twisted.conch.ssh.connection import SSHConnection

from tests.fakes import console
from tests.guard_kit import GuardTestCase
from tests.rawclient import CHANNEL_DATA, CHANNEL_OPEN, CHANNEL_REQUEST, RawClient
from tests.sshpair import ALICE, PTY
from vmconsole.console import escape, menu
from vmconsole.console.console_session import ConsoleSession
from vmconsole.ssh import packets, session
from vmconsole.ssh.session import SessionChannel
from vmconsole.ssh.transport import ConsoleTransport

MIB = 1048576
CHANNEL_FAILURE = 100


class SessionGuardTests(GuardTestCase):
    """Channels, their windows, requests and data."""

    def test_window(self) -> None:
        """A window of 4 GiB, and a client that reads nothing, on a guest that prints on and on."""

        def harm() -> float:
            client = self.user()
            self.on_a_console(client, window=0xFFFFFFFF)
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
            client.flood(CHANNEL_REQUEST, request, 20000)
            return client.wire.waiting

        self.compare(harm, 3 * 65536, ConsoleTransport, "pauseProducing", lambda _: None)

    def test_cut_requests(self) -> None:
        """Requests that are cut: none is granted, and the log has nothing of them."""
        client = self.user()
        channel = client.open_session()
        for kind in (b"pty-req", b"env", b"exec"):
            client.request(channel, kind, b"\0", reply=False)
            client.request(channel, kind, b"\0")
        gc.collect()
        self.assertEqual(client.numbers(), [CHANNEL_FAILURE] * 3)
        self.assertEqual(self.flushLoggedErrors(), [])

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

    def test_terminal(self) -> None:
        """The name of a terminal that is as long as a packet: the beginning is kept."""

        def harm() -> float:
            client = self.user()
            channel = client.open_session()
            client.request(channel, b"pty-req", NS(b"x" * 200000) + bytes(16) + NS(b""))
            [opened] = client.server.service.channels.values()
            return len(opened.terminal)

        self.compare(harm, 64, session, "_LONGEST_TERMINAL", MIB)

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

    def test_larger_data_than_it_may(self) -> None:
        """So is one that sends more in a packet than it may, and one whose packets, each of which
        is small enough, are for standard error."""
        client = self.user()
        channel = client.open_session()
        client.send(CHANNEL_DATA, struct.pack(">L", channel) + NS(bytes(32769)))
        self.assertEqual(client.disconnected, (2, "protocol error"))
        client = self.user()
        channel = client.open_session()
        [opened] = client.server.service.channels.values()
        opened.pauseProducing()
        data = struct.pack(">2L", channel, 1) + NS(bytes(32768))
        self.assertEqual(client.flood(95, data, 100), 5)
        client.read()
        self.assertEqual(client.disconnected, (2, "protocol error"))
        self.assertEqual(self.flushLoggedErrors(), [])

    def on_console(self, packet_size: int, window: int = 0xFFFFFFFF) -> RawClient:
        """A user on a console, with a channel 0 that takes packets of this size."""
        client = self.user()
        opening = NS(b"session") + struct.pack(">3L", 1, window, packet_size)
        client.send(CHANNEL_OPEN, opening)
        client.request(0, b"pty-req", PTY)
        client.request(0, b"exec", NS(b"vm1"))
        self.pair.clock.advance(0.005)
        client.read()
        client.received.clear()
        return client

    def test_size_of_packets(self) -> None:
        """A client gets packets of the size that it takes, but of 32 KiB at most."""
        for size in (0xFFFFFFFF, 300):
            self.setUp()
            client = self.on_console(size)
            self.pair.guests.guest.print(bytes(100000))
            self.pair.clock.advance(0.005)
            client.read()
            sizes = [len(data) - 8 for number, data in client.received if number == CHANNEL_DATA]
            self.assertEqual((max(sizes), sum(sizes) >= 100000), (min(size, 32768), True))

    def test_windows(self) -> None:
        """The window is not opened again for each key."""
        client = self.on_console(32768)
        for _ in range(10):
            client.send(CHANNEL_DATA, struct.pack(">L", 0) + NS(b"x"))
            self.pair.guests.guest.print(b"x")
            self.pair.clock.advance(0.005)
        client.read()
        self.assertEqual(set(client.numbers()), {CHANNEL_DATA})

    def test_output_behind_the_close(self) -> None:
        """Output for a channel that is closed here is not kept, though its client never closes
        it."""
        client = self.on_console(32768, window=0)
        [opened] = client.server.service.channels.values()
        opened.loseConnection()
        opened.write(bytes(100000))
        self.assertEqual(opened._waiting_output, 0)

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

    def test_small_packets(self) -> None:
        """A client that wants its output a byte at a time gets no session."""
        client = self.user()
        for size, number in ((0, 92), (255, 92), (256, 91)):
            client.send(90, NS(b"session") + struct.pack(">3L", 1, 1 << 20, size))
            self.assertEqual(client.numbers(), [number])

    def test_answers_to_nothing(self) -> None:
        """Answers to channels and requests that are not ours end the connection: they would
        change what is known of the client's own channels."""
        for number in (91, 92, 99, 100):
            client = self.user()
            channel = client.open_session()
            client.send(number, struct.pack(">4L", channel, 1, 0, 0))
            self.assertEqual(client.disconnected, (2, "protocol error"))
            client.server.connectionLost(None)
        self.assertEqual(self.pair.factory.session_counts.total, 0)
        self.assertEqual(self.flushLoggedErrors(), [])

    def test_request_behind_our_close(self) -> None:
        """Nothing is sent on a channel behind its CLOSE (RFC 4254, section 5.3)."""
        client = self.user()
        channel = client.open_session()
        client.request(channel, b"exec", NS(b"help"))
        self.pair.clock.advance(1)
        client.read()
        self.assertEqual(client.numbers()[-1], 97)
        client.request(channel, b"env", NS(b"LANG") + NS(b"C"))
        self.assertEqual(client.numbers(), [])

    def test_channels_that_are_answered(self) -> None:
        """A client that refuses a channel of its own, so that it would count no more."""
        opening = NS(b"session") + struct.pack(">3L", 7, 1 << 20, 32768)

        def harm() -> float:
            client = self.user()
            connection = client.server.service
            for number in range(100):
                client.flood(CHANNEL_OPEN, opening, 1)
                client.flood(92, struct.pack(">2L", number, 1) + NS(b"") + NS(b""), 1)
            return len(connection.channelsToRemoteChannel)

        stock = SSHConnection.ssh_CHANNEL_OPEN_FAILURE
        service = self.pair.factory.services[b"ssh-connection"]
        self.compare(harm, 1, service, "ssh_CHANNEL_OPEN_FAILURE", stock)

    def test_ends_of_input(self) -> None:
        """Input that ends again and again: the console is told once."""

        def harm() -> float:
            client = self.user()
            channel = self.on_a_console(client)
            client.flood(96, struct.pack(">L", channel), 100)
            self.assertFalse(client.server.ending)
            return len(self.pair.timers())

        def again(opened: SessionChannel) -> None:
            opened._tell_input_ended()

        self.compare(harm, 5, SessionChannel, "eofReceived", again)

    def test_breaks(self) -> None:
        """BREAK without end, from a client that takes nothing of what is said to it."""

        def harm() -> float:
            client = self.user()
            channel = self.on_a_console(client, window=0)
            [opened] = client.server.service.channels.values()
            request = struct.pack(">L", channel) + NS(b"break") + b"\0" + bytes(4)
            client.flood(CHANNEL_REQUEST, request, 6000)
            return opened._waiting_output

        limit = session.MAX_WAITING_OUTPUT + 1000
        self.compare(harm, limit, session, "MAX_WAITING_OUTPUT", 1 << 40)

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

    def keys(self, line: bytes, keys: bytes) -> tuple[int, int]:
        """How often a user was written to for the keys of one packet, and how much its guest got.

        The line is the shell, which is the menu, or a VM."""
        self.pair.engine.vms[ALICE.id] = [console("vm1"), console("vm2")]
        client = self.user()
        channel = client.open_session()
        client.request(channel, b"pty-req", PTY)
        client.request(channel, b"exec" if line else b"shell", NS(line) if line else b"")
        self.pair.clock.advance(0.005)
        [opened] = client.server.service.channels.values()
        written: list[bytes] = []
        undo = self.patch(opened, "write", written.append)
        client.send(CHANNEL_DATA, struct.pack(">L", channel) + NS(keys))
        self.pair.clock.advance(0)
        undo.restore()
        return len(written), sum(len(guest.typed) for guest in self.pair.guests.opened)

    def test_keys_for_the_menu(self) -> None:
        """A packet full of keys that are no answer: they are echoed together."""

        def harm() -> float:
            return self.keys(b"", b"x" * 32000)[0]

        self.compare(harm, 20, menu, "_PIECE", 1)

    def test_keys_for_help(self) -> None:
        """A packet full of questions for help: there is one answer."""

        def harm() -> float:
            return self.keys(b"vm1", b"\x1d?" * 16000)[0]

        self.compare(harm, 2, ConsoleSession, "_help", ConsoleSession._tell_help)

    def test_commands(self) -> None:
        """A packet full of commands: few are obeyed."""

        def harm() -> float:
            return self.keys(b"vm1", b"\x1dz" * 16000)[1]

        self.compare(harm, 1000, escape, "_MOST_COMMANDS", 1 << 30)


def unheld(channel: SessionChannel) -> None:
    """A flush that pauses nobody."""
