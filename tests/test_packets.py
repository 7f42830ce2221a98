"""The packet layer: every cipher, strict key exchange, the order of messages, sequence numbers."""

from __future__ import annotations

import struct
from typing import Any

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from twisted.conch.ssh.common import NS
from twisted.trial.unittest import SynchronousTestCase

from tests.rawclient import (
    DISCONNECT,
    EXT_INFO,
    IGNORE,
    KEX_INIT,
    KEX_REPLY,
    KEXINIT,
    NEWKEYS,
    SERVICE_ACCEPT,
    SERVICE_REQUEST,
    UNIMPLEMENTED,
    RawClient,
)
from tests.sshpair import ALICE_KEY, SSHPair
from vmconsole.config import SSH, Config
from vmconsole.ssh.algorithms import CIPHERS, MACS
from vmconsole.ssh.ciphers import needs_mac

USERAUTH = NS(b"ssh-userauth")
ALL = Config(
    ssh=SSH(ciphers=tuple(map(bytes.decode, CIPHERS)), macs=tuple(map(bytes.decode, MACS)))
)


class PacketTestCase(SynchronousTestCase):
    """Clients of one server with all that is offered by default."""

    def setUp(self) -> None:
        self.pair = SSHPair(ALL)
        self.clients = 0

    def client(self, **options: Any) -> RawClient:
        """A client that has sent nothing yet."""
        self.clients += 1
        return RawClient(
            self.pair.factory.buildProtocol(None),
            address=f"192.0.2.{self.clients}",
            turn=lambda: self.pair.clock.advance(0),
            **options,
        )

    def started(self, **options: Any) -> RawClient:
        """A client with keys, that has looked at what came."""
        client = self.client(**options).start()
        client.numbers()
        return client

    def assertEnded(self, client: RawClient, reason: int = 2) -> None:
        """The server said why, and closed; what comes after that changes nothing."""
        disconnected = client.disconnected
        self.assertIsNotNone(disconnected)
        assert disconnected is not None
        self.assertEqual(disconnected[0], reason, disconnected)
        self.assertTrue(client.wire.disconnecting)
        # Twisted waits for a producer that is paused.
        self.assertIsNone(client.wire.producer)
        client.received.clear()
        client.write(b"x" * 100)
        self.assertEqual(client.received, [])
        self.assertEqual(client.server.buf, b"")
        self.assertEqual(self.flushLoggedErrors(), [])

    def assertWorks(self, client: RawClient) -> None:
        """Requests are answered."""
        client.send(SERVICE_REQUEST, USERAUTH)
        self.assertEqual(client.numbers(), [SERVICE_ACCEPT])


