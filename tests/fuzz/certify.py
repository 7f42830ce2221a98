"""OpenSSH user certificates (PROTOCOL.certkeys), good ones and others, and which are good."""

from __future__ import annotations

import struct
from base64 import b64encode

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ed25519
from twisted.conch.ssh.common import NS, getNS

from tests.fuzz.keyring import Known, Malformed, Reader

KIND = b"ssh-ed25519-cert-v01@openssh.com"
HOWS = ("", "", "", "host", "expired", "somebody", "nobody", "forced", "option", "stranger")
"""What is wrong with a certificate; empty: nothing."""
_USER = 1
_FOR_EVER = 2**64 - 1
AUTHORITY = ed25519.Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
STRANGER = ed25519.Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33)))
_PRINCIPALS = {"somebody": NS(b"mallory"), "nobody": b""}
_OPTIONS = {"forced": NS(b"force-command") + NS(NS(b"list")), "option": NS(b"x@y") + NS(b"")}


def public_line(key: ed25519.Ed25519PrivateKey = AUTHORITY) -> str:
    """A CA's public key, as a file of trusted CAs has it."""
    return f"ssh-ed25519 {b64encode(_blob(key)).decode()} a CA\n"


def _blob(key: ed25519.Ed25519PrivateKey) -> bytes:
    return NS(b"ssh-ed25519") + NS(key.public_key().public_bytes_raw())


def certificate(known: Known, name: bytes, how: str) -> bytes:
    """A certificate for an ed25519 key and the user of this name."""
    authority = STRANGER if how == "stranger" else AUTHORITY
    body = (
        NS(KIND)
        + NS(bytes(32))
        + NS(getNS(known.blob, 2)[1])
        + struct.pack(">QL", 1, 2 if how == "host" else _USER)
        + NS(b"a certificate")
        + NS(_PRINCIPALS.get(how, NS(name)))
        + struct.pack(">QQ", 0, 0 if how == "expired" else _FOR_EVER)
        + NS(_OPTIONS.get(how, b""))
        + NS(b"") * 2
        + NS(_blob(authority))
    )
    return body + NS(NS(b"ssh-ed25519") + NS(authority.sign(body)))


def certified(blob: bytes, name: bytes) -> bytes | None:
    """The key that a good certificate for the user of this name is about; None: it is not good.

    One with ``force-command`` is: what it is good for is another matter.
    """
    reader = Reader(blob)
    try:
        kind, _, public = reader.string(), reader.string(), reader.string()
        _, usage = reader.take(8), reader.uint32()
        _, principals = reader.string(), Reader(reader.string())
        after, before = struct.unpack(">QQ", reader.take(16))
        options, _, _, authority = (reader.string() for _ in range(4))
        body = blob[: len(blob) - len(reader.rest)]
        signature = Reader(reader.string())
        names = []
        while principals.rest:
            names.append(principals.string())
        named, value = signature.string(), signature.string()
        AUTHORITY.public_key().verify(value, body)
    except (Malformed, InvalidSignature):
        return None
    good = kind == KIND and usage == _USER and name in names and after < before
    good = good and authority == _blob(AUTHORITY) and named == b"ssh-ed25519"
    good = good and options in (b"", _OPTIONS["forced"])
    return NS(b"ssh-ed25519") + NS(public) if good else None
