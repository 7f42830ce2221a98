"""The keys that the harness signs with, and whether a login request may be granted."""

from __future__ import annotations

import struct
from functools import cache
from hashlib import sha256
from ipaddress import ip_address, ip_network
from typing import Any, NamedTuple

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa, utils
from twisted.conch.ssh.common import MP, NS, getNS
from twisted.conch.ssh.keys import Key

SECURITY_KEY = b"sk-ssh-ed25519@openssh.com"
APPLICATION = b"ssh:"
PROVE = b"hostkeys-prove-00@openssh.com"
_HOME = ("198.51.100.0/24", "2001:db8:7::/48")
RSA_HASHES = {b"rsa-sha2-256": hashes.SHA256(), b"rsa-sha2-512": hashes.SHA512()}


class Malformed(Exception):
    """Bytes that are not what the RFC says; ours, for what the harness reads by itself."""


class Reader:
    """Reads fields (RFC 4251, section 5). Raises Malformed; a ``lenient`` one only for a number
    that is cut, and takes a string that is cut for a shorter one, as Conch does."""

    def __init__(self, data: bytes, lenient: bool = False) -> None:
        self.rest = data
        self._lenient = lenient

    def take(self, size: int) -> bytes:
        """So many bytes."""
        if len(self.rest) < size and not self._lenient:
            raise Malformed
        taken, self.rest = self.rest[:size], self.rest[size:]
        return taken

    def string(self) -> bytes:
        """A string."""
        return self.take(self.uint32())

    def uint32(self) -> int:
        """A uint32."""
        taken = self.take(4)
        if len(taken) < 4:
            raise Malformed
        return int.from_bytes(taken, "big")

    def boolean(self) -> bool:
        """A boolean."""
        return self.take(1) != b"\0"


class Known(NamedTuple):
    """A key of the ring: its blob, what signs, and whether it may log in at all."""

    blob: bytes
    private: Any
    welcome: bool
    sources: tuple[str, ...] = ()
    """Networks that it may be used from; none: from anywhere."""
    verify: bool = False
    """The security key must have verified its user."""
    user: str = "alice@internal"
    """Whose it is."""

    @property
    def kind(self) -> bytes:
        """The ssh type."""
        return bytes(getNS(self.blob)[0])


def key_of(
    private: Any, welcome: bool = True, security_key: bool = False, verify: bool = False
) -> Known:
    """A key; an ed25519 one may be a security key's."""
    blob = Key(private).public().blob()
    if security_key:
        blob = NS(SECURITY_KEY) + getNS(blob, 1)[1] + NS(APPLICATION)
    return Known(blob, private, welcome, verify=verify)


@cache
def make_ring() -> dict[str, Known]:
    """The ring, made once, since RSA keys take a while; the engine is to know all of it but
    ``stranger``. ``small`` is too small, ``pin`` must verify its user, ``home`` is for some
    networks only, ``bob`` is another user's, and ``lost`` is revoked."""
    fresh = ed25519.Ed25519PrivateKey.generate
    return {
        "alice": key_of(fresh()),
        "rsa": key_of(rsa.generate_private_key(65537, 2048)),
        "ecdsa": key_of(ec.generate_private_key(ec.SECP256R1())),
        "sk": key_of(fresh(), security_key=True),
        "pin": key_of(fresh(), security_key=True, verify=True),
        "home": key_of(fresh())._replace(sources=_HOME),
        "small": key_of(rsa.generate_private_key(65537, 1024), False),
        "stranger": key_of(fresh(), False),
        "bob": key_of(fresh())._replace(user="bob@internal"),
        "lost": key_of(fresh(), False),
    }


def sign(known: Known, message: bytes, algorithm: bytes, how: str) -> bytes:
    """An ssh signature. ``how`` is empty, or ``absent`` (nobody touches the security key),
    ``pin`` (it verifies its user), ``other`` (another message), ``sha1`` (RSA with SHA-1 behind
    the algorithm's name)."""
    if how == "other":
        message += b"\0"
    private = known.private
    if known.kind == SECURITY_KEY:
        extra = {"absent": b"\0", "pin": b"\5"}.get(how, b"\1") + struct.pack(">L", 7)
        signed = sha256(APPLICATION).digest() + extra + sha256(message).digest()
        return NS(algorithm) + NS(private.sign(signed)) + extra
    if isinstance(private, rsa.RSAPrivateKey):
        digest = hashes.SHA1() if how == "sha1" else RSA_HASHES.get(algorithm, hashes.SHA256())
        return NS(algorithm) + NS(private.sign(message, padding.PKCS1v15(), digest))
    if isinstance(private, ec.EllipticCurvePrivateKey):
        pair = utils.decode_dss_signature(private.sign(message, ec.ECDSA(_digest(private))))
        return NS(algorithm) + NS(MP(pair[0]) + MP(pair[1]))
    return NS(algorithm) + NS(private.sign(message))


def _digest(private: ec.EllipticCurvePrivateKey) -> hashes.HashAlgorithm:
    # RFC 5656, section 6.2.1.
    return hashes.SHA256() if private.key_size <= 256 else hashes.SHA512()


def ring_at(ring: dict[str, Known], address: str) -> dict[str, Known]:
    """The ring, as it counts for a client at this IP address."""
    here = ip_address(address)

    def welcome(known: Known) -> bool:
        return any(here in ip_network(each) for each in known.sources)

    return {
        name: known._replace(welcome=welcome(known)) if known.sources else known
        for name, known in ring.items()
    }


def proves(answer: bytes, asked: bytes, session: bytes) -> bool:
    """Whether there is a signature for each ed25519 host key in ``asked`` (OpenSSH's PROTOCOL,
    section 2.5), and nothing else. Raises Malformed."""
    # Conch takes a string that is cut for a shorter one.
    keys, signatures = Reader(asked, lenient=True), Reader(answer)
    while keys.rest:
        blob, signature = keys.string(), Reader(signatures.string())
        kind, value = signature.string(), signature.string()
        public = ed25519.Ed25519PublicKey.from_public_bytes(blob[-32:])
        try:
            public.verify(value, NS(PROVE) + NS(session) + NS(blob))
        except InvalidSignature:
            return False
        if kind != b"ssh-ed25519" or signature.rest:
            return False
    return bool(asked) and not signatures.rest
