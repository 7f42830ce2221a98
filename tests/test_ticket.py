"""Tickets: ours are what an oVirt Engine takes, and our server takes nothing else."""

from __future__ import annotations

import base64
import json
import subprocess
import tempfile
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as some
from twisted.trial.unittest import SynchronousTestCase

from tests.engine_kit import NOW, authority, signer
from vmconsole import pki
from vmconsole.engine.ticket import (
    TicketMalformed,
    TicketRefused,
    TicketVerifier,
    sign_ticket,
)

SALT = b"saltsalt"
DATA = '{"command":"public_keys","version":1}'


def ticket(salt: bytes = SALT, identity: pki.Identity | None = None, **changes: object) -> bytes:
    """A good one; ``lifetime`` and ``now`` as for sign_ticket."""
    settings: dict[str, object] = {"now": NOW, **changes}
    return sign_ticket(DATA, identity or signer(), salt=salt, **settings)  # type: ignore[arg-type]


def fields_of(body: bytes) -> dict[str, str]:
    decoded: dict[str, str] = json.loads(base64.b64decode(body))
    return decoded


def body_of(fields: object) -> bytes:
    return base64.b64encode(json.dumps(fields).encode())


def changed(**changes: object) -> bytes:
    """A good ticket in which fields were altered after it was signed; None takes one away."""
    fields = {**fields_of(ticket()), **changes}
    return body_of({name: value for name, value in fields.items() if value is not None})


def resigned(salt_length: int = 222, **changes: str) -> bytes:
    """A ticket in which fields were altered before it was signed."""
    fields = {**fields_of(ticket()), **changes}
    signed = "".join(fields[name] for name in fields["signedFields"].split(","))
    pss = padding.PSS(padding.MGF1(SHA256()), salt_length)
    signature = signer().key.sign(signed.encode(), pss, SHA256())
    return body_of({**fields, "v2_signature": base64.b64encode(signature).decode()})


def verifier(**settings: int) -> TicketVerifier:
    return TicketVerifier([authority().certificate], **settings)


class SigningTests(SynchronousTestCase):
    """``sign_ticket`` writes what the Engine's decoder reads."""

    def test_format(self) -> None:
        """Base64 in one line of a JSON object of seven strings, dates in UTC, five seconds long."""
        body = ticket()
        self.assertNotIn(b"\n", body)
        fields = fields_of(body)
        self.assertEqual(
            set(fields),
            {
                "salt",
                "validFrom",
                "validTo",
                "data",
                "signedFields",
                "v2_signature",
                "certificate",
            },
        )
        self.assertEqual(base64.b64decode(fields["salt"]), SALT)
        self.assertEqual(fields["validFrom"], "20261124080000")
        self.assertEqual(fields["validTo"], "20261124080005")
        self.assertEqual(fields["data"], DATA)
        self.assertEqual(fields["signedFields"], "salt,validFrom,validTo,data")
        self.assertTrue(fields["certificate"].startswith("-----BEGIN CERTIFICATE-----\n"))

    def test_dates_are_utc(self) -> None:
        """A time of another zone is converted."""
        there = NOW.astimezone(datetime.strptime("+0530", "%z").tzinfo)
        self.assertEqual(fields_of(ticket(now=there))["validFrom"], "20261124080000")

    def test_openssl_verifies(self) -> None:
        """The real openssl agrees that this is RSASSA-PSS with SHA-256 and the longest salt."""
        fields = fields_of(ticket())
        with tempfile.TemporaryDirectory() as name:
            directory = Path(name)
            signed = directory / "signed"
            signed.write_text("".join(fields[part] for part in fields["signedFields"].split(",")))
            signature = directory / "signature"
            signature.write_bytes(base64.b64decode(fields["v2_signature"]))
            key = directory / "key.pem"
            key.write_bytes(
                signer()
                .key.public_key()
                .public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
            )

            def openssl(salt_length: str) -> int:
                options = f"rsa_padding_mode:pss -sigopt rsa_pss_saltlen:{salt_length} -sigopt "
                options += "rsa_mgf1_md:sha256"
                return subprocess.run(
                    f"openssl dgst -sha256 -sigopt {options} -verify {key} -signature {signature} "
                    f"{signed}",
                    shell=True,
                    capture_output=True,
                    check=False,
                ).returncode

            self.assertEqual(openssl("max"), 0)
            self.assertEqual(openssl("222"), 0)
            self.assertNotEqual(openssl("digest"), 0)