class CipherTests(PacketTestCase):
    """With each cipher and each MAC."""

    def test_each(self) -> None:
        """A connection works, before and after more key exchanges, by either side's wish."""
        for cipher in CIPHERS:
            for mac in MACS if needs_mac(cipher) else MACS[:1]:
                for strict in (True, False):
                    client = self.started(cipher=cipher, mac=mac, strict=strict)
                    self.assertWorks(client)
                    client.exchange()
                    self.assertEqual(client.numbers(), [KEXINIT, KEX_REPLY, NEWKEYS])
                    self.assertWorks(client)
                    client.server.sendKexInit()
                    client.read()
                    self.assertEqual(client.numbers(), [KEXINIT])
                    client.exchange()
                    self.assertEqual(client.numbers(), [KEX_REPLY, NEWKEYS])
                    self.assertWorks(client)

    def test_no_mac_for_aead(self) -> None:
        """With a cipher that authenticates by itself, no MAC has to be in common."""
        client = self.started(mac=b"hmac-md5")
        self.assertWorks(client)

    def test_ways_may_differ(self) -> None:
        """Each direction has the cipher that the client asked for."""
        client = self.client()
        client.write(b"SSH-2.0-raw\r\n")
        client.send_kexinit(in_ciphers=b"aes128-ctr", out_ciphers=b"chacha20-poly1305@openssh.com")
        self.assertEqual(client.server._open_name, (b"aes128-ctr", MACS[0]))
        self.assertEqual(client.server._seal_name, (b"chacha20-poly1305@openssh.com", b""))

    def test_damaged(self) -> None:
        """A packet that was changed ends the connection with MAC_ERROR (RFC 4253, 11.1)."""
        for cipher in CIPHERS:
            client = self.started(cipher=cipher)
            packet = client.sealed(SERVICE_REQUEST, USERAUTH)
            client.write(packet[:-1] + bytes([packet[-1] ^ 1]))
            self.assertEnded(client, 5)

    def test_nothing_in_common(self) -> None:
        """A client that knows nothing of what is offered is told what would do."""
        for kind, text in (
            ("kex", "key exchange"),
            ("host_keys", "host key"),
            ("in_ciphers", "cipher"),
            ("out_ciphers", "cipher"),
            ("in_compression", "compression"),
        ):
            client = self.client()
            client.write(b"SSH-2.0-raw\r\n")
            client.send_kexinit(**{kind: b"unheard-of"})
            self.assertIn(f"no {text} algorithm in common; offered here: ", client.disconnected[1])
            self.assertEnded(client, 3)
        client = self.client(cipher=b"aes256-ctr", mac=b"hmac-sha1")
        client.write(b"SSH-2.0-raw\r\n")
        client.send_kexinit()
        self.assertEnded(client, 3)

    def test_markers_are_no_algorithms(self) -> None:
        """What only marks an extension is never agreed upon as a key exchange."""
        client = self.client()
        client.write(b"SSH-2.0-raw\r\n")
        client.send_kexinit(kex=b"ext-info-s,kex-strict-s-v00@openssh.com,ext-info-c")
        self.assertEnded(client, 3)


class StrictTests(PacketTestCase):
    """Strict key exchange (OpenSSH's PROTOCOL, section 1.10)."""

    def test_offered_once(self) -> None:
        """The marker is in our first KEXINIT alone."""
        client = self.client().start()
        self.assertIn(b"kex-strict-s-v00@openssh.com", client.server_kexinit)
        client.exchange()
        self.assertNotIn(b"kex-strict", client.server_kexinit)

    def test_sequence_numbers(self) -> None:
        """They start again with each NEWKEYS, both ways; without the marker they go on."""
        for strict in (True, False):
            client = self.started(strict=strict)
            self.assertWorks(client)
            client.exchange()
            self.assertEqual(client.server.incomingPacketSequence == 0, strict)
            self.assertEqual(client.server.outgoingPacketSequence == 0, strict)

    def test_nothing_else_during_the_first(self) -> None:
        """Whatever does not belong to the first key exchange ends a strict one, at any place."""
        for number in (IGNORE, UNIMPLEMENTED, 4, EXT_INFO, SERVICE_REQUEST, 50, 90):
            for place in range(3):
                client = self.client()
                client.write(b"SSH-2.0-raw\r\n")
                steps = (client.send_kexinit, client.send_init, client.send_newkeys)
                for step in steps[:place]:
                    step()
                client.send(number, bytes(4))
                if place == 0 and number in (IGNORE, UNIMPLEMENTED, 4):
                    # Not until its KEXINIT can it be known that the client is strict.
                    client.send_kexinit()
                self.assertEnded(client)

    def test_ignore_is_harmless_otherwise(self) -> None:
        """Without the marker, and in later exchanges, what RFC 4253 allows is allowed."""
        client = self.client(strict=False)
        client.write(b"SSH-2.0-raw\r\n")
        for step in (client.send_kexinit, client.send_init, client.send_newkeys):
            client.send(IGNORE, NS(b""))
            step()
        client.numbers()
        self.assertWorks(client)
        client = self.started()
        for step in (client.send_kexinit, client.send_init, client.send_newkeys):
            client.send(IGNORE, NS(b""))
            step()
        client.numbers()
        self.assertWorks(client)


