"""Tickets: ours are what an oVirt Engine takes, and our server takes theirs."""

from __future__ import annotations

import base64
import json
import subprocess
import tempfile
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import padding
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.hazmat.primitives.hashes import SHA256, HashAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID, ObjectIdentifier
from hypothesis import given, settings
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

SECOND = timedelta(seconds=1)
SIGNED = ("salt", "validFrom", "validTo", "data")
FIELDS = (*SIGNED, "signedFields", "v2_signature", "certificate")
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


def pss(salt_length: int = 222, digest: HashAlgorithm | None = None) -> padding.PSS:
    return padding.PSS(padding.MGF1(digest or SHA256()), salt_length)


def resigned(
    scheme: padding.AsymmetricPadding | None = None,
    digest: HashAlgorithm | None = None,
    text: str | None = None,
    **changes: str,
) -> bytes:
    """A ticket in which fields were altered before it was signed, or with ``text`` signed."""
    fields = {**fields_of(ticket()), **changes}
    signed = joined(fields) if text is None else text
    signature = signer().key.sign(signed.encode(), scheme or pss(), digest or SHA256())
    return body_of({**fields, "v2_signature": base64.b64encode(signature).decode()})


def joined(fields: dict[str, str]) -> str:
    """What is signed. A field that is not there is nothing."""
    return "".join(fields.get(name, "") for name in fields["signedFields"].split(","))


def certificate(
    issuer: pki.Identity | None = None,
    issuer_name: x509.Name | None = None,
    key: CertificatePublicKeyTypes | None = None,
    usages: Sequence[ObjectIdentifier] = (pki.TICKET_OID,),
    usages_der: bytes | None = None,
    starts: datetime = NOW - SECOND,
    ends: datetime = NOW + SECOND,
) -> x509.Certificate:
    """A good certificate for the signer's key, unless it is told otherwise."""
    ca = issuer or authority()
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "proxy")]))
        .issuer_name(issuer_name or ca.certificate.subject)
        .public_key(key or signer().key.public_key())
        .serial_number(1)
        .not_valid_before(starts)
        .not_valid_after(ends)
    )
    if usages:
        builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
    if usages_der:
        unread = x509.UnrecognizedExtension(x509.ExtendedKeyUsage.oid, usages_der)
        builder = builder.add_extension(unread, critical=False)
    return builder.sign(ca.key, SHA256(), rsa_padding=pss(32))


def pem(der: bytes) -> str:
    text = base64.encodebytes(der).decode()
    return f"-----BEGIN CERTIFICATE-----\n{text}-----END CERTIFICATE-----\n"


def certified_pem(**changes: object) -> str:
    return pem(certificate(**changes).public_bytes(Encoding.DER))  # type: ignore[arg-type]


def certified(**changes: object) -> bytes:
    """A ticket with such a certificate; its signature fits it."""
    return changed(certificate=certified_pem(**changes))


def verifier(**settings: int) -> TicketVerifier:
    return TicketVerifier([authority().certificate], **settings)


class SigningTests(SynchronousTestCase):
    """``sign_ticket`` writes what the Engine's decoder reads."""

    def test_format(self) -> None:
        """Base64 in one line of a JSON object of seven strings, dates in UTC, five seconds long."""
        body = ticket()
        self.assertNotIn(b"\n", body)
        fields = fields_of(body)
        self.assertEqual(set(fields), set(FIELDS))
        self.assertEqual(base64.b64decode(fields["salt"]), SALT)
        self.assertEqual(fields["validFrom"], "20261124080000")
        self.assertEqual(fields["validTo"], "20261124080005")
        self.assertEqual(fields["data"], DATA)
        self.assertEqual(fields["signedFields"], "salt,validFrom,validTo,data")
        self.assertTrue(fields["certificate"].startswith("-----BEGIN CERTIFICATE-----\n"))

    def test_dates_are_utc(self) -> None:
        """A time of another zone is converted."""
        there = NOW.astimezone(datetime.strptime("+0530", "%z").tzinfo)
        fields = fields_of(ticket(now=there))
        self.assertEqual(fields["validFrom"], "20261124080000")
        self.assertEqual(fields["validTo"], "20261124080005")