class VerifyingTests(SynchronousTestCase):
    """``TicketVerifier`` takes good tickets."""

    def test_own(self) -> None:
        """What sign_ticket signed comes out."""
        self.assertEqual(verifier().verify(ticket(), NOW), DATA)

    def test_any_order_of_signed_fields(self) -> None:
        """The signer chooses the order."""
        body = resigned(signedFields="data,validTo,validFrom,salt")
        self.assertEqual(verifier().verify(body, NOW), DATA)

    def test_lenient_base64(self) -> None:
        """Newlines and the URL-safe alphabet, as Java's encoders write them."""
        fields = fields_of(ticket())
        signature = base64.encodebytes(base64.b64decode(fields["v2_signature"])).decode()
        fields["v2_signature"] = signature.replace("+", "-").replace("/", "_")
        body = base64.encodebytes(json.dumps(fields).encode())
        body = body.replace(b"\n", b"\r\n").replace(b"+", b"-").replace(b"/", b"_")
        self.assertEqual(verifier().verify(body, NOW), DATA)

    def test_crlf_in_certificate(self) -> None:
        """The certificate's lines may end in CRLF; it is not among the signed fields."""
        certificate = fields_of(ticket())["certificate"].replace("\n", "\r\n")
        self.assertEqual(verifier().verify(changed(certificate=certificate), NOW), DATA)

    def test_extra_field(self) -> None:
        """A field that we do not know is ignored."""
        self.assertEqual(verifier().verify(changed(digest="sha256"), NOW), DATA)

    def test_several_authorities(self) -> None:
        """Each of the authorities may have issued the certificate."""
        both = TicketVerifier([authority("another CA").certificate, authority().certificate])
        self.assertEqual(both.verify(ticket(), NOW), DATA)
        other = ticket(b"12345678", signer(ca="another CA"))
        self.assertEqual(both.verify(other, NOW), DATA)

    def test_tolerance(self) -> None:
        """The clocks may differ by ten seconds either way, and not by eleven."""
        for seconds in (-10, 0, 5, 15):
            verifier().verify(ticket(), NOW + timedelta(seconds=seconds))
        for seconds in (-11, 16):
            with self.assertRaises(TicketRefused):
                verifier().verify(ticket(), NOW + timedelta(seconds=seconds))

    def test_longest_lifetime(self) -> None:
        """Sixty seconds are taken, and not one more."""
        verifier().verify(ticket(lifetime=timedelta(seconds=60)), NOW)
        with self.assertRaises(TicketRefused):
            verifier().verify(ticket(lifetime=timedelta(seconds=61)), NOW)

    def test_replay(self) -> None:
        """A ticket is good once, also at the end of its time; another one is good then."""
        server = verifier()
        server.verify(ticket(), NOW)
        for seconds in (0, 15):
            with self.assertRaises(TicketRefused):
                server.verify(ticket(), NOW + timedelta(seconds=seconds))
        server.verify(ticket(b"saltsal2"), NOW)

    def test_replay_memory_is_bounded(self) -> None:
        """When it is full, tickets are refused; as old ones end, new ones are taken."""
        server = verifier(capacity=2)
        for number in range(2):
            server.verify(ticket(b"salt%4d" % number), NOW)
        with self.assertRaises(TicketRefused):
            server.verify(ticket(b"salt%4d" % 2), NOW)
        later = NOW + timedelta(seconds=16)
        server.verify(ticket(b"salt%4d" % 3, now=later), later)

    def test_refused_ticket_takes_no_memory(self) -> None:
        """Who cannot sign cannot fill the memory."""
        server = verifier(capacity=1)
        with self.assertRaises(TicketRefused):
            server.verify(changed(data="{}"), NOW)
        server.verify(ticket(), NOW)


def self_signed() -> pki.Identity:
    return pki.Identity(authority().certificate, authority().key)


def without_eku() -> pki.Identity:
    key = rsa.generate_private_key(65537, 2048)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "proxy")])
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(authority().certificate.subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(NOW)
        .not_valid_after(NOW + timedelta(days=1))
    )
    return pki.Identity(builder.sign(authority().key, SHA256()), key)


def ed25519_certificate() -> str:
    key = Ed25519PrivateKey.generate()
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "proxy")])
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(authority().certificate.subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(NOW)
        .not_valid_after(NOW + timedelta(days=1))
    )
    return builder.sign(authority().key, SHA256()).public_bytes(Encoding.PEM).decode()


