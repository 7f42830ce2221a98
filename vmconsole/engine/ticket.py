"""Tickets: the signed commands that an oVirt Engine's VMConsoleProxyServlet takes (4.4.6.2 on)."""

from __future__ import annotations

import json
import re
from base64 import b64decode, b64encode
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.hashes import SHA256

from vmconsole import pki
from vmconsole.errors import VMConsoleError

LIFETIME = timedelta(seconds=5)
LONGEST_LIFETIME = timedelta(seconds=60)
TOLERANCE = timedelta(seconds=10)
SALT_BYTES = 8
MAX_TICKET_BYTES = 65536

_DATE = "%Y%m%d%H%M%S"
_SIGNED = ("salt", "validFrom", "validTo", "data")
_FIELDS = frozenset({*_SIGNED, "signedFields", "v2_signature", "certificate"})
_URL_SAFE = bytes.maketrans(b"-_", b"+/")
# What cryptography raises for a certificate that it cannot read, or only in part.
_BAD_CERTIFICATE = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
)


class TicketRefused(VMConsoleError):
    """The ticket proves nothing: not signed, not now, not by one of ours. HTTP status 403."""


class TicketMalformed(VMConsoleError):
    """No ticket, or its certificate has no EKU. HTTP status 500, as the real Engine answers."""


def sign_ticket(
    data: str,
    identity: pki.Identity,
    now: datetime,
    salt: bytes,
    lifetime: timedelta = LIFETIME,
) -> bytes:
    """The ticket for ``data``, in base64. ``now`` is aware, ``salt`` 8 random bytes."""
    signed = {
        "salt": b64encode(salt).decode(),
        "validFrom": now.astimezone(UTC).strftime(_DATE),
        "validTo": (now + lifetime).astimezone(UTC).strftime(_DATE),
        "data": data,
    }
    signature = identity.key.sign("".join(signed.values()).encode(), _pss(identity.key), SHA256())
    ticket = {
        **signed,
        "signedFields": ",".join(_SIGNED),
        "v2_signature": b64encode(signature).decode(),
        "certificate": identity.certificate_pem().decode(),
    }
    return b64encode(json.dumps(ticket).encode())


class TicketVerifier:
    """Takes tickets whose certificate was issued, directly, by one of ``authorities``.

    Of these only CAs count, and only while they are valid: a file with a chain has others, too.
    Stricter than the real Engine where its format leaves room: see _parse and _check_new. The
    memory against replay holds ``capacity`` tickets; when it is full, tickets are refused.
    """

    def __init__(self, authorities: Sequence[x509.Certificate], capacity: int = 65536) -> None:
        self.trust(authorities)
        self._capacity = capacity
        self._seen: dict[bytes, datetime] = {}

    def trust(self, authorities: Sequence[x509.Certificate]) -> None:
        """From now on these are the authorities."""
        self._authorities = tuple(filter(pki.is_authority, authorities))

    def verify(self, body: bytes, now: datetime) -> str:
        """The signed data. Raises TicketRefused, TicketMalformed."""
        fields = _parse(body)
        valid_from, valid_to = _date(fields["validFrom"]), _date(fields["validTo"])
        salt = _salt(fields["salt"])
        if not timedelta(0) <= valid_to - valid_from <= LONGEST_LIFETIME:
            raise TicketRefused("The ticket's lifetime is negative or too long.")
        # Nothing is added to the dates from outside: the sum may not exist.
        if not (valid_from <= now + TOLERANCE and now - TOLERANCE <= valid_to):
            raise TicketRefused("The ticket is not valid now: the clocks may differ.")
        key = self._signer(fields["certificate"], now)
        if "v2_signature" not in fields:
            raise TicketRefused("The ticket has no v2_signature.")
        signed = "".join(fields[name] for name in fields["signedFields"].split(","))
        try:
            key.verify(
                _base64(fields["v2_signature"].encode()), signed.encode(), _pss(key), SHA256()
            )
        except (InvalidSignature, ValueError):
            raise TicketRefused("The signature is wrong.") from None
        self._check_new(salt, valid_to + TOLERANCE, now)
        return fields["data"]

    def _signer(self, pem: str, now: datetime) -> rsa.RSAPublicKey:
        try:
            certificate = x509.load_pem_x509_certificate(pem.encode())
            key = certificate.public_key()
            issued = any(
                pki.is_valid(authority, now) and pki.issued_by(certificate, authority)
                for authority in self._authorities
            )
        except _BAD_CERTIFICATE:
            raise TicketRefused("The certificate cannot be read.") from None
        if not isinstance(key, rsa.RSAPublicKey):
            raise TicketRefused("The certificate's key is not RSA.")
        if not issued:
            raise TicketRefused("The certificate was not issued by the trusted CA.")
        if certificate.subject == certificate.issuer:
            raise TicketRefused("The certificate is self-signed.")
        if not pki.is_valid(certificate, now):
            raise TicketRefused("The certificate is not valid now.")
        try:
            usages = pki.extended_key_usages(certificate)
        except _BAD_CERTIFICATE:
            raise TicketRefused("The certificate's extensions cannot be read.") from None
        if usages is None:
            raise TicketMalformed("The certificate has no extended key usage.")
        if pki.TICKET_OID not in usages:
            raise TicketRefused(
                f"The certificate's extended key usage lacks {pki.TICKET_OID.dotted_string}."
            )
        return key

    def _check_new(self, salt: bytes, until: datetime, now: datetime) -> None:
        # Nearly in the order of their ends: lifetimes are short, so little waits behind the first.
        while self._seen:
            oldest = next(iter(self._seen))
            if self._seen[oldest] >= now:
                break
            del self._seen[oldest]
        if salt in self._seen:
            raise TicketRefused("The ticket was used before.")
        if len(self._seen) >= self._capacity:
            raise TicketRefused("Too many tickets at a time.")
        self._seen[salt] = until