class OpensslTests(SynchronousTestCase):
    """Another implementation of RSASSA-PSS agrees with ours, both ways."""

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)

    def openssl(self, salt_length: str, *arguments: str | Path) -> int:
        """The exit status of ``openssl dgst``."""
        scheme = ("rsa_padding_mode:pss", f"rsa_pss_saltlen:{salt_length}", "rsa_mgf1_md:sha256")
        options = [word for option in scheme for word in ("-sigopt", option)]
        command = ["openssl", "dgst", "-sha256", *options, *arguments]
        return subprocess.run(command, capture_output=True, check=False).returncode

    def file(self, name: str, content: bytes) -> Path:
        path = self.folder / name
        path.write_bytes(content)
        return path

    def test_verifies(self) -> None:
        """It takes our signature with the longest salt for the key's size, and with no other."""
        large = pki.issue(authority(), "large", "ticket", NOW, key_size=3072)
        for identity, longest in ((signer(), 222), (large, 350)):
            fields = fields_of(ticket(identity=identity))
            signed = self.file("signed", joined(fields).encode())
            signature = self.file("signature", base64.b64decode(fields["v2_signature"]))
            public = identity.key.public_key()
            key = self.file(
                "key.pem", public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
            )
            for length in (str(longest), "max"):
                status = self.openssl(length, "-verify", key, "-signature", signature, signed)
                self.assertEqual(status, 0, length)
            for length in ("digest", str(longest - 1), "0"):
                status = self.openssl(length, "-verify", key, "-signature", signature, signed)
                self.assertEqual(status, 1, length)

    def test_signs(self) -> None:
        """Its signature with 222 bytes of salt is taken, and one with 32 or 221 is refused."""
        fields = fields_of(ticket())
        signed = self.file("signed", joined(fields).encode())
        key = self.file("key.pem", signer().key_pem())
        signature = self.folder / "signature"
        for length, taken in ((222, True), (32, False), (221, False)):
            status = self.openssl(str(length), "-sign", key, "-out", signature, signed)
            self.assertEqual(status, 0)
            body = changed(v2_signature=base64.b64encode(signature.read_bytes()).decode())
            if taken:
                self.assertEqual(verifier().verify(body, NOW), DATA)
            else:
                with self.assertRaisesRegex(TicketRefused, "signature is wrong"):
                    verifier().verify(body, NOW)


class VerifyingTests(SynchronousTestCase):
    """``TicketVerifier`` takes good tickets."""

    def test_own(self) -> None:
        """What sign_ticket signed comes out."""
        self.assertEqual(verifier().verify(ticket(), NOW), DATA)

    def test_data_is_untouched(self) -> None:
        """Any text can be signed, and comes out as it was."""
        for data in ("", ' {"name": "Zoë"}\r\n', "\0"):
            self.assertEqual(verifier().verify(resigned(data=data), NOW), data)

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

    def test_authority_of_a_chain(self) -> None:
        """A certificate that is no CA's makes nobody's tickets good."""
        leaf = signer()
        below = pki.issue(leaf, "below", "ticket", NOW, key_size=2048)
        server = TicketVerifier([leaf.certificate, authority().certificate])
        with self.assertRaisesRegex(TicketRefused, "not issued by the trusted CA"):
            server.verify(ticket(identity=below), NOW)
        server.trust([leaf.certificate])
        with self.assertRaisesRegex(TicketRefused, "not issued by the trusted CA"):
            server.verify(ticket(identity=below), NOW)

    def test_authority_now(self) -> None:
        """One that has ended, or has not begun, counts for nothing."""
        for start, taken in (
            (NOW, True),
            (NOW - timedelta(days=2), False),
            (NOW + timedelta(days=2), False),
        ):
            ca = pki.make_authority("short", start, 1)
            identity = pki.issue(ca, "proxy", "ticket", NOW, key_size=2048)
            server = TicketVerifier([ca.certificate])
            if taken:
                self.assertEqual(server.verify(ticket(identity=identity), NOW), DATA)
            else:
                with self.assertRaisesRegex(TicketRefused, "not issued by the trusted CA"):
                    server.verify(ticket(identity=identity), NOW)

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


TEXT = some.text() | some.text("0123456789") | some.binary().map(base64.b64encode).map(bytes.decode)
JSON = some.recursive(
    some.none() | some.booleans() | some.floats() | some.integers() | some.text(),
    lambda inner: some.lists(inner) | some.dictionaries(some.text(), inner),
)
EDITS = some.lists(
    some.tuples(
        some.sampled_from(["flip", "delete", "insert", "repeat"]),
        some.integers(0, 4000),
        some.integers(1, 255),
    ),
    min_size=1,
    max_size=3,
)


