"""OpenSSH certificates: read, and judged. Source: OpenSSH's PROTOCOL.certkeys."""

from __future__ import annotations

import struct
from base64 import b64encode
from datetime import UTC, datetime
from ipaddress import ip_network
from typing import Any

import msgspec
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import (
    SSHCertificate,
    SSHCertificateType,
    load_ssh_public_identity,
)
from twisted.conch.ssh.common import getNS
from twisted.conch.ssh.keys import BadKeyError, Key

from vmconsole.errors import VMConsoleError
from vmconsole.keyoptions import KeyOptions
from vmconsole.publickeys import RSA_BITS, fingerprint
from vmconsole.text import printable, printable_bytes

SUFFIX = b"-cert-v01@openssh.com"

# Algorithm -> the type that the certificate's blob names, and the algorithm of its signatures.
CERTIFICATE_ALGORITHMS = {
    **{
        kind + SUFFIX: (kind + SUFFIX, kind)
        for kind in (
            b"ssh-ed25519",
            b"ecdsa-sha2-nistp256",
            b"ecdsa-sha2-nistp384",
            b"ecdsa-sha2-nistp521",
        )
    },
    b"rsa-sha2-512" + SUFFIX: (b"ssh-rsa" + SUFFIX, b"rsa-sha2-512"),
    b"rsa-sha2-256" + SUFFIX: (b"ssh-rsa" + SUFFIX, b"rsa-sha2-256"),
}
# Type of the certificate -> how many strings its key has in the blob.
_KEY_FIELDS = {
    b"ssh-ed25519" + SUFFIX: 1,
    b"ssh-rsa" + SUFFIX: 2,
    b"ecdsa-sha2-nistp256" + SUFFIX: 2,
    b"ecdsa-sha2-nistp384" + SUFFIX: 2,
    b"ecdsa-sha2-nistp521" + SUFFIX: 2,
}
# What a CA may sign with: never SHA-1, and nothing that its key does not fit.
_CA_SIGNATURES = {
    b"ssh-ed25519": (b"ssh-ed25519",),
    b"ecdsa-sha2-nistp256": (b"ecdsa-sha2-nistp256",),
    b"ecdsa-sha2-nistp384": (b"ecdsa-sha2-nistp384",),
    b"ecdsa-sha2-nistp521": (b"ecdsa-sha2-nistp521",),
    b"ssh-rsa": (b"rsa-sha2-512", b"rsa-sha2-256"),
}
# As OpenSSH has it.
_MOST_PRINCIPALS = 256
# Strings in the options, and in the extensions, two for each; and bytes of a key: an RSA key of
# 16384 bits has some 2,100. To read thousands would take milliseconds, of anybody's certificate.
_MOST_OPTION_STRINGS = 256
_LARGEST_KEY = 4096
_FOREVER = 0xFFFFFFFFFFFFFFFF
_LAST_MOMENT = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC).timestamp()
UNPARSABLE = (
    *(BadKeyError, ValueError, TypeError, LookupError, AssertionError),
    # cryptography's word for a point that is compressed, or none.
    *(struct.error, UnsupportedAlgorithm, NotImplementedError),
)
"""What Conch and cryptography raise for bytes that are no key, no certificate, or no request."""


class CertificateError(VMConsoleError):
    """The bytes are no certificate that can be used. The text says why; it is no sentence."""


class CertificateRefused(VMConsoleError):
    """A certificate does not let in here and now. The text says why; it is no sentence."""


class Certificate(msgspec.Struct, frozen=True):
    """What a certificate says, which is true if its CA is trusted and has signed it."""

    blob: bytes
    type: SSHCertificateType
    key: Key
    """The key that is certified."""
    key_blob: bytes
    """The same, in the wire format of RFC 4253, section 6.6."""
    id: bytes
    serial: int
    principals: tuple[bytes, ...]
    valid_after: int
    """Seconds since the epoch, as ``valid_before``."""
    valid_before: int
    critical_options: dict[bytes, bytes]
    extensions: frozenset[bytes]
    ca: bytes
    """The CA's key, as ``key_blob``."""
    parsed: SSHCertificate

    def __str__(self) -> str:
        """For the audit. The id, which others choose, comes last: it cannot pose as the rest."""
        shown = printable_bytes(self.id, 100)
        return f"serial={self.serial} ca={fingerprint(self.ca)} id={shown}"

    @property
    def expires(self) -> float | None:
        """Seconds since the epoch, from when on it is void; None: never."""
        return None if self.valid_before == _FOREVER else float(self.valid_before)

    @property
    def force_command(self) -> bytes | None:
        """The command line that is run, whatever the client asks for; None: the client's."""
        return self.critical_options.get(b"force-command")

    @property
    def permits_pty(self) -> bool:
        """Whether its user may have a terminal."""
        return b"permit-pty" in self.extensions

    @property
    def names(self) -> list[str]:
        """The principals that are text, and not empty, in their order."""
        names = []
        for principal in self.principals:
            try:
                names.append(principal.decode())
            except UnicodeDecodeError:
                continue
        return [name for name in names if name]

    def verify(self) -> None:
        """Raises CertificateError unless the key that it names as its CA's has signed it."""
        try:
            self.parsed.verify_cert_signature()
        except (InvalidSignature, *UNPARSABLE) as error:
            raise CertificateError("its CA did not sign it") from error


