"""Public keys as users give them: lines of authorized_keys, pasted or in a file."""

from __future__ import annotations

import re

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import load_ssh_public_key

from vmconsole.engine.keyline import KeyLine, parse_key_line
from vmconsole.errors import StoreError
from vmconsole.publickeys import RSA_BITS

# Also without its first line, as what stands behind a public key: how the base64 of such a key
# begins. "MII" is in some public keys, too, but in none at the beginning.
_PRIVATE_KEY = re.compile(
    r"(?i:PRIVATE KEY|PuTTY-User-Key-File)"
    # OpenSSH's own format.
    r"|b3BlbnNzaC1rZXktdjE"
    # PKCS#8, ed25519.
    r"|MC4CAQAw"
    r"|(?<![A-Za-z0-9+/])(?:"
    # What takes 256 bytes and more: PKCS#1, PKCS#8 with RSA.
    r"MII"
    # 128 bytes and more: SEC 1, PKCS#8 with EC; encrypted PKCS#8.
    r"|MI[GH].(?:AgE[AB]|M[A-P].GCSqGSIb3)"
    # Less: SEC 1 with P-256, PKCS#8 with Ed448.
    r"|M[A-P].CAQ[AE]"
    r")[A-Za-z0-9+/]{20}"
)


def parse_public_keys(text: str) -> list[KeyLine]:
    """The keys in the lines of ``text``; comments and blank lines are left out.

    Raises StoreError, whose text never holds what was read: it may be a private key.
    """
    if _PRIVATE_KEY.search(text):
        raise StoreError("This is a private key. Give the public one: its file ends in .pub.")
    lines = [line.strip() for line in re.split("\r\n|\r|\n", text)]
    numbered = [(at, line) for at, line in enumerate(lines, 1) if line and line[0] != "#"]
    if not numbered:
        raise StoreError("There is no key in it.")
    return [_parse_public_key(at, line) for at, line in numbered]


def _parse_public_key(at: int, line: str) -> KeyLine:
    try:
        key = parse_key_line(line)
        # Into authorized_keys files of other proxies, too: there a line break would be an entry.
        if not key.comment.isprintable():
            raise ValueError("its comment has control characters")
        # As it will be given out: the options may be longer now than what anybody reads.
        parse_key_line(f"{key.options} {key}")
        public = load_ssh_public_key(f"{key.type} {str(key).split()[1]}".encode())
        if isinstance(public, rsa.RSAPublicKey) and public.key_size not in RSA_BITS:
            raise ValueError(
                f"an RSA key needs {RSA_BITS[0]} to {RSA_BITS[-1]} bits, "
                f"and this one has {public.key_size}"
            )
    except UnsupportedAlgorithm:
        raise StoreError(f"Line {at}: the key's type is not accepted.") from None
    except ValueError as error:
        raise StoreError(f"Line {at}: {error}.") from None
    return key
