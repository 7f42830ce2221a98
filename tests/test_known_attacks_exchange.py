"""What has gone wrong in other ssh servers' key exchanges and packets, tried on ours."""

from __future__ import annotations

from collections.abc import Iterator

from cryptography.hazmat.primitives.asymmetric import ec, mlkem
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from msgspec.structs import replace
from twisted.conch.ssh.common import NS
from twisted.conch.ssh.keys import Key

from tests.rawclient import (
    IGNORE,
    KEX_INIT,
    KEX_REPLY,
    KEXINIT,
    NEWKEYS,
    SERVICE_REQUEST,
    STRICT,
    RawClient,
    padding,
)
from tests.sshpair import ALICE_KEY, SSHPair
from tests.test_packets import ALL, USERAUTH, PacketTestCase
from vmconsole.ssh.algorithms import CIPHERS, KEX, MACS
from vmconsole.ssh.ciphers import NullCipher, needs_mac

MLKEM = b"mlkem768x25519-sha256"
NISTP256 = b"ecdh-sha2-nistp256"
P = 2**255 - 19
# Whatever the secret is, each of these makes a shared secret of zeros (RFC 7748, section 6.1).
LOW_ORDER = (
    0,
    1,
    325606250916557431795983626356110631294008115727848805560023387167927233504,
    39382357235489614581723060781553021112529911719440698176882885853963445705823,
    P - 1,
    P,
    P + 1,
)
# Our three kinds of packets: their lengths are in clear, encrypted by themselves, in clear.
KINDS = (
    (b"aes256-gcm@openssh.com", b""),
    (b"chacha20-poly1305@openssh.com", b""),
    *((b"aes256-ctr", mac) for mac in MACS),
)
MAC_ERROR = 5


def low_order_points() -> Iterator[bytes]:
    """Each with its highest bit, which is to be ignored, clear and set."""
    for value in LOW_ORDER:
        for bit in (0, 1 << 255):
            yield (value | bit).to_bytes(32, "little")


class PublicValueTests(PacketTestCase):
    """The client's public value: a bad one gets neither a signature nor keys."""

    def refused(self, kex: bytes, value: bytes) -> None:
        """A client that has this value is told that it broke the protocol; nothing else."""
        client = self.client()
        client.write(b"SSH-2.0-raw\r\n")
        client.send_kexinit(kex=kex + b"," + STRICT)
        client.numbers()
        client.send(KEX_INIT, value)
        self.assertEqual([number for number, _ in client.received], [1], value)
        self.assertEqual(client.disconnected, (2, "protocol error"))
        self.assertEnded(client, 2)
        self.assertIsNone(client.server.sessionID)
        client.server.connectionLost(None)

    def test_x25519(self) -> None:
        """Points of low order, and what has not 32 bytes."""
        good = X25519PrivateKey.generate().public_key().public_bytes_raw()
        for value in (*low_order_points(), b"", good[:31], good + b"\0", good * 1000):
            self.refused(b"curve25519-sha256", NS(value))
        for cut in (b"", b"\0\0\0", NS(good)[:-1]):
            self.refused(b"curve25519-sha256", cut)

    def test_mlkem(self) -> None:
        """ML-KEM keys with coefficients that are not below the modulus (FIPS 203, section 7.2),
        halves that have another size, and points of low order in the other half."""
        good = X25519PrivateKey.generate().public_key().public_bytes_raw()
        kem = mlkem.MLKEM768PrivateKey.generate().public_key().public_bytes_raw()
        for value in (
            b"\xff" * 1184 + good,
            b"\x01\x0d" + kem[2:] + good,
            kem[:-1] + good,
            kem + b"\0" + good,
            kem,
            good,
            b"",
            good + kem[:-1],
            *(kem + point for point in low_order_points()),
        ):
            self.refused(MLKEM, NS(value))
        for cut in (b"", NS(kem + good)[:-1]):
            self.refused(MLKEM, cut)

    def test_invalid_curve(self) -> None:
        """Points that are not on the curve, that are none, or on another one (where a site offers
        these curves)."""
        kex = (*map(bytes.decode, KEX), NISTP256.decode())
        self.pair = SSHPair(replace(ALL, ssh=replace(ALL.ssh, kex=kex)))
        good, other = (
            ec.generate_private_key(curve())
            .public_key()
            .public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
            for curve in (ec.SECP256R1, ec.SECP384R1)
        )
        flipped = good[:-1] + bytes((good[-1] ^ 1,))
        for value in (flipped, b"\0", b"", b"\4" + bytes(64), good[:-1], good + b"\0", other):
            self.refused(NISTP256, NS(value))

    def test_good_ones(self) -> None:
        """What is refused above is refused for its value: good ones are answered."""
        good = X25519PrivateKey.generate().public_key().public_bytes_raw()
        kem = mlkem.MLKEM768PrivateKey.generate().public_key().public_bytes_raw()
        for kex, value in ((b"curve25519-sha256", good), (MLKEM, kem + good)):
            client = self.client()
            client.write(b"SSH-2.0-raw\r\n")
            client.send_kexinit(kex=kex + b"," + STRICT)
            # This client cannot compute all of them; that there is an answer is enough.
            client.read = lambda: None  # type: ignore[method-assign]
            client.send(KEX_INIT, NS(value))
            self.assertIsNotNone(client.server.sessionID)