def parse_certificate(blob: bytes) -> Certificate:
    """Read a certificate. Who signed it is not looked at: ``verify`` does that, once its CA is
    known to be trusted, since it costs time.

    Raises CertificateError, also for a CA whose key or signature algorithm is too weak.
    """
    try:
        return _parse(blob)
    except UNPARSABLE as error:
        raise CertificateError("it cannot be understood") from error


def _parse(blob: bytes) -> Certificate:
    kind, _, rest = getNS(blob, 2)
    if kind not in _KEY_FIELDS:
        raise CertificateError(f"its type {printable_bytes(kind, 40)} is not supported")
    *fields, rest = getNS(rest, _KEY_FIELDS[kind])
    _, principals, rest = getNS(rest[12:], 2)
    if _has_more(principals, _MOST_PRINCIPALS):
        raise CertificateError(f"it has more than {_MOST_PRINCIPALS} principals")
    options, extensions, _, ca, signature, _ = getNS(rest[16:], 5)
    if max(sum(map(len, fields)), len(ca)) > _LARGEST_KEY:
        raise CertificateError("its key, or its CA's, is too large")
    if any(_has_more(strings, _MOST_OPTION_STRINGS) for strings in (options, extensions)):
        raise CertificateError("it has too many options")
    # cryptography keeps the CA's blob and the algorithm of its signature to itself.
    parsed: Any = load_ssh_public_identity(kind + b" " + b64encode(blob))
    _check_authority(ca, getNS(signature)[0])
    key = Key(parsed.public_key())
    return Certificate(
        blob=blob,
        type=parsed.type,
        key=key,
        key_blob=key.blob(),
        id=parsed.key_id,
        serial=parsed.serial,
        principals=tuple(parsed.valid_principals),
        valid_after=parsed.valid_after,
        valid_before=parsed.valid_before,
        critical_options=parsed.critical_options,
        extensions=frozenset(parsed.extensions),
        ca=ca,
        parsed=parsed,
    )


def _has_more(strings: bytes, most: int) -> bool:
    at = 0
    for _ in range(most):
        at += 4 + int.from_bytes(strings[at : at + 4], "big")
    return at < len(strings)


def _check_authority(ca: bytes, signature_algorithm: bytes) -> None:
    problem = authority_problem(ca)
    if problem:
        raise CertificateError(f"its CA's key is not accepted: {problem}")
    if signature_algorithm not in _CA_SIGNATURES[getNS(ca)[0]]:
        shown = printable_bytes(signature_algorithm, 40)
        raise CertificateError(f"its CA signed it with {shown}, which is not accepted")


def authority_problem(blob: bytes) -> str:
    """Why a key cannot be a CA's here; "": it can."""
    try:
        kind = getNS(blob)[0]
        if kind not in _CA_SIGNATURES:
            return f"it is of type {printable_bytes(kind, 40)}"
        key: Key = Key.fromString(blob, type="BLOB")
    except UNPARSABLE:
        return "it cannot be understood"
    if kind == b"ssh-rsa" and key.size() not in RSA_BITS:
        return f"RSA keys have {RSA_BITS[0]} to {RSA_BITS[-1]} bits here"
    return ""


def validity_problem(certificate: Certificate, now: float) -> str:
    """Why a certificate does not count at ``now`` (seconds since the epoch); "": it does.

    As OpenSSH has it, the first moment counts, and the last does not.
    """
    if now < certificate.valid_after:
        return f"is not valid before {moment(certificate.valid_after)}"
    if now >= certificate.valid_before:
        return f"expired on {moment(certificate.valid_before)}"
    return ""


def moment(seconds: float) -> str:
    """A time in words: ``2026-11-27 22:00:00 UTC``."""
    return f"{datetime.fromtimestamp(min(seconds, _LAST_MOMENT), UTC):%Y-%m-%d %H:%M:%S} UTC"


def check_user_certificate(certificate: Certificate, address: str, now: float) -> None:
    """Whether a certificate, if it is good, lets a user in from ``address`` at ``now``.

    Raises CertificateRefused. Source: PROTOCOL.certkeys and ssh-keygen(1), "CERTIFICATES".
    """
    if certificate.type is not SSHCertificateType.USER:
        raise CertificateRefused("the certificate is one of a host, not of a user")
    problem = validity_problem(certificate, now)
    if problem:
        raise CertificateRefused(f"the certificate {problem}")
    if not certificate.principals:
        # For sshd it would be anybody's.
        raise CertificateRefused("the certificate names no principal")
    if certificate.key.sshType() == b"ssh-rsa" and certificate.key.size() not in RSA_BITS:
        raise CertificateRefused(f"RSA keys have {RSA_BITS[0]} to {RSA_BITS[-1]} bits here")
    for name, value in certificate.critical_options.items():
        if name == b"source-address":
            _check_source(value, address)
        elif name == b"verify-required":
            raise CertificateRefused("the certificate's option verify-required is for sk- keys")
        elif name != b"force-command":
            raise CertificateRefused(
                f"the certificate's option {printable_bytes(name, 40)} is not supported"
            )
        elif not value:
            raise CertificateRefused("the certificate's option force-command is empty")


def _check_source(value: bytes, address: str) -> None:
    entries = tuple(value.decode("latin-1").split(","))
    try:
        # Networks and addresses alone: no patterns, and nothing behind a network's mask.
        for entry in entries:
            ip_network(entry)
        options = KeyOptions(sources=entries)
    except ValueError:
        raise CertificateRefused("the certificate's option source-address is malformed") from None
    if options.refusal(address, 0.0):
        raise CertificateRefused(f"the certificate may not be used from {printable(address, 60)}")