def _parse(body: bytes) -> dict[str, str]:
    """The fields: all there (but the signature), each once, all strings, and the signed ones named.

    The list of signed fields is itself not signed, and values are joined with nothing between:
    so it must name exactly the four, in any order.
    """
    if len(body) > MAX_TICKET_BYTES:
        raise TicketMalformed("The body is too large.")
    try:
        pairs = json.loads(_base64(body), object_pairs_hook=_Object)
    except (ValueError, RecursionError):
        raise TicketMalformed("The body is no JSON in base64.") from None
    if not isinstance(pairs, _Object):
        raise TicketMalformed("The body is no JSON object.")
    fields = {name: _text(value) for name, value in pairs}
    if len(fields) != len(pairs):
        raise TicketMalformed("A field is there twice.")
    missing = _FIELDS - {"v2_signature"} - fields.keys()
    if missing:
        raise TicketMalformed(f"Missing: {', '.join(sorted(missing))}.")
    if sorted(fields["signedFields"].split(",")) != sorted(_SIGNED):
        raise TicketRefused(f"signedFields is not {','.join(_SIGNED)}.")
    return fields


def _pss(key: rsa.RSAPrivateKey | rsa.RSAPublicKey) -> padding.PSS:
    # The number itself: to verify, PSS.MAX_LENGTH takes any salt.
    length = padding.calculate_max_pss_salt_length(key, SHA256())
    return padding.PSS(padding.MGF1(SHA256()), length)


class _Object(list[tuple[str, object]]):
    """A JSON object as pairs, so that a doubled name shows."""


def _text(value: object) -> str:
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            # A lone surrogate, which JSON's escapes allow.
            pass
        else:
            return value
    raise TicketMalformed("A field is no text.")


def _base64(text: bytes) -> bytes:
    """Raises ValueError."""
    return b64decode(b"".join(text.split()).translate(_URL_SAFE), validate=True)


def _salt(text: str) -> bytes:
    try:
        salt = _base64(text.encode())
    except ValueError:
        raise TicketRefused("The salt is no base64.") from None
    if len(salt) != SALT_BYTES:
        raise TicketRefused(f"The salt has {len(salt)} bytes, not {SALT_BYTES}.")
    return salt


def _date(text: str) -> datetime:
    # strptime alone takes fewer digits, and other digits than these.
    if re.fullmatch(r"[0-9]{14}", text):
        try:
            return datetime.strptime(text, _DATE).replace(tzinfo=UTC)
        except ValueError:
            pass
    raise TicketRefused("A date is not yyyyMMddHHmmss.")
