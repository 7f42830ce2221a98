"""A software authenticator: keys and signatures of the sk- types (OpenSSH's PROTOCOL.u2f)."""

from __future__ import annotations

import struct
from hashlib import sha256

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from twisted.conch.ssh.common import MP, NS

USER_PRESENT = 0x01
USER_VERIFIED = 0x04
SK_ED25519 = b"sk-ssh-ed25519@openssh.com"
SK_ECDSA = b"sk-ecdsa-sha2-nistp256@openssh.com"


class Authenticator:
    """One key, which signs whatever is asked, with whatever flags.

    ``application`` is what the public key names, and what signatures are made for.
    """

    def __init__(self, kind: bytes = SK_ED25519, application: bytes = b"ssh:") -> None:
        self.kind = kind
        self.application = application
        self.counter = 6
        self._ed25519 = ed25519.Ed25519PrivateKey.generate()
        self._ecdsa = ec.generate_private_key(ec.SECP256R1())

    @property
    def blob(self) -> bytes:
        """The public key."""
        if self.kind == SK_ED25519:
            key = NS(self._ed25519.public_key().public_bytes_raw())
        else:
            key = NS(b"nistp256") + NS(
                self._ecdsa.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
            )
        return NS(self.kind) + key + NS(self.application)

    def sign(
        self,
        message: bytes,
        flags: int = USER_PRESENT,
        counter: int | None = None,
        application: bytes | None = None,
    ) -> bytes:
        """The signature blob, for ssh's message; the counter goes up by itself."""
        self.counter += 1
        trailer = struct.pack(">BL", flags, self.counter if counter is None else counter)
        for_application = self.application if application is None else application
        signed = sha256(for_application).digest() + trailer + sha256(message).digest()
        if self.kind == SK_ED25519:
            signature = self._ed25519.sign(signed)
        else:
            r, s = decode_dss_signature(self._ecdsa.sign(signed, ec.ECDSA(hashes.SHA256())))
            signature = MP(r) + MP(s)
        return NS(self.kind) + NS(signature) + trailer
