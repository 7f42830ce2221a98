"""Key pairs for users, in the formats of OpenSSH."""

from __future__ import annotations

from typing import Literal, NamedTuple

from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

# Bytes; ssh-keygen reads no longer ones.
LONGEST_PASSPHRASE = 1023

_RSA_BITS = 3072


class KeyPair(NamedTuple):
    """The private key's file, and the public key's line without a comment."""

    private: bytes
    public: str


def generate_key_pair(kind: Literal["ed25519", "rsa"], passphrase: bytes = b"") -> KeyPair:
    """A new pair, the private key encrypted if there is a passphrase. RSA takes seconds at times.

    Raises ValueError for a passphrase that is too long.
    """
    key: Ed25519PrivateKey | rsa.RSAPrivateKey = (
        Ed25519PrivateKey.generate()
        if kind == "ed25519"
        else rsa.generate_private_key(65537, _RSA_BITS)
    )
    encryption = BestAvailableEncryption(passphrase) if passphrase else NoEncryption()
    return KeyPair(
        key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, encryption),
        key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode(),
    )