class OrderTests(PacketTestCase):
    """Messages that come when they must not."""

    def test_out_of_order(self) -> None:
        """Parts of a key exchange that none has begun, or that come twice."""
        for number in (KEX_INIT, KEX_REPLY, NEWKEYS, 32, 34, 49):
            client = self.started()
            client.send(number, NS(bytes(32)))
            self.assertEnded(client)
        client = self.started()
        client.send_kexinit()
        client.send_kexinit()
        self.assertEnded(client)

    def test_new_keys_take_no_data(self) -> None:
        """NEWKEYS is empty (RFC 4253, section 7.3)."""
        client = self.client()
        client.write(b"SSH-2.0-raw\r\n")
        client.send_kexinit()
        client.send_init()
        client.send(NEWKEYS, b"x")
        self.assertEnded(client)

    def test_one_computation_each(self) -> None:
        """A client may not have the costly part done twice in one exchange."""
        client = self.client()
        client.write(b"SSH-2.0-raw\r\n")
        client.send_kexinit()
        client.send_init()
        client.send(KEX_INIT, NS(bytes(range(32))))
        self.assertEqual(client.numbers().count(KEX_REPLY), 1)

    def test_one_computation_though_it_waits(self) -> None:
        """Nor may it ask for it twice while others have their turn: what is behind waits."""
        client = self.client()
        client.write(b"SSH-2.0-raw\r\n")
        client.send_kexinit()
        client.numbers()
        self.pair.factory.handshakes.run(lambda: None, False)
        client._secret = X25519PrivateKey.generate()
        client._public = client._secret.public_key().public_bytes_raw()
        message = bytes([KEX_INIT]) + NS(client._public)
        client.server.dataReceived(2 * client._sealer.seal(0, message))
        for _ in range(3):
            self.pair.clock.advance(0)
        client.read()
        # The second is out of order.
        self.assertEqual(client.numbers(), [KEX_REPLY, NEWKEYS, EXT_INFO, DISCONNECT])

    def waiting(self) -> RawClient:
        """A client whose key exchange waits for its turn."""
        client = self.client()
        client.write(b"SSH-2.0-raw\r\n")
        client.send_kexinit()
        client.numbers()
        self.pair.factory.handshakes.run(lambda: None, False)
        write = client.write
        client.write = client.server.dataReceived  # type: ignore[method-assign]
        client.send_init()
        client.write = write  # type: ignore[method-assign]
        return client

    def test_waits(self) -> None:
        """While it waits for its turn nothing is read from it."""
        client = self.waiting()
        self.assertFalse(client.wire.reading)
        self.pair.clock.advance(0)
        client.read()
        self.assertEqual(client.numbers(), [KEX_REPLY, NEWKEYS, EXT_INFO])
        self.assertTrue(client.wire.reading)

    def test_gone_while_it_waits(self) -> None:
        """For a client that is gone nothing is computed."""
        client = self.waiting()
        client.server.connectionLost(None)
        self.pair.clock.advance(0)
        self.assertIsNone(client.server.sessionID)

    def test_disconnect_during_an_exchange(self) -> None:
        """A client may leave at any time, without a word of ours."""
        for steps in range(3):
            client = self.client()
            client.write(b"SSH-2.0-raw\r\n")
            for step in (client.send_kexinit, client.send_init)[:steps]:
                step()
            client.send(DISCONNECT, struct.pack(">L", 11) + NS(b"bye") + NS(b""))
            self.assertIsNone(client.disconnected)
            self.assertTrue(client.wire.disconnecting)

    def test_other_messages_in_an_exchange(self) -> None:
        """Once the client has begun a key exchange it sends nothing else (RFC 4253, 7.1)."""
        client = self.started()
        client.send_kexinit()
        client.send(SERVICE_REQUEST, USERAUTH)
        self.assertEnded(client)

    def test_answers_in_an_exchange_that_we_began(self) -> None:
        """Until the client has seen our KEXINIT it may go on; our answers wait for the keys."""
        client = self.started()
        client.server.sendKexInit()
        client.send(SERVICE_REQUEST, USERAUTH)
        self.assertEqual(client.numbers(), [KEXINIT])
        client.exchange()
        self.assertEqual(client.numbers(), [KEX_REPLY, NEWKEYS, SERVICE_ACCEPT])

    def test_order_of_answers(self) -> None:
        """Answers that waited come in the order of the requests."""
        client = self.started().login(b"vmproxy", ALICE_KEY)
        client.server.sendKexInit()
        client.send(80, NS(b"x") + b"\x01")
        client.send(90, NS(b"x11") + struct.pack(">3L", 0, 1 << 20, 1 << 15))
        client.exchange()
        self.assertEqual(client.numbers(), [KEXINIT, KEX_REPLY, NEWKEYS, 82, 92])

    def test_extensions(self) -> None:
        """EXT_INFO is for clients that ask for it, once (RFC 8308, section 2.4): right behind the
        first NEWKEYS."""
        for kex, sent in (
            (b"curve25519-sha256,ext-info-c", [EXT_INFO]),
            (b"curve25519-sha256", []),
        ):
            client = self.client(strict=False)
            client.write(b"SSH-2.0-raw\r\n")
            for rest in (sent, []):
                client.send_kexinit(kex=kex)
                client.send_init()
                client.send_newkeys()
                self.assertEqual(client.numbers(), [KEXINIT, KEX_REPLY, NEWKEYS, *rest])

    def test_before_any_keys(self) -> None:
        """A service that is asked for in clear is refused."""
        client = self.client(strict=False)
        client.write(b"SSH-2.0-raw\r\n")
        client.send(SERVICE_REQUEST, USERAUTH)
        self.assertEnded(client)

    def test_wrong_guess(self) -> None:
        """The message behind a wrong guess is left out (RFC 4253, section 7)."""
        client = self.client()
        client.write(b"SSH-2.0-raw\r\n")
        client.send_kexinit(follows=True)  # its best is not our best
        client.send(KEX_INIT, b"a guess")
        client.send_init()
        client.send_newkeys()
        client.numbers()
        self.assertWorks(client)

    def test_guess_is_judged_by_both(self) -> None:
        """A guess is right when the best key exchange and the best kind of host key are ours."""
        for host_keys, right in ((b"ssh-ed25519", True), (b"rsa-sha2-512,ssh-ed25519", False)):
            server = self.pair.factory.buildProtocol(None)
            server.algorithms = server.algorithms._replace(kex=[b"curve25519-sha256"])
            client = RawClient(server, turn=lambda: self.pair.clock.advance(0))
            client.write(b"SSH-2.0-raw\r\n")
            client.send_kexinit(follows=True, host_keys=host_keys)
            client.numbers()
            client.send_init()
            self.assertEqual(KEX_REPLY in client.numbers(), right)

    def test_wrong_guess_of_another_method(self) -> None:
        """It may be a message that no method of ours has; only one is left out."""
        client = self.client()
        client.write(b"SSH-2.0-raw\r\n")
        client.send_kexinit(
            follows=True, kex=b"diffie-hellman-group-exchange-sha256,curve25519-sha256"
        )
        client.send(34, struct.pack(">3L", 2048, 3072, 8192))
        self.assertIsNone(client.disconnected)
        client.send(34, struct.pack(">3L", 2048, 3072, 8192))
        self.assertEnded(client)

    def test_empty_message(self) -> None:
        """A packet with nothing in it is an error, and does not stop what comes after it."""
        client = self.started()
        client.write(client._sealer.seal(client.sent, b""))
        self.assertEnded(client)

    def test_unknown_message(self) -> None:
        """What is unknown is answered with the number of its packet (RFC 4253, 11.4)."""
        client = self.started()
        self.assertWorks(client)
        client.send(40 - 25)  # 15: nobody has ever defined it
        self.assertEqual(client.received, [(UNIMPLEMENTED, struct.pack(">L", 1))])

    def test_login_after_the_login(self) -> None:
        """Who is logged in cannot ask for that again: it is ignored (RFC 4252, section 5.1)."""
        client = self.started().login(b"vmproxy", ALICE_KEY)
        client.send(50, NS(b"vmproxy") + NS(b"ssh-connection") + NS(b"none"))
        self.assertEqual(client.numbers(), [])
        self.assertFalse(client.server.ending)

    def test_service_after_the_login(self) -> None:
        """Nor for a service: it would take the place of the one that has the sessions."""
        for name in (b"ssh-connection", b"ssh-userauth"):
            client = self.started().login(b"vmproxy", ALICE_KEY)
            client.send(SERVICE_REQUEST, NS(name))
            self.assertEnded(client, 7)

    def test_messages_of_users_before_the_login(self) -> None:
        """Channels before the login end the connection (RFC 4252, section 6)."""
        client = self.started()
        self.assertWorks(client)
        client.send(90, NS(b"session") + struct.pack(">3L", 0, 1 << 20, 1 << 15))
        self.assertEnded(client)


