"""Text and addresses that have misled the logs and the checks of other ssh servers, tried on
ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twisted.conch.ssh.common import NS, getNS
from twisted.logger import formatEvent, globalLogPublisher

from tests.guard_kit import GuardTestCase
from tests.rawclient import (
    CHANNEL_OPEN,
    CHANNEL_REQUEST,
    DISCONNECT,
    IGNORE,
    NEWKEYS,
    SERVICE_REQUEST,
    UNIMPLEMENTED,
    USERAUTH_REQUEST,
    RawClient,
)
from tests.ssh_ca import ed25519_key, issue
from tests.sshpair import PTY
from tests.test_known_attacks_sessions import GLOBAL_REQUEST, NASTY, size
from vmconsole.keyoptions import KeyOptions
from vmconsole.ssh.addresses import source_of
from vmconsole.ssh.certificates import CertificateRefused, check_user_certificate, parse_certificate
from vmconsole.ssh.proxy_protocol import BadHeader, read_header


class TextTests(GuardTestCase):
    """What a client says, and where it comes out again."""

    def setUp(self) -> None:
        super().setUp()
        self.lines: list[str] = []

        def note(event: Any) -> None:
            self.lines.append(formatEvent(event))

        globalLogPublisher.addObserver(note)
        self.addCleanup(globalLogPublisher.removeObserver, note)

    def logged(self) -> str:
        """All lines of the log and of the audit, each of which is one line."""
        lines = self.lines + [formatEvent(event) for event in self.pair.events.seen]
        for line in lines:
            self.assertTrue(line.isprintable(), repr(line))
            self.assertLess(len(line), 2000)
        # An audit's fields may be stored by themselves.
        for event in self.pair.events.seen:
            for value in event.values():
                self.assertTrue(not isinstance(value, str) or value.isprintable(), repr(value))
        return "\n".join(lines)

    def test_log_of_strangers(self) -> None:
        """Nothing that a stranger sends, in any place, adds a line to the log, or anything that a
        terminal would obey (the class of CVE-2016-7406 of dropbear)."""
        name, service = NS(NASTY), NS(b"ssh-connection")
        blob = NS(b"ssh-ed25519") + NS(bytes(32))
        for number, payload in (
            (USERAUTH_REQUEST, name + service + NS(b"none")),
            (USERAUTH_REQUEST, NS(b"%n%n{user}") + service + NS(b"none")),
            (USERAUTH_REQUEST, name * 2 + name),
            (USERAUTH_REQUEST, name + service + NS(b"publickey") + b"\0" + name + name),
            (
                USERAUTH_REQUEST,
                NS(b"vmproxy") + service + NS(b"publickey") + b"\1" + name + NS(blob),
            ),
            (SERVICE_REQUEST, name),
            (DISCONNECT, bytes(4) + name + name),
            (4, b"\1" + name + name),
            (IGNORE, name),
            (NEWKEYS, NASTY),
            (200, NASTY),
        ):
            # An address has so many connections without a login, and then some each second.
            self.pair.clock.advance(1)
            client = self.client()
            client.send(SERVICE_REQUEST, NS(b"ssh-userauth"))
            client.send(number, payload)
            client.server.connectionLost(None)
        for version in (b"SSH-2.0-" + NASTY, b"SSH-2.0-%n{0}\r\n", NASTY):
            self.pair.clock.advance(1)
            client = RawClient(self.pair.factory.buildProtocol(None))
            client.server.dataReceived(version + b"\n" + NASTY)
            client.server.connectionLost(None)
        self.pair.clock.advance(60)
        logged = self.logged()
        self.assertIn("login refused", logged)
        self.assertIn(r"\x1b[2J", logged)
        self.assertEqual(self.pair.events.named("login_accepted"), [])

    def test_log_of_users(self) -> None:
        """Nor does what a user sends, in names of requests, variables, terminals and commands."""
        for number, payload in (
            (GLOBAL_REQUEST, NS(NASTY) + b"\1"),
            (CHANNEL_OPEN, NS(NASTY) + bytes(12)),
            (CHANNEL_REQUEST, bytes(4) + NS(NASTY) + b"\1"),
            (CHANNEL_REQUEST, bytes(4) + NS(b"env") + b"\1" + NS(NASTY) + NS(NASTY)),
            (CHANNEL_REQUEST, bytes(4) + NS(b"pty-req") + b"\1" + NS(NASTY) + size(1, 1) + NS(b"")),
            (CHANNEL_REQUEST, bytes(4) + NS(b"exec") + b"\1" + NS(NASTY)),
            (UNIMPLEMENTED, NASTY),
            (201, NASTY),
            (DISCONNECT, bytes(4) + NS(NASTY) + NS(NASTY)),
        ):
            client = self.user()
            client.open_session()
            client.send(number, payload)
            self.pair.clock.advance(1)
            client.server.connectionLost(None)
        self.assertIn("login accepted", self.logged())

    def test_words_on_the_terminal(self) -> None:
        """An error that quotes the command line has nothing of it that a terminal would obey, nor
        has a line that has a NUL or a newline in it another meaning."""
        quoted = 0
        for line in (
            NASTY,
            b"connect --vm-name '" + NASTY + b"'",
            b"list --format '" + NASTY + b"'",
            b"list '" + NASTY + b"'",
            b"log vm1 --bytes '" + NASTY + b"'",
            b"'" + NASTY,
            b"vm1\0",
            b"list\nvm1",
            b"log\0vm1",
            b"\xff\xfe",
        ):
            client = self.user()
            channel = client.open_session()
            client.request(channel, b"pty-req", PTY)
            client.request(channel, b"exec", NS(line))
            self.pair.clock.advance(1)
            client.read()
            said = b"".join(getNS(rest[8:])[0] for number, rest in client.received if number == 95)
            self.assertTrue(said.endswith(b"\r\n"), said)
            text = said[:-2].decode()
            self.assertTrue(text.isprintable(), repr(text))
            quoted += r"\x1b" in text
            client.server.connectionLost(None)
        self.assertGreaterEqual(quoted, 3)
        self.assertEqual(self.pair.guests.opened, [])


class AddressTests(GuardTestCase):
    """One address, written in several ways."""

    def test_counted_alike(self) -> None:
        """IPv4 mapped into IPv6 counts as IPv4, and a zone makes no new address, where clients are
        counted and banned."""
        for written, counted in (
            ("192.0.2.7", "192.0.2.7"),
            ("::ffff:192.0.2.7", "192.0.2.7"),
            ("::ffff:c000:207", "192.0.2.7"),
            ("::ffff:192.0.2.7%eth0", "192.0.2.7"),
            ("fe80::1", "fe80::/64"),
            ("fe80::1%eth0", "fe80::/64"),
            ("fe80::2%7", "fe80::/64"),
            ("2001:db8::7", "2001:db8::/64"),
            ("2001:DB8:0:0:1::7", "2001:db8::/64"),
        ):
            self.assertEqual(source_of(written), counted)

    def test_restricted_alike(self) -> None:
        """So it is for ``from=`` in a key's line, and for a certificate's source-address."""
        ca, key = ed25519_key(), ed25519_key()
        cases: tuple[tuple[str, str, bool], ...] = (
            ("192.0.2.0/24", "::ffff:192.0.2.7", True),
            ("::ffff:192.0.2.0/120", "192.0.2.7", True),
            ("192.0.2.0/24", "::ffff:192.0.3.7", False),
            ("192.0.2.0/24", "::192.0.2.7", False),
            ("fe80::/10", "fe80::1%eth0", True),
            ("2001:db8::/32", "fe80::1%2001:db8::1", False),
            ("::/0", "192.0.2.7", False),
            ("0.0.0.0/0", "2001:db8::7", False),
            ("0.0.0.0/0", "unknown", False),
        )

        def by_key(pattern: str, address: str) -> bool:
            return not KeyOptions(sources=(pattern,)).refusal(address, 0.0)

        def by_certificate(pattern: str, address: str) -> bool:
            critical = {b"source-address": pattern.encode()}
            certificate = parse_certificate(issue(ca, key, critical=critical))
            try:
                check_user_certificate(certificate, address, 0.0)
            except CertificateRefused:
                return False
            return True

        ways: tuple[Callable[[str, str], bool], ...] = (by_key, by_certificate)
        for pattern, address, admitted in cases:
            for way in ways:
                self.assertEqual(way(pattern, address), admitted, (pattern, address))

    def test_header_from_a_client(self) -> None:
        """A PROXY header on a port that is none of a balancer's is what the client said: no
        version, so that it ends; it is counted by its own address."""
        for header in (
            b"PROXY TCP4 198.51.100.1 10.0.0.1 1 2\r\n",
            b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c" + bytes(12),
        ):
            client = RawClient(self.pair.factory.buildProtocol(None), address="192.0.2.9")
            client.wire.clear()
            client.server.dataReceived(header + b"SSH-2.0-raw\r\n")
            self.assertEqual(client.wire.value(), b"Invalid SSH identification string.\r\n")
            self.assertEqual(client.server.address, "192.0.2.9")
            client.server.connectionLost(None)

    def test_zone_in_a_header(self) -> None:
        """A header's address has no zone, of which Python takes any text: it would come into the
        log as it is."""
        for zone in (b"%eth0", b"%\x1b[2J", b"%x\n"):
            header = b"PROXY TCP6 2001:db8::7" + zone + b" ::1 1 2\r\n"
            self.assertRaises(BadHeader, read_header, header)
