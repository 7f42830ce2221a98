"""Which certificates let in, and as whom, by the harness's own reading of OpenSSH's
PROTOCOL.certkeys and of the README ("Certificates"); none of the server's code is asked."""

from __future__ import annotations

import struct
from base64 import b64encode
from collections.abc import Mapping
from enum import Enum, auto
from ipaddress import ip_address, ip_network
from itertools import pairwise
from typing import Any, NamedTuple

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa, utils
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from twisted.conch.ssh.common import NS

from tests.fuzz.authority import HOST, SUFFIX, USER, ecdsa_pair
from tests.fuzz.keyring import Malformed, Reader

# Type of the certified key -> how many strings it has.
_KEYS = {b"ssh-ed25519": 1, b"ssh-rsa": 2, b"ecdsa-sha2-nistp256": 2}
_CURVES = {
    b"ecdsa-sha2-nistp256": hashes.SHA256(),
    b"ecdsa-sha2-nistp384": hashes.SHA384(),
    b"ecdsa-sha2-nistp521": hashes.SHA512(),
}
_RSA = {b"rsa-sha2-256": hashes.SHA256(), b"rsa-sha2-512": hashes.SHA512()}
_LEAST_RSA_BITS = 2048
# What cryptography raises for what is no signature, or no key.
_NO_SIGNATURE = (
    *(InvalidSignature, UnsupportedAlgorithm, NotImplementedError),
    *(ValueError, TypeError, KeyError),
)
# As OpenSSH has it; and what is far more than anybody has.
_MOST_PRINCIPALS, _MOST_OPTIONS = 256, 100


class Worth(Enum):
    """What a certificate is worth."""

    GOOD = auto()
    BAD = auto()
    LAX = auto()
    """Other servers take it, or need not: it may be refused."""


class Truth(NamedTuple):
    """What the server was told of whom to trust."""

    trusted: frozenset[bytes]
    """The CAs' keys."""
    keys: frozenset[bytes] = frozenset()
    """What is revoked: keys, ids, and ranges of serials."""
    ids: frozenset[bytes] = frozenset()
    serials: frozenset[tuple[int, int]] = frozenset()

    def revokes(self, read: Read) -> bool:
        """Whether a certificate is revoked, or its key or its CA's."""
        return (
            read.key in self.keys
            or read.authority in self.keys
            or read.id in self.ids
            or any(first <= read.serial <= last for first, last in self.serials)
        )


class Read(NamedTuple):
    """A certificate, field by field."""

    kind: bytes
    key: bytes
    """The certified key's blob, its numbers as RFC 4251 has them."""
    tidy: bool
    """They were written like that."""
    serial: int
    usage: int
    id: bytes
    principals: tuple[bytes, ...]
    after: int
    before: int
    options: tuple[tuple[bytes, bytes], ...]
    extensions: tuple[tuple[bytes, bytes], ...]
    authority: bytes
    body: bytes
    signature: bytes


class Judged(NamedTuple):
    """A certificate, judged."""

    worth: Worth
    key: bytes = b""
    user: str = ""
    """Whom it lets in."""
    terminal: bool = False
    """They may have one."""
    forced: bytes | None = None
    """The command line that runs instead of theirs."""
    vouched: bool = False
    """A trusted CA has signed it, so that its client may be told why it does not count."""
    told: bool = False
    """It does not count, and its client is told why."""
    read: Read | None = None

    @property
    def before(self) -> int:
        """The first moment from which on it does not count, in seconds since the epoch."""
        return 0 if self.read is None else self.read.before


NO_CERTIFICATE = Judged(Worth.BAD)
"""What is none."""


def read_certificate(blob: bytes) -> Read:
    """The fields, of which none may be cut, and behind which there is nothing. Raises Malformed."""
    reader = Reader(blob)
    kind, _ = reader.string(), reader.string()
    plain = kind.removesuffix(SUFFIX)
    if plain not in _KEYS or kind == plain:
        raise Malformed
    fields = [reader.string() for _ in range(_KEYS[plain])]
    written = [_number(each) if plain == b"ssh-rsa" else each for each in fields]
    serial, usage = struct.unpack(">QL", reader.take(12))
    identity, principals = reader.string(), reader.string()
    after, before = struct.unpack(">QQ", reader.take(16))
    options, extensions, _, authority = (reader.string() for _ in range(4))
    body = blob[: len(blob) - len(reader.rest)]
    signature = reader.string()
    if reader.rest:
        raise Malformed
    key = NS(plain) + b"".join(map(NS, written))
    pairs = (_pairs(options), _pairs(extensions))
    names = tuple(_strings(principals))
    both = (key, written == fields, serial, usage, identity, names, after, before)
    return Read(kind, *both, *pairs, authority, body, signature)