class NameListTests(PacketTestCase):
    """KEXINIT's lists."""

    def agrees(self, **lists: bytes) -> bool:
        """Whether a key exchange with these lists comes to its end; else the client is told why."""
        client = self.client()
        client.write(b"SSH-2.0-raw\r\n")
        client.send_kexinit(**lists)
        client.numbers()
        if client.server.ending:
            self.assertEqual(self.flushLoggedErrors(), [])
            return False
        client.send_init()
        client.send_newkeys()
        client.numbers()
        self.assertWorks(client)
        return True

    def test_odd_names(self) -> None:
        """Names by the thousand, the same one again and again, empty ones, some that are no
        ASCII: what is in common is found, and nothing else matters."""
        kex = b"curve25519-sha256," + STRICT
        for odd in (
            b",".join(b"x%d" % number for number in range(3000)),
            b",".join([b"aes256-gcm@openssh.com"] * 1000),
            b"," * 20000,
            b"\0,\xff\xfe,\x1b[2J,\n," + b"y" * 20000,
        ):
            self.assertTrue(self.agrees(in_ciphers=odd + b",aes256-gcm@openssh.com"))
            self.assertTrue(self.agrees(in_languages=odd))
            self.assertTrue(self.agrees(kex=kex + b"," + odd))
        self.assertFalse(self.agrees(in_ciphers=b"aes256-gcm@openssh.com\0"))
        self.assertFalse(self.agrees(host_keys=b"ssh-ed25519 "))

    def test_downgrade(self) -> None:
        """Compression, no cipher, no MAC, SHA-1 and CBC are not agreed upon, whoever asks."""
        for lists in (
            {"in_compression": b"zlib@openssh.com,zlib"},
            {"out_compression": b""},
            {"out_ciphers": b"none"},
            {"in_ciphers": b"aes256-cbc,3des-cbc,arcfour"},
            {"in_ciphers": b"aes256-ctr", "in_macs": b"none,hmac-sha1-etm@openssh.com"},
            {"kex": b"diffie-hellman-group14-sha1,diffie-hellman-group-exchange-sha256"},
            {"host_keys": b"ssh-rsa,ssh-dss,null"},
        ):
            self.assertFalse(self.agrees(**lists), lists)

    def test_cut(self) -> None:
        """A KEXINIT that ends too early, at any place, is an error of the client's alone."""
        whole = self.client()
        whole.write(b"SSH-2.0-raw\r\n")
        whole.send_kexinit()
        # Its last four bytes are reserved; nothing reads them.
        for end in range(len(whole.kexinit) - 5):
            client = self.client()
            client.write(b"SSH-2.0-raw\r\n")
            client.send(KEXINIT, whole.kexinit[1 : 1 + end])
            disconnected = client.disconnected
            assert disconnected is not None, end
            self.assertEnded(client, disconnected[0])
            client.server.connectionLost(None)
            if end % 40 == 0:
                self.setUp()

    def test_guess_in_a_later_exchange(self) -> None:
        """A client may guess again when keys are renewed, rightly or not (CVE-2023-1667 of
        libssh)."""
        client = self.started().login(b"vmproxy", ALICE_KEY)
        # The best of ours, and a name for it that nobody has.
        client.server.algorithms = client.server.algorithms._replace(kex=[b"curve25519-sha256"])
        for right in (False, True, False):
            kex = b"curve25519-sha256" if right else b"guessed@example.com,curve25519-sha256"
            client.send_kexinit(follows=True, kex=kex)
            if not right:
                client.send(KEX_INIT, NS(b"a guess"))
            client.send_init()
            client.send_newkeys()
            self.assertEqual(client.numbers(), [KEXINIT, KEX_REPLY, NEWKEYS])
        self.assertGreaterEqual(client.open_session(), 0)