class SequenceTests(PacketTestCase):
    """Sequence numbers are modulo 2^32 (RFC 4253, section 6.4)."""

    def test_past_the_end(self) -> None:
        """A connection goes on past its 2^32nd packet, both ways, with each kind of cipher."""
        for cipher in CIPHERS:
            client = self.started(cipher=cipher)
            last = 0xFFFFFFFF
            client.sent = client.got = last
            client.server.incomingPacketSequence = client.server.outgoingPacketSequence = last
            for _ in range(3):
                self.assertWorks(client)
            self.assertEqual(client.server.incomingPacketSequence, 2)
            self.assertEqual(client.server.outgoingPacketSequence, 2)

    def test_last_number(self) -> None:
        """The last number before they start again is told as it is."""
        client = self.started()
        client.sent = client.server.incomingPacketSequence = 0xFFFFFFFF
        client.send(15)
        self.assertEqual(client.received, [(UNIMPLEMENTED, b"\xff" * 4)])


class VersionTests(PacketTestCase):
    """The exchange of versions (RFC 4253, section 4.2)."""

    def test_no_ssh(self) -> None:
        """Something else than ssh is told so in a line, and ended."""
        for data in (
            b"GET / HTTP/1.1\r\n",
            b"\n",
            b"SSH-1.5-old\r\n",
            b"x" * 300,
            b"\x16\x03\x01" * 9,
        ):
            client = self.client()
            client.server.dataReceived(data)
            self.assertTrue(client.wire.value().endswith(b"Invalid SSH identification string.\r\n"))
            self.assertTrue(client.wire.disconnecting, data)
            self.assertEqual(self.flushLoggedErrors(), [])

    def test_byte_by_byte(self) -> None:
        """The version, and all that follows, may come in pieces of any size."""
        client = self.client()
        write, client.write = client.write, lambda data: [write(bytes([byte])) for byte in data]  # type: ignore
        client.start()
        client.numbers()
        self.assertWorks(client)

    def test_too_long(self) -> None:
        """A version of 255 bytes is taken, its line's end included, and no longer one."""
        for size, taken in ((255, True), (256, False)):
            client = self.client()
            client.server.dataReceived((b"SSH-2.0-" + b"x" * 300)[: size - 2] + b"\r\n")
            self.assertEqual(client.server.gotVersion, taken)