def _number(field: bytes) -> bytes:
    number = int.from_bytes(field, "big", signed=True)
    return number.to_bytes(number.bit_length() // 8 + 1, "big", signed=True) if number else b""


def _strings(data: bytes) -> list[bytes]:
    reader = Reader(data)
    found = []
    while reader.rest:
        found.append(reader.string())
    return found


def _pairs(data: bytes) -> tuple[tuple[bytes, bytes], ...]:
    found = _strings(data)
    if len(found) % 2:
        raise Malformed
    return tuple(zip(found[::2], found[1::2], strict=True))


def signature_worth(authority: bytes, body: bytes, signature: bytes) -> Worth:
    """Whether this key has signed this, with an algorithm that is its own, and strong."""
    public = _public(authority)
    try:
        kind = Reader(authority).string()
        reader = Reader(signature)
        algorithm, value = reader.string(), reader.string()
        if public is None or reader.rest or kind.endswith(SUFFIX) or kind.startswith(b"sk-"):
            return Worth.BAD
        if isinstance(public, rsa.RSAPublicKey):
            if public.key_size < _LEAST_RSA_BITS or algorithm not in _RSA:
                return Worth.BAD
            size = public.key_size // 8
            public.verify(value.rjust(size, b"\0"), body, padding.PKCS1v15(), _RSA[algorithm])
            return Worth.GOOD if len(value) == size else Worth.LAX
        if algorithm != kind:
            return Worth.BAD
        if isinstance(public, ec.EllipticCurvePublicKey):
            pair = (int.from_bytes(each, "big") for each in _strings(value))
            public.verify(utils.encode_dss_signature(*pair), body, ec.ECDSA(_CURVES[kind]))
            return Worth.GOOD if ecdsa_pair(value) == value else Worth.LAX
        public.verify(value, body)
    except (Malformed, *_NO_SIGNATURE):
        return Worth.BAD
    return Worth.GOOD


def _public(blob: bytes) -> Any:
    """cryptography's key; None: it is none."""
    try:
        return load_ssh_public_key(Reader(blob).string() + b" " + b64encode(blob))
    except (Malformed, *_NO_SIGNATURE):
        return None


def judge_certificate(
    blob: bytes, truth: Truth, users: Mapping[str, str | None], now: float, address: str
) -> Judged:
    """What a user's certificate is worth at ``now`` (seconds since the epoch), from ``address``.

    ``users``: the names that the engine knows -> the user's id, None when two have that name.
    """
    try:
        read = read_certificate(blob)
    except Malformed:
        return NO_CERTIFICATE
    signed = signature_worth(read.authority, read.body, read.signature)
    if signed is Worth.BAD or read.authority not in truth.trusted:
        return NO_CERTIFICATE
    options = dict(read.options)
    user = next((name for each in read.principals if users.get(name := _text(each))), "")
    worths = [signed, _worth_of_fields(read), *(_worth_of_option(*each) for each in read.options)]
    worths.append(Worth.GOOD if user and not truth.revokes(read) else Worth.BAD)
    worths.append(Worth.GOOD if read.after <= now < read.before else Worth.BAD)
    if b"source-address" in options:
        worths.append(_from(options[b"source-address"], address))
    worth = next((each for each in (Worth.BAD, Worth.LAX) if each in worths), Worth.GOOD)
    forced = options.get(b"force-command")
    line = Reader(forced).string() if forced and worth is not Worth.BAD else None
    terminal = b"permit-pty" in dict(read.extensions)
    # One that is not written as it should be is no certificate.
    told = worth is Worth.BAD and signed is Worth.GOOD and _form(read) is Worth.GOOD
    return Judged(worth, read.key, user, terminal, line, True, told, read)


def judge_host_certificate(blob: bytes, key: bytes) -> Worth:
    """Whether the host may offer this certificate for its ``key``; when it ends is no matter."""
    try:
        read = read_certificate(blob)
    except Malformed:
        return Worth.BAD
    signed = signature_worth(read.authority, read.body, read.signature)
    if read.key != key or read.usage != HOST or signed is Worth.BAD:
        return Worth.BAD
    if _form(read) is Worth.GOOD and not read.options:
        return signed
    return Worth.BAD if _form(read) is Worth.BAD else Worth.LAX


def _text(name: bytes) -> str:
    try:
        return name.decode()
    except UnicodeDecodeError:
        return ""


def _worth_of_fields(read: Read) -> Worth:
    if read.usage != USER or not read.principals:
        return Worth.BAD
    return _form(read)


def _form(read: Read) -> Worth:
    if _public(read.key) is None:
        return Worth.BAD
    count = max(len(read.options), len(read.extensions))
    order = _order(read) if read.usage in (USER, HOST) else Worth.BAD
    if not read.tidy or len(read.principals) > _MOST_PRINCIPALS or count > _MOST_OPTIONS:
        return Worth.LAX if order is Worth.GOOD else order
    return order


def _order(read: Read) -> Worth:
    # Each once, by their names.
    for pairs in (read.options, read.extensions):
        if any(first[0] >= second[0] for first, second in pairwise(pairs)):
            return Worth.BAD
    usual = all(_usual(*each) for each in (*read.options, *read.extensions))
    return Worth.GOOD if usual else Worth.LAX


def _usual(name: bytes, data: bytes) -> bool:
    # What is in an extension that nobody knows is no matter; but cryptography reads only what
    # ssh-keygen writes: nothing, or one string.
    try:
        return not data or (len(_strings(data)) == 1 and not name.startswith(b"permit-"))
    except Malformed:
        return False


def _worth_of_option(name: bytes, data: bytes) -> Worth:
    if name == b"verify-required":
        # It says nothing of a key that is none of a token.
        return Worth.LAX
    if name not in (b"force-command", b"source-address"):
        return Worth.BAD
    try:
        (value,) = _strings(data)
    except (Malformed, ValueError):
        return Worth.BAD
    return Worth.GOOD if value else Worth.LAX


def _from(data: bytes, address: str) -> Worth:
    try:
        networks = [ip_network(each) for each in _strings(data)[0].decode().split(",")]
    except (Malformed, ValueError, IndexError):
        return Worth.BAD
    return Worth.GOOD if any(ip_address(address) in each for each in networks) else Worth.BAD