class TerrapinTests(PacketTestCase):
    """Somebody on the way who adds a message before the first keys, and drops as many behind
    them, so that the sequence numbers fit again (CVE-2023-48795)."""

    def attacked(self, client: RawClient) -> RawClient:
        """A client whose first message with keys is dropped, for a message more in clear."""
        client.write(b"SSH-2.0-raw\r\n")
        client.send_kexinit()
        added = NullCipher(padding).seal(client.sent, bytes((IGNORE,)) + NS(b""))
        client.server.dataReceived(added)
        client.read()
        if not client.server.ending:
            client.send_init()
            client.send_newkeys()
            client.numbers()
            client.sealed(IGNORE, NS(b""))
            client.send(SERVICE_REQUEST, USERAUTH)
        return client

    def test_strict(self) -> None:
        """With strict key exchange the added message ends the connection, with each cipher."""
        for cipher, mac in KINDS:
            client = self.attacked(self.client(cipher=cipher, mac=mac))
            self.assertEqual(client.server.exchanges, 0)
            self.assertEnded(client)

    def test_dropped(self) -> None:
        """A message that is dropped is missed, with each cipher, with strict key exchange and
        without it."""
        for cipher, mac in KINDS:
            for strict in (True, False):
                client = self.started(cipher=cipher, mac=mac, strict=strict)
                client.sealed(IGNORE, NS(b""))
                client.send(SERVICE_REQUEST, USERAUTH)
                # With another number an encrypted length makes no sense, most of the time.
                disconnected = client.disconnected
                assert disconnected is not None
                encrypted_length = cipher == b"chacha20-poly1305@openssh.com"
                self.assertIn(disconnected[0], (2, MAC_ERROR) if encrypted_length else (MAC_ERROR,))
                self.assertEnded(client, disconnected[0])

    def test_old_clients(self) -> None:
        """A client without it can be attacked so with ChaCha20-Poly1305, and not with AES-GCM.
        This is why there is strict key exchange: the attack of these tests is a real one."""
        for cipher, noticed in (
            (b"chacha20-poly1305@openssh.com", False),
            (b"aes256-gcm@openssh.com", True),
        ):
            client = self.attacked(self.client(cipher=cipher, strict=False))
            self.assertEqual(client.server.ending, noticed)

    def test_marker_in_a_later_exchange(self) -> None:
        """The marker counts in the first exchange alone: nobody can turn it on, or off, later."""
        for strict in (True, False):
            client = self.started(strict=strict)
            kex = b"curve25519-sha256" + (b"" if strict else b"," + STRICT)
            client.send_kexinit(kex=kex)
            client.send_init()
            client.send_newkeys()
            client.numbers()
            self.assertWorks(client)


class LengthTests(PacketTestCase):
    """What can be learned from how a damaged packet is received (the class of CVE-2008-5161)."""

    def test_damaged(self) -> None:
        """Whichever bit of a packet's beginning is changed, with each cipher: the client hears
        one of two sentences, which tell nothing about what was read, and there is no end to wait
        for that is further away than the largest packet."""
        said = {
            (2, "protocol error"),
            (MAC_ERROR, "the MAC is wrong"),
            (MAC_ERROR, "the tag is wrong"),
        }
        for cipher, mac in (*KINDS, (b"aes256-ctr", b"hmac-sha2-256")):
            if mac == b"hmac-sha2-256":
                self.pair = SSHPair(replace(ALL, ssh=replace(ALL.ssh, macs=(mac.decode(),))))
            for bit in range(40):
                client = self.started(cipher=cipher, mac=mac)
                packet = bytearray(client.sealed(IGNORE, NS(bytes(40))))
                packet[bit // 8] ^= 0x80 >> bit % 8
                client.write(bytes(packet))
                if client.disconnected is None:
                    client.write(bytes(client.server.max_packet - len(packet)))
                self.assertIn(client.disconnected, said, (cipher, mac, bit))
                client.server.connectionLost(None)
            self.setUp()

    def test_all_kinds_are_tried(self) -> None:
        """KINDS has what is offered: one cipher with each kind of length, and each MAC."""
        names = {cipher for cipher, _ in KINDS}
        self.assertTrue(names < set(CIPHERS))
        self.assertEqual({mac for cipher, mac in KINDS if needs_mac(cipher)}, set(MACS))


class HostKeySignatureTests(PacketTestCase):
    """The host key's signature."""

    def test_fresh(self) -> None:
        """It is over the exchange's hash, which a new public value of ours is in: a client that
        sends the same bytes again gets another one, so that none is of use elsewhere."""
        signed: list[bytes] = []
        sign = Key.sign

        def noted(key: Key, data: bytes, signatureType: bytes) -> bytes:
            signed.append(data)
            signature: bytes = sign(key, data, signatureType)
            return signature

        self.patch(Key, "sign", noted)
        secret = X25519PrivateKey.generate()
        for _ in range(2):
            client = self.client()
            client.write(b"SSH-2.0-raw\r\n")
            client.send_kexinit()
            client._secret = secret
            client._public = secret.public_key().public_bytes_raw()
            client.send(KEX_INIT, NS(client._public))
        self.assertEqual(len(set(signed)), 2)
        self.assertEqual({len(data) for data in signed}, {32})
