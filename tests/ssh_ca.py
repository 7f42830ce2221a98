"""A CA that issues OpenSSH certificates, sound ones and others (OpenSSH's PROTOCOL.certkeys)."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from twisted.conch.ssh.common import NS, getNS
from twisted.conch.ssh.keys import Key

SUFFIX = b"-cert-v01@openssh.com"
FOREVER = 0xFFFFFFFFFFFFFFFF
USER, HOST = 1, 2
PERMIT_PTY = {b"permit-pty": b""}


def ed25519_key() -> Key:
    """A new key."""
    return Key(ed25519.Ed25519PrivateKey.generate())


def rsa_key(bits: int = 2048) -> Key:
    """A new key."""
    return Key(rsa.generate_private_key(65537, bits))


def ecdsa_key(curve: type[ec.EllipticCurve] = ec.SECP256R1) -> Key:
    """A new key."""
    return Key(ec.generate_private_key(curve()))


def issue(
    ca: Key,
    key: Any,
    *,
    kind: int = USER,
    serial: int = 7,
    id: bytes = b"alice@laptop",
    principals: Iterable[bytes] = (b"alice@internal",),
    valid_after: int = 0,
    valid_before: int = FOREVER,
    critical: Mapping[bytes, bytes] | bytes = b"",
    extensions: Mapping[bytes, bytes] = PERMIT_PTY,
    algorithm: bytes = b"",
    signed_by: Key | None = None,
) -> bytes:
    """The blob of a certificate for ``key``.

    ``algorithm`` is what the CA signs with; ``critical`` may be the bytes themselves.
    """
    public = key.public().blob()
    name, fields = getNS(public)
    body = (
        NS(name + SUFFIX)
        + NS(b"a nonce of some bytes")
        + fields
        + struct.pack(">QL", serial, kind)
        + NS(id)
        + NS(b"".join(map(NS, principals)))
        + struct.pack(">QQ", valid_after, valid_before)
        + NS(critical if isinstance(critical, bytes) else options(critical))
        + NS(options(extensions))
        + NS(b"")
        + NS(ca.public().blob())
    )
    default = b"rsa-sha2-512" if ca.sshType() == b"ssh-rsa" else ca.sshType()
    return body + NS((signed_by or ca).sign(body, algorithm or default))


def options(values: Mapping[bytes, bytes]) -> bytes:
    """Critical options, or extensions, in order."""
    return b"".join(
        NS(name) + NS(NS(value) if value else b"") for name, value in sorted(values.items())
    )


def public_line(key: Any) -> str:
    """As in a .pub file."""
    return str(key.public().toString("OPENSSH").decode())
