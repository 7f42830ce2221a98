"""Packets, encrypted and authenticated: as asyncssh makes them, and no other is taken."""

from __future__ import annotations

import json
import struct
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from tests.make_known_packets import IV, KEY, MAC_KEY, PACKETS
from vmconsole.ssh.ciphers import (
    CIPHERS,
    MACS,
    BadPacketError,
    Keys,
    NullCipher,
    Opener,
    Sealer,
    make_opener,
    make_sealer,
    needs_mac,
)

# Made by tests/make_known_packets.py.
KNOWN: dict[str, list[str]] = json.loads(Path(__file__).with_name("known_packets.json").read_text())
KEYS = Keys(IV, KEY, MAC_KEY)
COMBINATIONS = [
    (cipher, mac)
    for cipher in CIPHERS
    for mac in (MACS if needs_mac(cipher) else [b"hmac-sha2-256-etm@openssh.com"])
]


def padding(size: int) -> bytes:
    """Not random, so that packets can be compared."""
    return bytes(range(size))


def both(cipher: bytes, mac: bytes) -> tuple[Sealer, Opener]:
    """The two ends of one direction."""
    return make_sealer(cipher, mac, KEYS, padding), make_opener(cipher, mac, KEYS)


def opened(opener: Opener, sequence: int, packet: bytes) -> bytes:
    """The payload of a packet, its length looked at first as on a connection."""
    assert opener.wire_size(sequence, packet[: opener.head_size]) == len(packet)
    return opener.open(sequence, packet)


class KnownAnswerTests(SynchronousTestCase):
    """Against an independent implementation, with fixed keys."""

    def test_all_are_known(self) -> None:
        """Each combination of a cipher and a MAC has known packets."""
        names = {
            b" ".join((cipher, mac) if needs_mac(cipher) else (cipher,)).decode()
            for cipher, mac in COMBINATIONS
        }
        self.assertEqual(names, set(KNOWN))

    def test_sealed(self) -> None:
        """We put the same bytes on the wire."""
        for name, packets in KNOWN.items():
            cipher, _, mac = name.encode().partition(b" ")
            sealer, _ = both(cipher, mac or b"hmac-sha2-256")
            sealed = [sealer.seal(sequence, payload).hex() for sequence, payload in PACKETS]
            self.assertEqual(sealed, packets, name)

    def test_opened(self) -> None:
        """We read what is on its wire."""
        for name, packets in KNOWN.items():
            cipher, _, mac = name.encode().partition(b" ")
            _, opener = both(cipher, mac or b"hmac-sha2-256")
            for (sequence, payload), packet in zip(PACKETS, packets, strict=True):
                self.assertEqual(opened(opener, sequence, bytes.fromhex(packet)), payload, name)


class DamageTests(SynchronousTestCase):
    """Whatever is changed on the way is noticed."""

    def refused(self, opener: Opener, sequence: int, packet: bytes) -> BadPacketError:
        """The error for a packet that must not be taken."""
        with self.assertRaises(BadPacketError) as caught:
            size = opener.wire_size(sequence, packet[: opener.head_size])
            if size != len(packet):
                raise BadPacketError("another length")
            opener.open(sequence, packet)
        return caught.exception

    def test_each_bit(self) -> None:
        """One bit that is turned, anywhere in a packet."""
        for cipher, mac in COMBINATIONS:
            packet = both(cipher, mac)[0].seal(7, b"\x5epayload")
            for bit in range(8 * len(packet)):
                damaged = bytearray(packet)
                damaged[bit // 8] ^= 1 << bit % 8
                self.refused(both(cipher, mac)[1], 7, bytes(damaged))

    def test_cut_tag(self) -> None:
        """A tag of which only the beginning is right, or that is the one of other keys."""
        for cipher, mac in COMBINATIONS:
            sealer, opener = both(cipher, mac)
            packet = sealer.seal(7, b"\x5epayload")
            damaged = packet[:-1] + bytes([packet[-1] ^ 1])
            self.assertTrue(self.refused(opener, 7, damaged).mac, (cipher, mac))

    def test_another_place(self) -> None:
        """A packet that comes later, or earlier, than it was sent: dropped, doubled, swapped."""
        for cipher, mac in COMBINATIONS:
            sealer, _ = both(cipher, mac)
            first, second = sealer.seal(0, b"\x5e1"), sealer.seal(1, b"\x5e2")
            self.refused(both(cipher, mac)[1], 0, second)
            _, opener = both(cipher, mac)
            opened(opener, 0, first)
            self.refused(opener, 1, first)

    def test_lengths(self) -> None:
        """A length that no packet can have, also one that is authentic."""
        for length in (0, 1, 3, 5, 0xFFFFFFFF):
            with self.assertRaises(BadPacketError):
                NullCipher(padding).wire_size(0, struct.pack(">L", length))
            for cipher, mac in COMBINATIONS:
                if cipher.endswith(b"gcm@openssh.com") or (b"etm" in mac and b"ctr" in cipher):
                    _, opener = both(cipher, mac)
                    with self.assertRaises(BadPacketError):
                        opener.wire_size(0, struct.pack(">L", length))

    def test_padding(self) -> None:
        """Less padding than four bytes, more than there is, and a packet without a payload."""
        for body in (
            b"\x03" + bytes(11),
            b"\x0c" + bytes(11),
            b"\xff" + bytes(11),
            b"\x0b" + bytes(11),
        ):
            with self.assertRaises(BadPacketError):
                NullCipher(padding).open(0, struct.pack(">L", len(body)) + body)


class RoundTripTests(SynchronousTestCase):
    """What is sealed is opened again."""

    @given(st.lists(st.binary(min_size=1, max_size=300), min_size=1, max_size=5))
    def test_any_payload(self, payloads: list[bytes]) -> None:
        """Payloads of any size, one after the other; packets are whole blocks."""
        for cipher, mac in COMBINATIONS:
            sealer, opener = both(cipher, mac)
            for sequence, payload in enumerate(payloads):
                packet = sealer.seal(sequence, payload)
                self.assertEqual(opened(opener, sequence, packet), payload)

    def test_gcm_counter(self) -> None:
        """The counter in the nonce of AES-GCM starts again past 2^64 and leaves the rest alone
        (RFC 5647, section 7.1)."""
        keys = Keys(b"\0\0\0\x07" + b"\xff" * 8, KEY, MAC_KEY)
        name = b"aes256-gcm@openssh.com"
        sealer = make_sealer(name, b"", keys, padding)
        sealer.seal(0, b"\x02")
        wrapped = make_sealer(name, b"", Keys(b"\0\0\0\x07" + bytes(8), KEY, MAC_KEY), padding)
        self.assertEqual(sealer.seal(1, b"\x02"), wrapped.seal(0, b"\x02"))
