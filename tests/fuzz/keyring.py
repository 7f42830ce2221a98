"""The keys that the harness signs with, and whether a login request may be granted."""

from __future__ import annotations

import struct
from collections.abc import Callable
from hashlib import sha256
from ipaddress import ip_address, ip_network
from typing import Any, NamedTuple

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa, utils
from twisted.conch.ssh.common import MP, NS, getNS
from twisted.conch.ssh.keys import Key

_SK = b"sk-ssh-ed25519@openssh.com"
_APPLICATION = b"ssh:"
PROVE = b"hostkeys-prove-00@openssh.com"
_HOME = ("198.51.100.0/24", "2001:db8:7::/48")
_HASHES = {b"rsa-sha2-256": hashes.SHA256(), b"rsa-sha2-512": hashes.SHA512()}


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

    @property
    def kind(self) -> bytes:
        """The ssh type."""
        return bytes(getNS(self.blob)[0])


def _known(private: Any, welcome: bool = True) -> Known:
    return Known(Key(private).public().blob(), private, welcome)


def _security_key(verify: bool = False) -> Known:
    private = ed25519.Ed25519PrivateKey.generate()
    blob = NS(_SK) + NS(private.public_key().public_bytes_raw()) + NS(_APPLICATION)
    return Known(blob, private, True, verify=verify)


def make_ring() -> dict[str, Known]:
    """A ring; the engine is to know all of it but ``stranger``. ``small`` is too small, ``pin``
    must verify its user, ``home`` is for some networks only."""
    home = _known(ed25519.Ed25519PrivateKey.generate())
    return {
        "alice": _known(ed25519.Ed25519PrivateKey.generate()),
        "rsa": _known(rsa.generate_private_key(65537, 2048)),
        "ecdsa": _known(ec.generate_private_key(ec.SECP256R1())),
        "sk": _security_key(),
        "pin": _security_key(verify=True),
        "home": home._replace(sources=_HOME),
        "small": _known(rsa.generate_private_key(65537, 1024), False),
        "stranger": _known(ed25519.Ed25519PrivateKey.generate(), False),
    }


def sign(known: Known, message: bytes, algorithm: bytes, how: str) -> bytes:
    """An ssh signature. ``how`` is empty, or ``absent`` (nobody touches the security key),
    ``pin`` (it verifies its user), ``other`` (another message), ``sha1`` (RSA with SHA-1 behind
    the algorithm's name)."""
    if how == "other":
        message += b"\0"
    private = known.private
    if known.kind == _SK:
        extra = {"absent": b"\0", "pin": b"\5"}.get(how, b"\1") + struct.pack(">L", 7)
        signed = sha256(_APPLICATION).digest() + extra + sha256(message).digest()
        return NS(algorithm) + NS(private.sign(signed)) + extra
    if isinstance(private, rsa.RSAPrivateKey):
        digest = hashes.SHA1() if how == "sha1" else _HASHES.get(algorithm, hashes.SHA256())
        return NS(algorithm) + NS(private.sign(message, padding.PKCS1v15(), digest))
    if isinstance(private, ec.EllipticCurvePrivateKey):
        pair = utils.decode_dss_signature(private.sign(message, ec.ECDSA(hashes.SHA256())))
        return NS(algorithm) + NS(MP(pair[0]) + MP(pair[1]))
    return NS(algorithm) + NS(private.sign(message))


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


class Request(NamedTuple):
    """A USERAUTH_REQUEST as the harness itself reads it."""

    key: Known | None
    signed: bool
    good: bool
    """Somebody who may log in has signed just this, for this session."""
    exact: bool
    """No length in the signature lies."""


def judge(
    reader: Reader,
    session: bytes,
    ring: dict[str, Known],
    users: frozenset[bytes],
    certified: Callable[[bytes], bytes | None] = lambda blob: None,
) -> Request:
    """What is to be thought of a USERAUTH_REQUEST (RFC 4252, section 7). Raises Malformed.

    ``certified`` is the key in a certificate that is good, or None.
    """
    user, service, method = reader.string(), reader.string(), reader.string()
    if method != b"publickey":
        return Request(None, False, False, False)
    signed = reader.boolean()
    algorithm, blob = reader.string(), reader.string()
    in_certificate = certified(blob) if b"-cert-" in algorithm else None
    shown = blob if in_certificate is None else in_certificate
    known = next((each for each in ring.values() if each.blob == shown), None)
    # A key in a certificate need not be known otherwise.
    welcome = known is not None and (known.welcome or in_certificate is not None)
    welcome = welcome and user in users
    welcome = welcome and service == b"ssh-connection"
    if not signed:
        return Request(known if welcome else None, False, False, False)
    signature = reader.string()
    head = NS(user) + NS(service) + NS(method) + b"\1" + NS(algorithm) + NS(blob)
    message = NS(session) + b"\x32" + head
    good = exact = False
    if welcome and known is not None:
        made_with = algorithm if in_certificate is None else known.kind
        good = _verified(known, made_with, Reader(signature, lenient=True), message)
        # Whether certificates are for logins at all is the configuration's to say.
        exact = in_certificate is None and _verified(known, made_with, Reader(signature), message)
    return Request(known if welcome else None, True, good, exact)


def _verified(known: Known, algorithm: bytes, reader: Reader, message: bytes) -> bool:
    public = known.private.public_key()
    try:
        named, value = reader.string(), reader.string()
        if named != algorithm:
            return False
        if known.kind == b"ssh-rsa":
            if algorithm not in _HASHES:
                return False
            public.verify(value, message, padding.PKCS1v15(), _HASHES[algorithm])
        elif algorithm != known.kind:
            return False
        elif known.kind == _SK:
            extra = reader.take(5)
            if len(extra) < 5 or not extra[0] & 1 or (known.verify and not extra[0] & 4):
                return False
            public.verify(value, sha256(_APPLICATION).digest() + extra + sha256(message).digest())
        elif isinstance(public, ec.EllipticCurvePublicKey):
            pair = Reader(value)
            r, s = (int.from_bytes(pair.string(), "big") for _ in range(2))
            public.verify(utils.encode_dss_signature(r, s), message, ec.ECDSA(hashes.SHA256()))
        else:
            public.verify(value, message)
    except (InvalidSignature, Malformed, ValueError):
        return False
    return True
