"""The hardened transport: what is offered, and what happens to packets that make no sense."""

from __future__ import annotations

import struct

from cryptography.hazmat.primitives.asymmetric import rsa
from twisted.conch.ssh.common import NS, getNS
from twisted.conch.ssh.keys import Key
from twisted.logger import Logger, formatEvent
from twisted.trial.unittest import SynchronousTestCase

from tests.fakes import Events, console
from tests.sshpair import ALICE, HOST_KEY, ClientChannel, SSHPair
from vmconsole.config import SSH, Config, Limits
from vmconsole.errors import ConfigError
from vmconsole.ssh.algorithms import choose_algorithms, choose_all_algorithms
from vmconsole.ssh.factory import ConsoleSSHFactory
from vmconsole.ssh.hostkeys import HostKeys
from vmconsole.ssh.transport import ConsoleTransport, Tries


def offered(pair: SSHPair) -> list[list[bytes]]:
    """The name lists of the server's KEXINIT (RFC 4253, section 7.1)."""
    strings = getNS(pair.client.otherKexInitPayload[17:], 10)[:-1]
    return [string.split(b",") for string in strings]


class OfferTests(SynchronousTestCase):
    """The algorithms that a client sees."""

    def test_nothing_weak(self) -> None:
        """No SHA-1, CBC, DSA, MD5 or compression; ML-KEM first."""
        lists = offered(SSHPair())
        self.assertEqual(
            lists[0],
            [
                b"mlkem768x25519-sha256",
                b"curve25519-sha256",
                b"curve25519-sha256@libssh.org",
                b"ext-info-s",
                b"kex-strict-s-v00@openssh.com",
            ],
        )
        self.assertEqual(lists[1], [b"ssh-ed25519"])
        self.assertEqual(lists[6], [b"none"])
        default = choose_all_algorithms(SSH(), {b"ssh-ed25519": HOST_KEY})
        self.assertEqual(
            default.ciphers,
            [
                b"aes256-gcm@openssh.com",
                b"aes128-gcm@openssh.com",
                b"chacha20-poly1305@openssh.com",
                b"aes256-ctr",
                b"aes128-ctr",
            ],
        )
        self.assertEqual(
            default.macs, [b"hmac-sha2-256-etm@openssh.com", b"hmac-sha2-512-etm@openssh.com"]
        )

    def test_rsa_host_key(self) -> None:
        """An RSA host key signs with SHA-2 only."""
        pair = SSHPair()
        pair.factory.use_host_keys(HostKeys([Key(rsa.generate_private_key(65537, 2048))]))
        built = pair.factory.buildProtocol(None)
        self.assertEqual(built.algorithms.host_keys, [b"rsa-sha2-512", b"rsa-sha2-256"])

    def test_configured(self) -> None:
        """The configured lists are what is offered, in their order."""
        pair = SSHPair(Config(ssh=SSH(ciphers=("aes128-ctr",), macs=("hmac-sha2-512",))))
        self.assertEqual(offered(pair)[2], [b"aes128-ctr"])
        self.assertEqual(offered(pair)[4], [b"hmac-sha2-512"])

    def test_unknown_or_weak(self) -> None:
        """A name that is unknown or weak is refused at the start, with what is possible."""
        for kind, name in (
            ("ciphers", "aes256-cbc"),
            ("macs", "hmac-sha1"),
            ("kex", "diffie-hellman-group14-sha1"),
            ("host_key_algorithms", "ssh-dss"),
            ("kex", "no-such-thing"),
            ("macs", "hmac-sha2-384"),
            ("ciphers", "none"),
        ):
            with self.assertRaises(ConfigError) as caught:
                choose_algorithms(kind, [name])
            self.assertIn(name, str(caught.exception))
            self.assertIn("Possible: ", str(caught.exception))

    def test_user_keys_are_told(self) -> None:
        """server-sig-algs (RFC 8308) names the user keys that are taken, not our host keys."""
        told = SSHPair().client.peerExtensions[b"server-sig-algs"].split(b",")
        self.assertIn(b"ecdsa-sha2-nistp256", told)
        self.assertIn(b"sk-ssh-ed25519@openssh.com", told)
        self.assertNotIn(b"ssh-rsa", told)

    def test_version(self) -> None:
        """The version string names the product, and no version of it."""
        self.assertEqual(SSHPair().client.otherVersionString, b"SSH-2.0-vmconsole")


