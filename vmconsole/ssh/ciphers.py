"""Binary packets (RFC 4253, section 6), encrypted and authenticated: one class for each way.

A *sealer* makes the packets of one direction, an *opener* reads those of the other; each key
exchange makes new ones. Sequence numbers are the caller's, modulo 2^32.
"""

from __future__ import annotations

import hmac
import struct
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.ciphers.algorithms import AES, ChaCha20
from cryptography.hazmat.primitives.ciphers.modes import CTR
from cryptography.hazmat.primitives.poly1305 import Poly1305

Random = Callable[[int], bytes]

_LENGTH = struct.Struct(">L")
_BYTE = [bytes((value,)) for value in range(256)]
_LEAST_PADDING = 4
_TAG = 16
_COUNTER_AND_NONCE = struct.Struct(">QQ")
# Of ChaCha20, in bytes: what one step of its counter stands for.
_CHACHA_BLOCK = bytes(64)


class BadPacketError(Exception):
    """Bytes that are no packet. ``mac``: they were changed on the way, or made with other keys."""

    def __init__(self, text: str, mac: bool = False) -> None:
        super().__init__(text)
        self.mac = mac


class Sealer(Protocol):
    """Makes the packets of one direction."""

    def seal(self, sequence: int, payload: bytes) -> bytes:
        """The packet with this payload, ready for the wire."""


class Opener(Protocol):
    """Reads the packets of one direction."""

    head_size: int
    """Bytes from which the length of a packet can be told."""

    def wire_size(self, sequence: int, head: bytes) -> int:
        """Bytes of the whole packet that begins with ``head``. Called once for each packet."""

    def open(self, sequence: int, packet: bytes) -> bytes:
        """The payload of a whole packet. Raises BadPacketError."""


class _Cipher(NamedTuple):
    key_size: int
    iv_size: int
    kind: str


class _Mac(NamedTuple):
    digest: str
    size: int
    encrypt_then_mac: bool


# Sizes in bytes: RFC 4344; RFC 5647 as OpenSSH reads it (PROTOCOL, section 1.6); for ChaCha20
# PROTOCOL.chacha20poly1305.
CIPHERS = {
    b"aes128-gcm@openssh.com": _Cipher(16, 12, "gcm"),
    b"aes256-gcm@openssh.com": _Cipher(32, 12, "gcm"),
    b"chacha20-poly1305@openssh.com": _Cipher(64, 0, "chacha"),
    b"aes128-ctr": _Cipher(16, 16, "ctr"),
    b"aes192-ctr": _Cipher(24, 16, "ctr"),
    b"aes256-ctr": _Cipher(32, 16, "ctr"),
}
# RFC 6668; OpenSSH's PROTOCOL, section 1.5.
MACS = {
    b"hmac-sha2-256-etm@openssh.com": _Mac("sha256", 32, True),
    b"hmac-sha2-512-etm@openssh.com": _Mac("sha512", 64, True),
    b"hmac-sha2-256": _Mac("sha256", 32, False),
    b"hmac-sha2-512": _Mac("sha512", 64, False),
}


def needs_mac(cipher: bytes) -> bool:
    """Whether a cipher does not authenticate by itself: else no MAC is negotiated."""
    return CIPHERS[cipher].kind == "ctr"


class Keys(NamedTuple):
    """What one direction is keyed with (RFC 4253, section 7.2); each may be too long."""

    iv: bytes
    cipher: bytes
    mac: bytes


def make_sealer(cipher: bytes, mac: bytes, keys: Keys, random: Random) -> Sealer:
    """For packets with this cipher, and this MAC if it needs one. ``random`` is for padding."""
    iv, key = _cut(cipher, keys)
    kind = CIPHERS[cipher].kind
    if kind == "gcm":
        return _GCMSealer(key, iv, random)
    if kind == "chacha":
        return _ChaChaSealer(key, random)
    make = _EtMSealer if MACS[mac].encrypt_then_mac else _PlainSealer
    return make(Cipher(AES(key), CTR(iv)).encryptor(), MACS[mac], keys.mac, random)


