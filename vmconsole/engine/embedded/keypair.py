"""Key pairs for users, in the formats of OpenSSH."""

from __future__ import annotations

from typing import Literal, NamedTuple

from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

_RSA_BITS = 3072


class KeyPair(NamedTuple):
    """The private key's file (not encrypted), and the public key's line without a comment."""

    private: bytes
    public: str


def generate_key_pair(kind: Literal["ed25519", "rsa"]) -> KeyPair:
    """A new pair; RSA takes seconds at times."""
    key: Ed25519PrivateKey | rsa.RSAPrivateKey = (
        Ed25519PrivateKey.generate()
        if kind == "ed25519"
        else rsa.generate_private_key(65537, _RSA_BITS)
    )
    return KeyPair(
        key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()),
        key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode(),
    )