class BrokenPacketTests(SynchronousTestCase):
    """Packets that make no sense end their connection cleanly, and leave no traceback."""

    def broken(self, number: int, payload: bytes, login: bool = True) -> None:
        """Send one packet and see the connection end with PROTOCOL_ERROR."""
        pair = SSHPair()
        if login:
            pair.login()
        pair.client.sendPacket(number, payload)
        pair.flush()
        self.assertEqual(pair.client.disconnected, (2, b"protocol error"), (number, payload))
        self.assertEqual(self.flushLoggedErrors(), [])

    def test_unknown_channel(self) -> None:
        """Data, requests, windows, ends for a channel that is not there."""
        for number in (93, 94, 95, 96, 97, 98):
            self.broken(number, struct.pack(">LL", 99, 1) + NS(b"x") + b"\0" * 8)

    def test_stray_answers(self) -> None:
        """Answers to requests that were never made."""
        for number in (81, 82):
            self.broken(number, b"")

    def test_short_packets(self) -> None:
        """Packets that end too early, before and after the login."""
        for number in (80, 90, 93, 94, 98):
            self.broken(number, b"\0")
        self.broken(50, b"\0\0", login=False)
        self.broken(5, b"\0", login=False)

    def test_large_packet_before_login(self) -> None:
        """A packet of more than 35,000 bytes is refused before the login, and taken after."""
        pair = SSHPair()
        pair.client.sendPacket(2, NS(b"x" * 100000))
        pair.flush()
        self.assertEqual(pair.client.disconnected, (2, b"protocol error"))
        pair = SSHPair()
        pair.login()
        pair.client.sendPacket(2, NS(b"x" * 100000))
        pair.flush()
        self.assertIsNone(pair.client.disconnected)


class LogTests(SynchronousTestCase):
    """What is kept for the log and the audit of what a client says."""

    def test_fingerprints(self) -> None:
        """Of many keys that are offered the first 16 are kept, each once."""
        tries = Tries()
        for number in range(40):
            tries.note_key(f"SHA256:{number // 2}")
        self.assertEqual(tries.fingerprints, [f"SHA256:{number}" for number in range(16)])

    def test_errors(self) -> None:
        """An error is one line, however long it is, and whatever is in it."""
        for login in (False, True):
            events = Events()
            self.patch(ConsoleTransport, "log", Logger("transport", observer=events))
            self.patch(ConsoleSSHFactory, "_log", Logger("factory", observer=events))
            pair = SSHPair()
            if login:
                pair.login()
            pair.server.broken_packet(ValueError("\x1b[2J\n" * 10000))
            [event] = events.seen
            line = formatEvent(event)
            self.assertLess(len(line), 1000)
            self.assertTrue(line.isprintable())
            self.assertIn("192.0.2.7 broke the protocol", line)

    def test_strangers_errors(self) -> None:
        """Before the login anybody may cause errors: the first of a kind is a line, and those
        that follow are counted in another one."""
        events = Events()
        self.patch(ConsoleSSHFactory, "_log", Logger("factory", observer=events))
        pair = SSHPair()
        for _ in range(5):
            pair.beside().server.broken_packet(ValueError("odd"))
        self.assertEqual(len(events.seen), 1)
        pair.clock.advance(10)
        pair.beside().server.broken_packet(ValueError("odd"))
        self.assertIn("and 4 more like it", formatEvent(events.seen[-1]))
        self.assertEqual(len(events.seen), 2)

    def test_our_own(self) -> None:
        """An error that is no client's doing is told with its traceback."""
        pair = SSHPair()
        pair.server.broken_packet(ZeroDivisionError())
        pair.flush()
        self.assertEqual(pair.client.disconnected, (2, b"protocol error"))
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)


class StalledClientTests(SynchronousTestCase):
    """Clients that take nothing."""

    def test_last_words_have_a_limit(self) -> None:
        """A client that does not take our last words is cut off some seconds later."""
        pair = SSHPair()
        aborted: list[None] = []
        pair.server_io.loseConnection = lambda: None
        pair.server_io.abortConnection = lambda: aborted.append(None)
        pair.clock.advance(31)
        self.assertEqual(aborted, [])
        pair.clock.advance(6)
        self.assertEqual(aborted, [None])

    def test_gone_in_time(self) -> None:
        """A client that goes when it is told leaves no timer behind."""
        pair = SSHPair()
        pair.advance(31)
        self.assertEqual(pair.clock.getDelayedCalls(), [])

    def test_no_answers_for_who_does_not_read(self) -> None:
        """While its TCP connection is full a client is heard, until its answers pile up; once it
        reads it is heard again."""
        pair = SSHPair()
        pair.login()
        calls: list[str] = []
        pair.server_io.pauseProducing = lambda: calls.append("pause")
        pair.server_io.resumeProducing = lambda: calls.append("resume")
        pair.server.pauseProducing()
        answer = pair.connection.sendGlobalRequest(b"x", b"", wantReply=True)
        pair.flush()
        self.failureResultOf(answer)
        self.assertNotIn("pause", calls)
        for _ in range(70):
            pair.server.sendPacket(2, NS(bytes(1000)))
        self.assertEqual(calls[-1], "pause")
        pair.server.resumeProducing()
        self.assertEqual(calls[-1], "resume")
        pair.server.pauseProducing()
        self.assertEqual(calls[-1], "resume")

    def test_unfinished_key_exchange(self) -> None:
        """A client that begins a key exchange and then asks on and on is cut off."""
        pair = SSHPair()
        pair.login()
        pair.client.sendKexInit()
        pair.client._keyExchangeState = pair.client._KEY_EXCHANGE_NONE
        pair.client.ssh_KEXINIT = lambda packet: None
        for _ in range(1000):
            pair.client.sendPacket(80, NS(b"x") + b"\x01")
        pair.flush()
        self.assertTrue(pair.server.ending)
        self.assertLess(len(pair.server._blocked), 300)


