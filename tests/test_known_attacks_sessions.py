"""What has gone wrong in other ssh servers behind the login, tried on ours."""

from __future__ import annotations

import struct

from twisted.conch.ssh.common import NS

from tests.fakes import console
from tests.guard_kit import GuardTestCase
from tests.rawclient import (
    CHANNEL_DATA,
    CHANNEL_OPEN,
    CHANNEL_REQUEST,
    CONFIRMED,
)
from tests.sshpair import ALICE

GLOBAL_REQUEST, SUCCESS, REFUSED = 80, 99, 100
WINDOW_ADJUST, EOF, CLOSE = 93, 96, 97
# What would clear a screen, set a title, forge a line, or end a text.
NASTY = b"\x1b[2J\x1b]0;owned\x07\r\nlogin accepted \x9b\x00\xe2\x80\xae"
HUGE = 0xFFFFFFFF


def size(columns: int, rows: int) -> bytes:
    """Columns and rows of a terminal, and no pixels."""
    return struct.pack(">4L", columns, rows, 0, 0)


class ChannelTests(GuardTestCase):
    """Channels by the wrong number, at the wrong time, and twice."""

    def test_numbers(self) -> None:
        """A number is looked up, and never an index: beyond the last, at the ends of its range,
        and of a channel that is closed, it ends the connection (CVE-2002-0083)."""
        for number in (1, 2, 0x7FFFFFFF, 0x80000000, HUGE):
            for message, rest in (
                (WINDOW_ADJUST, bytes(4)),
                (CHANNEL_DATA, NS(b"x")),
                (95, bytes(4) + NS(b"x")),
                (EOF, b""),
                (CLOSE, b""),
                (CHANNEL_REQUEST, NS(b"shell") + b"\1"),
            ):
                client = self.user()
                self.assertEqual(client.open_session(), 0)
                if number == 1:
                    self.assertEqual(client.open_session(), 1)
                    client.send(CLOSE, struct.pack(">L", 1))
                    self.assertEqual(client.numbers(), [CLOSE])
                client.send(message, struct.pack(">L", number) + rest)
                self.assertEqual(client.disconnected, (2, "protocol error"))
                client.server.connectionLost(None)
        self.assertEqual(self.pair.factory.session_counts.total, 0)
        self.assertEqual(self.flushLoggedErrors(), [])

    def test_one_number_twice(self) -> None:
        """A client may give two channels one number of its own: they stay two here."""
        client = self.user()
        opening = NS(b"session") + struct.pack(">3L", HUGE, 1 << 20, 32768)
        client.send(CHANNEL_OPEN, opening)
        client.send(CHANNEL_OPEN, opening)
        ours = [payload[4:8] for number, payload in client.received if number == CONFIRMED]
        self.assertEqual(ours, [bytes(4), b"\0\0\0\1"])
        client.received.clear()
        client.send(CLOSE, ours[0])
        self.assertEqual(client.received, [(CLOSE, b"\xff" * 4)])
        self.assertEqual(list(client.server.service.channels), [1])

    def test_ends(self) -> None:
        """EOF and CLOSE in any order on a console: it is left once, the answer is one CLOSE, and
        what comes behind that is for a channel that is not there."""
        for messages in ((EOF, EOF, CLOSE), (CLOSE,), (EOF, CLOSE, EOF), (CLOSE, CLOSE)):
            self.setUp()
            client = self.user()
            channel = self.on_a_console(client)
            client.numbers()
            for message in messages:
                client.send(message, struct.pack(">L", channel))
            behind = messages.index(CLOSE) < len(messages) - 1
            self.assertEqual(client.numbers().count(CLOSE), 1)
            self.assertEqual(client.server.ending, behind)
            client.server.connectionLost(None)
            self.assertEqual(len(self.pair.events.named("detached")), 1, messages)
        self.assertEqual(self.flushLoggedErrors(), [])

    def test_started_again(self) -> None:
        """Requests for what runs already change nothing for the console: it has one user, on one
        terminal."""
        client = self.user()
        channel = self.on_a_console(client)
        client.numbers()
        for kind, data in ((b"shell", b""), (b"exec", NS(b"vm1")), (b"exec", NS(b"list"))):
            client.request(channel, kind, data)
            self.assertEqual(client.numbers(), [REFUSED])
        self.assertEqual(len(self.pair.guests.opened), 1)

    def test_input_behind_its_end(self) -> None:
        """What is sent behind an EOF is bounded by the window as ever, and ends nothing
        (RFC 4254, section 5.3)."""
        client = self.user()
        channel = self.on_a_console(client)
        [opened] = client.server.service.channels.values()
        client.send(EOF, struct.pack(">L", channel))
        left = opened.localWindowLeft
        client.send(CHANNEL_DATA, struct.pack(">L", channel) + NS(b"x" * 10))
        self.assertFalse(client.server.ending)
        self.assertEqual(opened.localWindowLeft, left - 10)

    def test_windows_at_the_end_of_their_range(self) -> None:
        """A window of 2^32 - 1 is taken, and one byte more ends the connection; one of nothing
        lets nothing out."""
        for window, adjust, ends in ((HUGE, 0, False), (HUGE, 1, True), (0, HUGE, False)):
            client = self.user()
            channel = client.open_session(window)
            client.send(WINDOW_ADJUST, struct.pack(">2L", channel, adjust))
            self.assertEqual(client.server.ending, ends)
            client.server.connectionLost(None)
        client = self.user()
        channel = client.open_session(0)
        client.request(channel, b"exec", NS(b"help"))
        self.pair.clock.advance(0.1)
        client.read()
        self.assertEqual(client.numbers(), [SUCCESS])

    def test_signals(self) -> None:
        """Signals are for nobody here, whatever they are called."""
        client = self.user()
        channel = self.on_a_console(client)
        client.numbers()
        for name in (b"KILL", b"", NASTY, b"x" * 30000):
            client.request(channel, b"signal", NS(name))
            self.assertEqual(client.numbers(), [REFUSED])
        self.assertEqual(self.pair.guests.guest.typed, b"")

    def test_no_other_channels(self) -> None:
        """What would reach into other hosts, the client's agent or its screen is refused
        (CVE-2016-10009, CVE-2016-3115, CVE-2023-38408), and so is what asks for it."""
        client = self.user()
        for kind in (
            b"direct-tcpip",
            b"forwarded-tcpip",
            b"direct-streamlocal@openssh.com",
            b"forwarded-streamlocal@openssh.com",
            b"auth-agent@openssh.com",
            b"tun@openssh.com",
            b"x11",
            b"session\0",
            b"",
        ):
            client.send(CHANNEL_OPEN, NS(kind) + struct.pack(">3L", 5, 1 << 20, 32768) + NS(b"h"))
            self.assertEqual(client.numbers()[-1], 92, kind)
        for kind in (
            b"tcpip-forward",
            b"streamlocal-forward@openssh.com",
            b"no-more-sessions@openssh.com",
            NASTY,
        ):
            client.send(GLOBAL_REQUEST, NS(kind) + b"\1" + NS(b"::") + bytes(4))
            self.assertEqual(client.numbers(), [82], kind)
        channel = client.open_session()
        for kind in (b"auth-agent-req@openssh.com", b"x11-req", b"subsystem", b"xon-xoff"):
            client.request(channel, kind, b"\0" + NS(b"MIT-MAGIC-COOKIE-1\nadd") + NS(NASTY))
            self.assertEqual(client.numbers(), [REFUSED], kind)