def make_opener(cipher: bytes, mac: bytes, keys: Keys) -> Opener:
    """For packets that ``make_sealer`` makes with the same arguments."""
    iv, key = _cut(cipher, keys)
    kind = CIPHERS[cipher].kind
    if kind == "gcm":
        return _GCMOpener(key, iv)
    if kind == "chacha":
        return _ChaChaOpener(key)
    make = _EtMOpener if MACS[mac].encrypt_then_mac else _PlainOpener
    return make(Cipher(AES(key), CTR(iv)).decryptor(), MACS[mac], keys.mac)


def _cut(cipher: bytes, keys: Keys) -> tuple[bytes, bytes]:
    sizes = CIPHERS[cipher]
    return keys.iv[: sizes.iv_size], keys.cipher[: sizes.key_size]


def _pack(payload: bytes, block: int, counted: int, random: Random) -> tuple[bytes, bytes]:
    """The length of a packet, of which ``counted`` bytes are padded to a block, and the rest."""
    padding = block - (counted + 1 + len(payload)) % block
    if padding < _LEAST_PADDING:
        padding += block
    body = b"".join((_BYTE[padding], payload, random(padding)))
    return _LENGTH.pack(len(body)), body


def _unpack(body: bytes) -> bytes:
    """The payload in a packet in clear without its length."""
    end = len(body) - body[0]
    if body[0] < _LEAST_PADDING or end <= 1:
        raise BadPacketError("the padding is wrong")
    return body[1:end]


def _whole(length: int, block: int, counted: int, tag: int) -> int:
    if length < block - counted or (counted + length) % block:
        raise BadPacketError("the length of a packet is wrong")
    return 4 + length + tag


class NullCipher:
    """Both ways, before the first keys."""

    head_size = 4

    def __init__(self, random: Random) -> None:
        self._random = random

    def seal(self, sequence: int, payload: bytes) -> bytes:
        """See Sealer."""
        return b"".join(_pack(payload, 8, 4, self._random))

    def wire_size(self, sequence: int, head: bytes) -> int:
        """See Opener."""
        return _whole(_LENGTH.unpack(head)[0], 8, 4, 0)

    def open(self, sequence: int, packet: bytes) -> bytes:
        """See Opener."""
        return _unpack(packet[4:])


class _PlainSealer:
    """RFC 4253, section 6.4: the MAC is of the clear packet."""

    def __init__(self, encryptor: Any, mac: _Mac, key: bytes, random: Random) -> None:
        self._encrypt = encryptor.update
        self._digest, self._key = mac.digest, key[: mac.size]
        self._random = random

    def seal(self, sequence: int, payload: bytes) -> bytes:
        packet = b"".join(_pack(payload, 16, 4, self._random))
        tag = hmac.digest(self._key, _LENGTH.pack(sequence) + packet, self._digest)
        return bytes(self._encrypt(packet)) + tag


class _PlainOpener:
    head_size = 16

    def __init__(self, decryptor: Any, mac: _Mac, key: bytes) -> None:
        self._decrypt = decryptor.update
        self._digest, self._key, self._tag_size = mac.digest, key[: mac.size], mac.size
        self._head = b""

    def wire_size(self, sequence: int, head: bytes) -> int:
        self._head = self._decrypt(head)
        return _whole(_LENGTH.unpack(self._head[:4])[0], 16, 4, self._tag_size)

    def open(self, sequence: int, packet: bytes) -> bytes:
        end = len(packet) - self._tag_size
        clear = self._head + self._decrypt(packet[16:end])
        tag = hmac.digest(self._key, _LENGTH.pack(sequence) + clear, self._digest)
        if not hmac.compare_digest(tag, packet[end:]):
            raise BadPacketError("the MAC is wrong", mac=True)
        return _unpack(clear[4:])


class _EtMSealer(_PlainSealer):
    """OpenSSH's PROTOCOL, section 1.5: the length in clear, and the MAC of what is sent."""

    def seal(self, sequence: int, payload: bytes) -> bytes:
        length, body = _pack(payload, 16, 0, self._random)
        sent: bytes = length + self._encrypt(body)
        return sent + hmac.digest(self._key, _LENGTH.pack(sequence) + sent, self._digest)