def edited(text: bytes, edits: Sequence[tuple[str, int, int]]) -> bytes:
    """With bytes changed, taken away, put in, or there twice."""
    for what, at, number in edits:
        at %= len(text) + 1
        before, part, after = text[:at], text[at : at + number], text[at + number :]
        if what == "flip":
            part = bytes(byte ^ number for byte in part[:1]) + part[1:]
        elif what == "delete":
            part = b""
        elif what == "insert":
            part = bytes([number]) + part
        else:
            part += part
        text = before + part + after
    return text


class AnythingTests(SynchronousTestCase):
    """Whatever is sent is refused as a ticket is, or is what was signed."""

    def judge(self, body: bytes) -> None:
        """Taken or refused; and if it is taken, it has the signed values."""
        try:
            data = verifier().verify(body, NOW)
        except (TicketRefused, TicketMalformed):
            return
        # Not validating: it also has to read the line ends that are taken.
        found = json.loads(base64.b64decode(body.translate(bytes.maketrans(b"-_", b"+/"))))
        good = fields_of(ticket())
        self.assertEqual([found[name] for name in SIGNED], [good[name] for name in SIGNED])
        self.assertEqual(data, DATA)

    @given(some.binary(max_size=200))
    def test_bytes(self, body: bytes) -> None:
        """Bytes are refused."""
        self.judge(body)
        self.judge(base64.b64encode(body))

    @given(JSON)
    def test_json(self, value: object) -> None:
        """JSON is refused."""
        self.judge(body_of(value))

    @given(some.dictionaries(some.sampled_from(FIELDS), JSON | TEXT))
    def test_fields(self, changes: dict[str, object]) -> None:
        """A ticket with other fields is refused, or the signed ones are the same."""
        self.judge(body_of({**fields_of(ticket()), **changes}))

    @settings(max_examples=300)
    @given(EDITS)
    def test_edited_body(self, edits: Sequence[tuple[str, int, int]]) -> None:
        """A ticket whose base64 was edited is refused, or the signed values are the same."""
        self.judge(edited(ticket(), edits))

    @settings(max_examples=300)
    @given(EDITS)
    def test_edited_json(self, edits: Sequence[tuple[str, int, int]]) -> None:
        """A ticket whose JSON was edited is refused, or the signed values are the same."""
        self.judge(base64.b64encode(edited(base64.b64decode(ticket()), edits)))

    @settings(max_examples=300)
    @given(some.sampled_from(FIELDS), EDITS)
    def test_edited_value(self, name: str, edits: Sequence[tuple[str, int, int]]) -> None:
        """A ticket of which one value was edited is refused, or the signed ones are the same."""
        value = edited(fields_of(ticket())[name].encode(), edits)
        self.judge(changed(**{name: value.decode(errors="surrogateescape")}))

    @settings(max_examples=300)
    @given(
        some.permutations(SIGNED),
        some.permutations(SIGNED),
        some.tuples(*[some.integers(-2, 2)] * 3),
    )
    def test_borders(self, signed: list[str], order: list[str], shifts: tuple[int, ...]) -> None:
        """What was signed, taken apart elsewhere and in another order, is refused."""
        fields = fields_of(resigned(signedFields=",".join(signed)))
        text, at = joined(fields), 0
        for name, shift in zip(order, (*shifts, len(text)), strict=True):
            end = max(at, at + len(fields[name]) + shift)
            fields[name], at = text[at:end], end
        self.judge(body_of({**fields, "signedFields": ",".join(order)}))

    @given(some.binary(max_size=300))
    def test_certificate(self, der: bytes) -> None:
        """Whatever stands where the certificate should is refused."""
        with self.assertRaises(TicketRefused):
            verifier().verify(changed(certificate=pem(der)), NOW)

    @settings(max_examples=300)
    @given(some.integers(0, 1500), some.integers(1, 255))
    def test_flipped_certificate(self, at: int, bits: int) -> None:
        """A certificate is refused when one byte is wrong in what its CA signed."""
        der = bytearray(signer().certificate.public_bytes(Encoding.DER))
        signed = bytes(signer().certificate.tbs_certificate_bytes)
        der[der.index(signed) + at % len(signed)] ^= bits
        with self.assertRaises(TicketRefused):
            verifier().verify(changed(certificate=pem(bytes(der))), NOW)