class TerminalTests(GuardTestCase):
    """Terminals that no one has."""

    def setUp(self) -> None:
        super().setUp()
        self.pair.engine.vms[ALICE.id] = [console(f"vm{number}") for number in range(5000)]

    def test_sizes(self) -> None:
        """A terminal of any size gets a page that is not empty and not huge, also after it was
        changed in the menu; one that makes no sense is refused."""
        sizes = [size(columns, rows) for columns in (0, 1, HUGE) for rows in (0, 1, 2, HUGE)]
        for first in sizes:
            client = self.user()
            channel = client.open_session()
            client.request(channel, b"pty-req", NS(b"xterm") + first + NS(b""))
            client.request(channel, b"shell")
            for changed in sizes:
                client.received.clear()
                client.request(channel, b"window-change", changed, reply=False)
                client.send(CHANNEL_DATA, struct.pack(">L", channel) + NS(b"\r"))
                self.pair.clock.advance(0.1)
                client.read()
                page = b"".join(rest for number, rest in client.received if number == CHANNEL_DATA)
                self.assertIn(b"vm", page)
                self.assertLess(len(page), 10000)
            client.received.clear()
            for wrong in (b"", changed[:-1], changed + b"\0"):
                client.request(channel, b"window-change", wrong)
                self.assertEqual(client.numbers(), [REFUSED])
            client.server.connectionLost(None)
        self.assertEqual(self.flushLoggedErrors(), [])

    def test_terminals_asked_for_again(self) -> None:
        """A second terminal takes the place of the first, with modes that make no sense as well;
        one whose request is cut is refused, and there is none."""
        client = self.user()
        channel = client.open_session()
        [opened] = client.server.service.channels.values()
        for cut in (b"", NS(b"xterm"), NS(b"xterm") + bytes(7), b"\xff" * 4 + b"xterm"):
            client.request(channel, b"pty-req", cut)
            self.assertEqual(client.numbers(), [REFUSED])
            self.assertIsNone(opened.terminal)
        for modes in (b"", NS(b""), NS(b"\1"), NS(b"\xff" * 1000), b"\xff" * 4, NS(b"\0") + b"x"):
            client.request(channel, b"pty-req", NS(b"xterm") + size(80, 24) + modes)
            self.assertEqual(client.numbers(), [SUCCESS])
        self.assertEqual((opened.terminal, opened.size), ("xterm", (24, 80)))


class LoginAgainTests(GuardTestCase):
    """A user who is logged in already."""

    def test_as_somebody_else(self) -> None:
        """Nobody becomes another user: all that belongs to a login is void behind one, and the
        session goes on (CVE-2023-46446)."""
        client = self.user()
        channel = self.on_a_console(client)
        avatar = client.server.avatar
        client.numbers()
        for number in range(50, 80):
            client.send(number, NS(b"root") + NS(b"ssh-connection") + NS(b"none"))
        self.assertEqual(client.numbers(), [])
        client.send(CHANNEL_DATA, struct.pack(">L", channel) + NS(b"x"))
        self.assertEqual(self.pair.guests.guest.typed, b"x")
        self.assertIs(client.server.avatar, avatar)
        self.assertEqual(len(self.pair.events.named("login_accepted")), 1)