class _EtMOpener(_PlainOpener):
    head_size = 4

    def wire_size(self, sequence: int, head: bytes) -> int:
        return _whole(_LENGTH.unpack(head)[0], 16, 0, self._tag_size)

    def open(self, sequence: int, packet: bytes) -> bytes:
        end = len(packet) - self._tag_size
        sent = packet[:end]
        tag = hmac.digest(self._key, _LENGTH.pack(sequence) + sent, self._digest)
        if not hmac.compare_digest(tag, packet[end:]):
            raise BadPacketError("the MAC is wrong", mac=True)
        return _unpack(self._decrypt(sent[4:]))


class _GCM:
    """RFC 5647: the length is authenticated in clear; a counter of packets is in the nonce."""

    def __init__(self, key: bytes, iv: bytes) -> None:
        self._aead = AESGCM(key)
        self._fixed = iv[:4]
        self._count = int.from_bytes(iv[4:], "big")

    def _nonce(self) -> bytes:
        nonce = self._fixed + self._count.to_bytes(8, "big")
        self._count = (self._count + 1) & 0xFFFFFFFFFFFFFFFF
        return nonce


class _GCMSealer(_GCM):
    def __init__(self, key: bytes, iv: bytes, random: Random) -> None:
        super().__init__(key, iv)
        self._random = random

    def seal(self, sequence: int, payload: bytes) -> bytes:
        length, body = _pack(payload, 16, 0, self._random)
        sealed: bytes = length + self._aead.encrypt(self._nonce(), body, length)
        return sealed


class _GCMOpener(_GCM):
    head_size = 4

    def wire_size(self, sequence: int, head: bytes) -> int:
        return _whole(_LENGTH.unpack(head)[0], 16, 0, _TAG)

    def open(self, sequence: int, packet: bytes) -> bytes:
        try:
            return _unpack(self._aead.decrypt(self._nonce(), packet[4:], packet[:4]))
        except InvalidTag:
            raise BadPacketError("the tag is wrong", mac=True) from None


class _ChaCha:
    """PROTOCOL.chacha20poly1305: the length has a key of its own; the sequence number is the
    nonce, and the first block of the stream the key of the tag."""

    def __init__(self, key: bytes) -> None:
        self._main, self._header = (
            Cipher(ChaCha20(part, bytes(16)), None).encryptor() for part in (key[:32], key[32:])
        )

    def _begin(self, stream: Any, sequence: int) -> Any:
        # The counter of blocks, from 0, before the nonce.
        stream.reset_nonce(_COUNTER_AND_NONCE.pack(0, sequence))
        return stream.update


class _ChaChaSealer(_ChaCha):
    def __init__(self, key: bytes, random: Random) -> None:
        super().__init__(key)
        self._random = random

    def seal(self, sequence: int, payload: bytes) -> bytes:
        length, body = _pack(payload, 8, 0, self._random)
        crypt = self._begin(self._main, sequence)
        tag_key = crypt(_CHACHA_BLOCK)[:32]
        sent: bytes = self._begin(self._header, sequence)(length) + crypt(body)
        return sent + Poly1305.generate_tag(tag_key, sent)


class _ChaChaOpener(_ChaCha):
    head_size = 4

    def wire_size(self, sequence: int, head: bytes) -> int:
        length = self._begin(self._header, sequence)(head)
        return _whole(_LENGTH.unpack(length)[0], 8, 0, _TAG)

    def open(self, sequence: int, packet: bytes) -> bytes:
        crypt = self._begin(self._main, sequence)
        tag_key = crypt(_CHACHA_BLOCK)[:32]
        sent = packet[:-_TAG]
        try:
            Poly1305.verify_tag(tag_key, sent, packet[-_TAG:])
        except InvalidSignature:
            raise BadPacketError("the tag is wrong", mac=True) from None
        return _unpack(crypt(sent[4:]))