class ConnectionTests(SynchronousTestCase):
    """What a user who is logged in may open."""

    def setUp(self) -> None:
        self.pair = SSHPair(Config(limits=Limits(sessions_per_connection=2)))
        self.pair.engine.vms[ALICE.id] = [console("vm1")]
        self.pair.login()

    def test_no_forwarding(self) -> None:
        """Channels other than sessions are refused, and so are all global requests."""
        for name in (b"direct-tcpip", b"forwarded-tcpip", b"x11", b"\xff"):
            channel = ClientChannel()
            channel.name = name
            channel.logPrefix = lambda: "test"  # type: ignore[method-assign]
            self.pair.connection.openChannel(channel)
            self.pair.flush()
            self.assertTrue(channel.open_failed)
        for name in (b"tcpip-forward", b"keepalive@openssh.com", b"\xff"):
            d = self.pair.connection.sendGlobalRequest(name, b"", wantReply=True)
            self.pair.flush()
            self.failureResultOf(d)
        self.assertEqual(self.flushLoggedErrors(), [])

    def test_sessions_per_connection(self) -> None:
        """So many sessions and no more; one that is closed makes room again."""
        first, _second = self.pair.open(), self.pair.open()
        self.assertTrue(self.pair.open().open_failed)
        first.loseConnection()
        self.pair.flush()
        self.assertFalse(self.pair.open().open_failed)

    def revoked(self) -> ClientChannel:
        """The login of a user no longer holds, whose session takes no output yet."""
        channel = self.pair.open(window=1, reads_no_more=True)
        self.pair.server.avatar.revoke("The key is gone.")
        self.pair.flush()
        return channel

    def test_revoked(self) -> None:
        """A login that is revoked ends when each of its sessions has: all have their last words,
        and nothing new is begun."""
        other = self.pair.open()
        channel = self.revoked()
        self.assertEqual((other.gone, channel.gone), (True, False))
        self.assertTrue(self.pair.open().open_failed)
        answer = self.pair.connection.sendRequest(channel, b"exec", NS(b"list"), wantReply=True)
        self.pair.flush()
        self.failureResultOf(answer)
        self.assertIsNone(self.pair.client.disconnected)
        self.pair.connection.grant(channel, 1000)
        self.pair.flush()
        self.assertEqual(channel.error, b"[vmconsole: The key is gone.]\n")
        self.assertEqual(self.pair.client.disconnected, (11, b"The key is gone."))

    def test_revoked_and_gone(self) -> None:
        """One that goes by itself then leaves no timer behind."""
        self.revoked()
        self.pair.server_io.loseConnection()
        self.pair.flush()
        self.assertEqual(self.pair.timers(), [])

    def test_one_session_of_two(self) -> None:
        """A session that ends leaves the others of its connection alone."""
        console_channel = self.pair.run(b"vm1", pty=True)
        self.assertEqual(self.pair.run(b"list").status, 0)
        self.pair.type(console_channel, b"still here")
        self.assertEqual(self.pair.guests.guest.typed, b"still here")

    def test_rekey(self) -> None:
        """Either side may exchange keys anew while a console is open; nothing is lost, and the
        output that comes meanwhile waits in the backlog, not in Conch."""
        channel = self.pair.run(b"vm1", pty=True)
        for starts in (self.pair.client, self.pair.server, self.pair.client):
            starts.sendKexInit()
            for _ in range(3):
                self.pair.guests.guest.print(b"during;")
            self.assertLessEqual(len(self.pair.server._blocked or ()), 1)
            self.pair.flush()
        self.assertTrue(channel.output.endswith(b"during;" * 9))
