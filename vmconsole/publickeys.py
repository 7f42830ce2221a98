"""Which public keys may log in here, and what they are called."""

from __future__ import annotations

import binascii
from base64 import b64encode
from hashlib import sha256

KEY_TYPES = frozenset(
    {
        "ssh-ed25519",
        "ssh-rsa",
        "ecdsa-sha2-nistp256",
        "ecdsa-sha2-nistp384",
        "ecdsa-sha2-nistp521",
        "sk-ssh-ed25519@openssh.com",
        "sk-ecdsa-sha2-nistp256@openssh.com",
    }
)
# Sizes of RSA keys that are taken from users, in bits.
RSA_BITS = range(2048, 16385)


def decode_key(kind: str, text: str) -> bytes | None:
    """The blob in the base64 of a line of OpenSSH's, if it is one of a key of this type.

    That it is a sound key is not checked.
    """
    try:
        blob = binascii.a2b_base64(text, strict_mode=True)
    except ValueError:
        return None
    # A key names its type in the line and, first thing, in the blob.
    length = int.from_bytes(blob[:4], "big")
    if len(blob) < 5 or blob[4 : 4 + length].decode("latin-1") != kind:
        return None
    return blob


def fingerprint(blob: bytes) -> str:
    """``SHA256:...`` of a key's blob (RFC 4253, section 6.6), as ssh-keygen -l shows it."""
    return "SHA256:" + b64encode(sha256(blob).digest()).decode().rstrip("=")
