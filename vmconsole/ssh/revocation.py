"""The revocation list: keys and certificates that let nobody in, whatever else says so."""

from __future__ import annotations

import re
from base64 import b64decode
from bisect import bisect_right
from collections.abc import Iterable
from hashlib import sha256
from itertools import pairwise

import msgspec
from twisted.conch.ssh.keys import Key

from vmconsole.publickeys import decode_key
from vmconsole.ssh.certificates import SUFFIX, UNPARSABLE, Certificate

# What a binary KRL begins with (OpenSSH's PROTOCOL.krl).
_KRL = b"SSHKRL\n\0"
_SERIALS = re.compile(r"(0|[1-9][0-9]*|0x[0-9a-f]+)(?:[ \t]*-[ \t]*(0|[1-9][0-9]*|0x[0-9a-f]+))?")
_HASH = re.compile("SHA256:([A-Za-z0-9+/]{43})=?")
_FIELD = re.compile(r"(serial|id|key|sha1|sha256|hash):[ \t]*(.*)", re.IGNORECASE)
_LARGEST_SERIAL = 0xFFFFFFFFFFFFFFFF


class RevocationList(msgspec.Struct, frozen=True):
    """What is revoked. Serials and ids count for certificates of any CA."""

    digests: frozenset[bytes] = frozenset()
    """SHA-256 of the blobs of keys: users' and CAs'."""
    ids: frozenset[bytes] = frozenset()
    serials: tuple[tuple[int, int], ...] = ()
    """Ranges, first and last, in order, that do not touch each other."""

    def revokes_key(self, blob: bytes) -> bool:
        """Whether a key is revoked, whoever has it."""
        return sha256(blob).digest() in self.digests

    def revokes(self, certificate: Certificate) -> bool:
        """Whether a certificate is, or its key, or its CA's."""
        return (
            certificate.id in self.ids
            or self._has_serial(certificate.serial)
            or self.revokes_key(certificate.key_blob)
            or self.revokes_key(certificate.ca)
        )

    def _has_serial(self, serial: int) -> bool:
        at = bisect_right(self.serials, (serial, _LARGEST_SERIAL)) - 1
        return at >= 0 and serial <= self.serials[at][1]


def parse_revocation_list(content: bytes) -> RevocationList:
    """Read lines of public keys, fingerprints, and ssh-keygen's KRL specification.

    Raises ValueError, which names the line: what is not understood could be somebody's key that
    has to be kept out. Source: ssh-keygen(1), "KEY REVOCATION LISTS".
    """
    if content.startswith(_KRL):
        raise ValueError("a binary KRL is not read here: give the text that it was made of")
    digests: set[bytes] = set()
    ids: set[bytes] = set()
    serials: list[tuple[int, int]] = []
    for number, raw in enumerate(content.split(b"\n"), 1):
        # As ssh-keygen does it, wherever it stands.
        if b"\r" in raw.removesuffix(b"\r"):
            # Another line perhaps, which would be lost in a comment.
            raise ValueError(f"line {number}: there is a carriage return within it")
        before, comment, _ = raw.partition(b"#")
        line = before.strip()
        if not line:
            continue
        try:
            if comment and line[:3].lower() == b"id:" and not before[-1:].isspace():
                raise ValueError("an id with a # cannot be named here: revoke it by its serial")
            _read(line.decode(), digests, ids, serials)
        except UnicodeDecodeError:
            raise ValueError(f"line {number}: it is no UTF-8") from None
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None
    return RevocationList(frozenset(digests), frozenset(ids), _joined(serials))


def _read(line: str, digests: set[bytes], ids: set[bytes], serials: list[tuple[int, int]]) -> None:
    # A bare fingerprint begins like a field.
    field = None if _HASH.fullmatch(line) else _FIELD.fullmatch(line)
    name, value = (field[1].lower(), field[2]) if field else ("", line)
    if name == "serial":
        serials.append(_serials(value))
    elif name == "id":
        if not value:
            raise ValueError("an id is missing")
        ids.add(value.encode())
    elif name == "hash" or _HASH.fullmatch(line):
        digests.add(_digest(value))
    else:
        digests.add(sha256(read_key_line(value)[1]).digest())


def _serials(text: str) -> tuple[int, int]:
    found = _SERIALS.fullmatch(text.lower())
    if found is None:
        raise ValueError("no serial number, nor a range N-M of them")
    first = int(found[1], 0)
    last = int(found[2], 0) if found[2] else first
    if not 0 < first <= last <= _LARGEST_SERIAL:
        # 0 is what certificates have that were given none.
        raise ValueError("serial numbers are 1 to 2^64-1, and a range begins with the lower one")
    return first, last


def _digest(text: str) -> bytes:
    found = _HASH.fullmatch(text)
    if found is None:
        raise ValueError("no fingerprint as ssh-keygen -l shows it (SHA256:...)")
    return b64decode(found[1] + "=")


def read_key_line(line: str) -> tuple[str, bytes]:
    """What stands before the key in a line as authorized_keys has them, and the key's blob.

    Raises ValueError, whose text holds nothing of the line.
    """
    words = line.split()
    decoded = [decode_key(kind, text) for kind, text in pairwise(words)]
    at, blob = next(((at, blob) for at, blob in enumerate(decoded) if blob is not None), (0, b""))
    if not blob:
        raise ValueError("there is no public key in it, nor anything else that is known")
    kind, before = words[at], " ".join(words[:at])
    if ":" in before and '"' not in before:
        raise ValueError("what stands before the key is not known")
    if kind.encode().endswith(SUFFIX):
        raise ValueError("it is a certificate; a public key, an id or a serial is meant here")
    try:
        key = Key.fromString(blob, type="BLOB")
        whole = key.blob() == blob
    except UNPARSABLE:
        whole = False
    if not whole:
        raise ValueError("its public key is damaged, or of an unknown type")
    return before, blob


def _joined(ranges: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    joined: list[tuple[int, int]] = []
    for first, last in sorted(ranges):
        if joined and first <= joined[-1][1] + 1:
            joined[-1] = (joined[-1][0], max(joined[-1][1], last))
        else:
            joined.append((first, last))
    return tuple(joined)