def doubled(name: str) -> bytes:
    text = json.dumps(fields_of(ticket()))
    value = json.dumps(fields_of(ticket())[name])
    return base64.b64encode(f'{text[:-1]}, "{name}": {value}}}'.encode())


def with_issuer_of_same_name() -> pki.Identity:
    impostor = pki.make_authority("test CA", NOW)
    return pki.issue(impostor, "proxy", "ticket", NOW, key_size=2048)


def through_intermediate() -> pki.Identity:
    return pki.issue(signer(), "leaf", "ticket", NOW, key_size=2048)


REFUSED: dict[str, tuple[str, Callable[[], bytes]]] = {
    "no signature": ("no v2_signature", lambda: changed(v2_signature=None)),
    "data altered": (
        "signature is wrong",
        lambda: changed(data='{"command":"available_consoles","version":1}'),
    ),
    "salt altered": (
        "signature is wrong",
        lambda: changed(salt=base64.b64encode(b"01234567").decode()),
    ),
    "validFrom altered": ("signature is wrong", lambda: changed(validFrom="20261124080001")),
    "validTo altered": ("signature is wrong", lambda: changed(validTo="20261124080010")),
    "order altered": (
        "signature is wrong",
        lambda: changed(signedFields="validFrom,salt,validTo,data"),
    ),
    "empty signature": ("signature is wrong", lambda: changed(v2_signature="")),
    "salt of digest length": ("signature is wrong", lambda: resigned(salt_length=32)),
    "shorter salt": ("signature is wrong", lambda: resigned(salt_length=221)),
    "early": ("not valid now", lambda: ticket(now=NOW + timedelta(seconds=11))),
    "late": ("not valid now", lambda: ticket(now=NOW - timedelta(seconds=16))),
    "ends before it begins": ("lifetime", lambda: resigned(validTo="20261124075959")),
    "lives long": ("lifetime", lambda: ticket(lifetime=timedelta(seconds=61))),
    "first year": (
        "not valid now",
        lambda: resigned(validFrom="00010101000000", validTo="00010101000005"),
    ),
    "last year": (
        "not valid now",
        lambda: resigned(validFrom="99991231235959", validTo="99991231235959"),
    ),
    "another CA": ("trusted CA", lambda: ticket(identity=signer(ca="another CA"))),
    "another CA of the same name": (
        "trusted CA",
        lambda: ticket(identity=with_issuer_of_same_name()),
    ),
    "intermediate": ("trusted CA", lambda: ticket(identity=through_intermediate())),
    "the CA itself": ("self-signed", lambda: ticket(identity=self_signed())),
    "EKU for something else": ("extended key usage", lambda: ticket(identity=signer("client"))),
    "expired certificate": (
        "certificate is not valid now",
        lambda: ticket(
            identity=pki.issue(authority(), "proxy", "ticket", NOW - timedelta(days=9), days=8)
        ),
    ),
    "certificate of tomorrow": (
        "certificate is not valid now",
        lambda: ticket(identity=pki.issue(authority(), "proxy", "ticket", NOW + timedelta(days=1))),
    ),
    "another certificate": (
        "extended key usage",
        lambda: changed(certificate=signer("client").certificate_pem().decode()),
    ),
    "no RSA": ("not RSA", lambda: changed(certificate=ed25519_certificate())),
}