class SizeTests(PacketTestCase):
    """How large packets may be."""

    def test_before_the_login(self) -> None:
        """The first bytes of a packet that is too large end the connection."""
        for cipher in CIPHERS:
            client = self.started(cipher=cipher)
            packet = client.sealed(IGNORE, NS(b"x" * 40000))
            client.write(packet[:16])
            self.assertEnded(client)

    def test_many_in_one_piece(self) -> None:
        """Many packets that arrive together are all handled."""
        client = self.started()
        client.write(b"".join(client.sealed(SERVICE_REQUEST, USERAUTH) for _ in range(100)))
        self.assertEqual(client.numbers(), [SERVICE_ACCEPT] * 100)

    def test_disconnect_ends(self) -> None:
        """Behind a DISCONNECT nothing counts any more."""
        client = self.started()
        client.write(
            client.sealed(DISCONNECT, struct.pack(">L", 11) + NS(b"bye") + NS(b""))
            + client.sealed(SERVICE_REQUEST, USERAUTH)
        )
        self.assertEqual(client.numbers(), [])
        self.assertTrue(client.wire.disconnecting)
        self.assertIsNone(client.server.service)

    def test_nothing_behind_the_end(self) -> None:
        """Behind our DISCONNECT nothing is sent."""
        client = self.started()
        client.server.sendDisconnect(11, b"bye")
        client.server.sendIgnore(b"")
        client.read()
        self.assertEqual(client.numbers(), [DISCONNECT])
