"""Which requests to log in may be granted (RFC 4252, section 7), told without the server's code."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256
from typing import NamedTuple

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa, utils
from twisted.conch.ssh.common import NS

from tests.fuzz.authority import SUFFIX
from tests.fuzz.certify import NO_CERTIFICATE, Judged, Worth
from tests.fuzz.keyring import APPLICATION, RSA_HASHES, SECURITY_KEY, Known, Malformed, Reader

_LEAST_RSA_BITS = 2048


class Request(NamedTuple):
    """A USERAUTH_REQUEST as the harness itself reads it."""

    key: Known | None
    """One that may log in, or is in a certificate that lets in."""
    signed: bool
    good: bool = False
    """Somebody who may log in has signed just this, for this session."""
    exact: bool = False
    """No length in the signature lies, and there is nothing else for which it may be refused; of
    a certificate that is only asked about: that must be granted."""
    user: str = ""
    """Who that is."""
    certificate: Judged | None = None
    told: bool = False
    """The client is told why its certificate does not count."""
    asked: bool = False
    """Without a signature, it may be granted."""


def judge(
    reader: Reader,
    session: bytes,
    ring: dict[str, Known],
    users: frozenset[bytes],
    certified: Callable[[bytes], Judged] = lambda blob: NO_CERTIFICATE,
) -> Request:
    """What is to be thought of a request. Raises Malformed. ``certified`` judges a certificate."""
    name, service, method = reader.string(), reader.string(), reader.string()
    if method != b"publickey":
        return Request(None, False)
    signed = reader.boolean()
    algorithm, blob = reader.string(), reader.string()
    if algorithm.endswith(SUFFIX):
        judged = certified(blob)
        known = _certified_key(algorithm, blob, judged, ring)
        user, exact = judged.user, judged.worth is Worth.GOOD
    else:
        judged = None
        known = next((each for each in ring.values() if each.blob == blob), None)
        known = known if known is not None and known.welcome else None
        user, exact = known.user if known is not None else "", True
    here = name in users and service == b"ssh-connection"
    known = known if here else None
    told = here and judged is not None and judged.told and _fits(algorithm, blob)
    if not signed:
        exact = known is not None and judged is not None and exact
        # A certificate may be for a key that is none of the ring's.
        foreign = judged is not None and judged.worth is not Worth.BAD and _fits(algorithm, blob)
        asked = known is not None or (here and foreign)
        return Request(known, False, exact=exact, certificate=judged, told=told, asked=asked)
    signature = reader.string()
    if known is None:
        return Request(None, True, certificate=judged, told=told)
    head = NS(name) + NS(service) + NS(method) + b"\1" + NS(algorithm) + NS(blob)
    message = NS(session) + b"\x32" + head
    made_with = algorithm.removesuffix(SUFFIX)
    good = _verified(known, made_with, Reader(signature, lenient=True), message)
    exact = exact and _verified(known, made_with, Reader(signature), message)
    return Request(known, True, good, exact, user, judged, told)


def _certified_key(
    algorithm: bytes, blob: bytes, judged: Judged, ring: dict[str, Known]
) -> Known | None:
    if judged.worth is Worth.BAD:
        return None
    # The engine need not know it.
    known = next((each for each in ring.values() if each.blob == judged.key), None)
    if known is None or not _fits(algorithm, blob):
        return None
    public = known.private.public_key()
    weak = isinstance(public, rsa.RSAPublicKey) and public.key_size < _LEAST_RSA_BITS
    return None if weak else known


def _fits(algorithm: bytes, blob: bytes) -> bool:
    """The algorithm is one of the certificate's type."""
    plain = algorithm.removesuffix(SUFFIX)
    # That would be SHA-1.
    if plain == b"ssh-rsa":
        return False
    return blob.startswith(NS((b"ssh-rsa" if plain in RSA_HASHES else plain) + SUFFIX))


def _verified(known: Known, algorithm: bytes, reader: Reader, message: bytes) -> bool:
    public = known.private.public_key()
    try:
        named, value = reader.string(), reader.string()
        if named != algorithm:
            return False
        if known.kind == b"ssh-rsa":
            if algorithm not in RSA_HASHES:
                return False
            public.verify(value, message, padding.PKCS1v15(), RSA_HASHES[algorithm])
        elif algorithm != known.kind:
            return False
        elif known.kind == SECURITY_KEY:
            extra = reader.take(5)
            if len(extra) < 5 or not extra[0] & 1 or (known.verify and not extra[0] & 4):
                return False
            public.verify(value, sha256(APPLICATION).digest() + extra + sha256(message).digest())
        elif isinstance(public, ec.EllipticCurvePublicKey):
            pair = Reader(value)
            r, s = (int.from_bytes(pair.string(), "big") for _ in range(2))
            public.verify(utils.encode_dss_signature(r, s), message, ec.ECDSA(hashes.SHA256()))
        else:
            public.verify(value, message)
    except (InvalidSignature, Malformed, ValueError):
        return False
    return True