MALFORMED: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "not base64": lambda: b"{}",
    "not ASCII": lambda: "ä".encode(),
    "not JSON": lambda: base64.b64encode(b"ticket"),
    "not UTF-8": lambda: base64.b64encode(b'{"salt": "\xff"}'),
    "no object": lambda: body_of(["salt"]),
    "pairs instead of an object": lambda: body_of(list(fields_of(ticket()).items())),
    "null": lambda: body_of(None),
    "deep": lambda: base64.b64encode(b"[" * 40000),
    "huge number": lambda: base64.b64encode(b'{"salt": ' + b"9" * 5000 + b"}"),
    "number as value": lambda: changed(validFrom=20261124080000),
    "null as value": lambda: changed(**{"data": {}}),
    "nested": lambda: changed(extra={"a": "b"}),
    "lone surrogate": lambda: changed(data="\ud800"),
    "too large": lambda: changed(extra="x" * 65536),
    "no EKU": lambda: ticket(identity=without_eku()),
    "certificate of garbage": lambda: changed(certificate="garbage"),
    "empty certificate": lambda: changed(certificate=""),
    "signature not base64": lambda: changed(v2_signature="?"),
    "salt not base64": lambda: resigned(salt="???"),
    "short salt": lambda: ticket(b"1234567"),
    "long salt": lambda: ticket(b"123456789"),
    "no salt": lambda: ticket(b""),
    "border moved": lambda: changed(validTo="2026112408000", data=f"5{DATA}"),
    "short date": lambda: resigned(validFrom="2026112408000"),
    "long date": lambda: resigned(validFrom="202611240800000"),
    "month 13": lambda: resigned(validFrom="20261324080000"),
    "foreign digits": lambda: resigned(validFrom="٢٠٢٦١١٢٤٠٨٠٠٠٠"),
    "date with newline": lambda: resigned(validFrom="20261124080000\n"),
    "fewer signed fields": lambda: resigned(signedFields="salt,validFrom,validTo"),
    "more signed fields": lambda: resigned(signedFields="salt,validFrom,validTo,data,certificate"),
    "signed twice": lambda: resigned(signedFields="salt,validFrom,validTo,data,data"),
    "no signed fields": lambda: changed(signedFields=""),
    "unknown signed field": lambda: changed(signedFields="salt,validFrom,validTo,x"),
    **{
        f"{name} missing": lambda name=name: changed(**{name: None})  # type: ignore[misc]
        for name in ("salt", "validFrom", "validTo", "data", "signedFields", "certificate")
    },
    **{
        f"{name} doubled": lambda name=name: doubled(name)  # type: ignore[misc]
        for name in ("salt", "validFrom", "validTo", "data", "signedFields", "v2_signature")
    },
}


class BadTicketTests(SynchronousTestCase):
    """Each kind of bad ticket is refused as the real Engine's status says."""

    def test_refused(self) -> None:
        """What proves nothing is TicketRefused: 403."""
        for name, (words, make) in REFUSED.items():
            try:
                verifier().verify(make(), NOW)
            except TicketRefused as error:
                self.assertIn(words, str(error), name)
            else:
                self.fail(name)

    def test_malformed(self) -> None:
        """What is no ticket is TicketMalformed: 500."""
        for name, make in MALFORMED.items():
            try:
                verifier().verify(make(), NOW)
            except TicketMalformed:
                continue
            self.fail(name)

    def _only_refused(self, body: bytes) -> None:
        try:
            verifier().verify(body, NOW)
        except (TicketRefused, TicketMalformed):
            pass

    @given(some.binary(max_size=200))
    def test_any_bytes(self, body: bytes) -> None:
        """Bytes raise nothing but the two refusals."""
        self._only_refused(body)

    @given(
        some.recursive(
            some.none() | some.booleans() | some.floats() | some.integers() | some.text(),
            lambda inner: some.lists(inner) | some.dictionaries(some.text(), inner),
        )
    )
    def test_any_json(self, value: object) -> None:
        """JSON raises nothing but the two refusals."""
        self._only_refused(body_of(value))

    @given(
        some.dictionaries(
            some.sampled_from(sorted(fields_of(ticket()))),
            some.text()
            | some.text("0123456789")
            | some.binary().map(base64.b64encode).map(bytes.decode),
        )
    )
    def test_any_fields(self, changes: dict[str, str]) -> None:
        """A good ticket with other values raises nothing but the two refusals."""
        self._only_refused(changed(**changes))

    @given(some.binary(max_size=300))
    def test_any_certificate(self, der: bytes) -> None:
        """Nor does whatever stands where the certificate should."""
        text = base64.encodebytes(der).decode()
        pem = f"-----BEGIN CERTIFICATE-----\n{text}-----END CERTIFICATE-----\n"
        self._only_refused(changed(certificate=pem))

    @given(some.integers(0, 1500), some.integers(1, 255))
    def test_flipped_certificate(self, at: int, bits: int) -> None:
        """A certificate is refused when one byte is wrong in what its CA signed."""
        der = bytearray(signer().certificate.public_bytes(Encoding.DER))
        signed = bytes(signer().certificate.tbs_certificate_bytes)
        der[der.index(signed) + at % len(signed)] ^= bits
        text = base64.encodebytes(bytes(der)).decode()
        pem = f"-----BEGIN CERTIFICATE-----\n{text}-----END CERTIFICATE-----\n"
        with self.assertRaises((TicketRefused, TicketMalformed)):
            verifier().verify(changed(certificate=pem), NOW)
