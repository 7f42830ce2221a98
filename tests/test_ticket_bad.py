"""Tickets that are refused, each kind with the real Engine's status, and what they leave behind."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from datetime import timedelta

from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding
from cryptography.hazmat.primitives.hashes import SHA1, SHA256, SHA512
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, ObjectIdentifier
from twisted.trial.unittest import SynchronousTestCase

from tests.engine_kit import NOW, authority, signer
from tests.test_ticket import (
    DATA,
    FIELDS,
    SECOND,
    SIGNED,
    body_of,
    certificate,
    certified,
    certified_pem,
    changed,
    fields_of,
    joined,
    pem,
    pss,
    resigned,
    ticket,
    verifier,
)
from vmconsole import pki
from vmconsole.engine.ticket import TicketMalformed, TicketRefused, TicketVerifier

ANOTHER_COMMAND = '{"command":"available_consoles","version":1}'

Make = Callable[[], bytes]


def of_unknown_algorithm() -> bytes:
    """Its certificate claims to be signed by way of a digest that nobody knows."""
    der = certificate().public_bytes(Encoding.DER)
    sha256 = bytes.fromhex("608648016503040201")
    return changed(certificate=pem(der.replace(sha256, sha256[:-1] + b"\x7f")))


def elliptic() -> bytes:
    """All of it is right, but made with a key that is not RSA."""
    key = ec.generate_private_key(ec.SECP256R1())
    signature = key.sign(joined(fields_of(ticket())).encode(), ec.ECDSA(SHA256()))
    return changed(
        v2_signature=base64.b64encode(signature).decode(),
        certificate=certified_pem(key=key.public_key()),
    )


def flipped(name: str) -> bytes:
    """One bit of what is in base64 in a field is wrong."""
    value = bytearray(base64.b64decode(fields_of(ticket())[name]))
    value[-1] ^= 1
    return changed(**{name: base64.b64encode(value).decode()})


def doubled(name: str, again: str | None = None, escaped: bool = False) -> bytes:
    """A field is there twice: with the same value, or another one, or with its name escaped."""
    fields = fields_of(ticket())
    key = f"\\u{ord(name[0]):04x}{name[1:]}" if escaped else name
    value = json.dumps(fields[name] if again is None else again)
    return base64.b64encode(f'{json.dumps(fields)[:-1]}, "{key}": {value}}}'.encode())


def in_base64(before: bytes = b"", after: bytes = b"") -> bytes:
    """A good ticket's JSON with something around it."""
    return base64.b64encode(before + base64.b64decode(ticket()) + after)


def with_field(value: bytes) -> bytes:
    """A good ticket with a field more, which is this JSON."""
    return base64.b64encode(b'{"more": ' + value + b", " + base64.b64decode(ticket())[1:])


def two_tickets(remainder: int) -> bytes:
    """Two of them, one after the other; the first one's base64 is padded, or is not."""
    fields = fields_of(ticket())
    for more in ("", "x", "xx"):
        first = json.dumps({**fields, "more": more}).encode()
        if len(first) % 3 == remainder:
            return base64.b64encode(first) + ticket(b"saltsal2")
    raise AssertionError(remainder)


DATES = {
    "13 digits": "2026112408000",
    "15 digits": "202611240800000",
    "month 13": "20261340080000",
    "day 0": "20261100080000",
    "February 30": "20260230080000",
    "hour 24": "20261124240000",
    "minute 60": "20261124086000",
    "second 60": "20261124080060",
    "second 61": "20261124080061",
    "year 0": "00001124080000",
    "foreign digits": "٢٠٢٦١١٢٤٠٨٠٠٠٠",
    "a foreign digit": "2026112408000\u0662",
    "space for a zero": "202611 4080000",
    "space before": " 20261124080000",
    "space for a digit": "2026112408000 ",
    "newline": "20261124080000\n",
    "plus": "+2026112408000",
    "minus": "-2026112408000",
    "separators": "2026-11-24T08:00:00Z",
    "no text": "",
    "NUL": "20261124080000\0",
}

SALTS = {
    "text": "???",
    "not padded": "c2FsdHNhbHQ",
    "padded twice": "c2FsdHNhbHQ==",
    "more behind its padding": "c2FsdHNhbHQ=c2Fs",
    "padded first": "=c2FsdHNhbHQ",
    "not ASCII": "c2FsdHNhbHä=",
    "with NUL": "c2FsdHNhbHQ=\0",
}

SIGNED_FIELDS = {
    **{f"without {name}": ",".join(x for x in SIGNED if x != name) for name in SIGNED},
    **{f"with {name} twice": ",".join((*SIGNED, name)) for name in SIGNED},
    "with an unknown one": "salt,validFrom,validTo,data,more",
    "with an unknown one for data": "salt,validFrom,validTo,more",
    "with certificate": "salt,validFrom,validTo,data,certificate",
    "with themselves": "salt,validFrom,validTo,data,signedFields",
    "empty": "",
    "comma before": ",salt,validFrom,validTo,data",
    "comma between": "salt,,validFrom,validTo,data",
    "comma behind": "salt,validFrom,validTo,data,",
    "spaces": "salt, validFrom, validTo, data",
    "space behind": "salt,validFrom,validTo,data ",
    "other case": "salt,validfrom,validto,data",
    "semicolons": "salt;validFrom;validTo;data",
}

# What was signed is still the same, joined; only the borders between the values are elsewhere.
MOVED: dict[str, dict[str, Make]] = {
    "date": {
        "validTo to data": lambda: changed(validTo="2026112408000", data=f"5{DATA}"),
        "data to validTo": lambda: changed(validTo="20261124080005{", data=DATA[1:]),
        "validTo to validFrom": lambda: changed(
            validFrom="202611240800002", validTo="0261124080005"
        ),
        "salt to validFrom": lambda: changed(salt="c2FsdHNhbHQ", validFrom="=20261124080000"),
        "all into data": lambda: changed(
            salt="", validFrom="", validTo="", data=joined(fields_of(ticket()))
        ),
    },
    "salt": {
        "a date from data, and a date into the salt": lambda: changed(
            salt="c2FsdHNhbHQ=20261124080000",
            validFrom="20261124080005",
            validTo="20261124080010",
            data="{}",
            v2_signature=fields_of(resigned(data="20261124080010{}"))["v2_signature"],
        ),
        "salt and data swapped": lambda: changed(
            signedFields="data,validFrom,validTo,salt", data="c2FsdHNhbHQ=", salt=DATA
        ),
    },
    "lifetime": {
        "dates swapped": lambda: changed(
            signedFields="salt,validTo,validFrom,data",
            validTo="20261124080000",
            validFrom="20261124080005",
        ),
    },
}

# By words of the reason.
REFUSED: dict[str, dict[str, Make]] = {
    "no v2_signature": {
        "no signature": lambda: changed(v2_signature=None),
        "signature of older engines": lambda: changed(
            v2_signature=None, digest="sha1", signature=fields_of(ticket())["v2_signature"]
        ),
    },
    "signature is wrong": {
        "data altered": lambda: changed(data=ANOTHER_COMMAND),
        "data emptied": lambda: changed(data=""),
        "data with NUL": lambda: changed(data=f"{DATA}\0"),
        "salt altered": lambda: flipped("salt"),
        "salt with a line's end": lambda: changed(salt="c2FsdHNhbHQ=\n"),
        "validFrom altered": lambda: changed(validFrom="20261124080001"),
        "validTo altered": lambda: changed(validTo="20261124080010"),
        "order altered": lambda: changed(signedFields="validFrom,salt,validTo,data"),
        "another certificate": lambda: changed(
            certificate=certified_pem(key=authority("another CA").key.public_key())
        ),
        "signature altered": lambda: flipped("v2_signature"),
        "signature empty": lambda: changed(v2_signature=""),
        "signature cut": lambda: changed(v2_signature=fields_of(ticket())["v2_signature"][:-4]),
        "signature longer": lambda: changed(
            v2_signature="AAAA" + fields_of(ticket())["v2_signature"]
        ),
        "signature of zeros": lambda: changed(v2_signature="A" * 342 + "=="),
        "signature not base64": lambda: changed(v2_signature="?"),
        "signature not ASCII": lambda: changed(v2_signature="ä"),
        "signature by another key": lambda: ticket(
            identity=pki.Identity(signer().certificate, authority().key)
        ),
        "signature of other data": lambda: resigned(text=ANOTHER_COMMAND),
        "signature of data alone": lambda: resigned(text=DATA),
        "signature of nothing": lambda: resigned(text=""),
        "signature with commas between": lambda: resigned(
            text=",".join(fields_of(ticket())[name] for name in SIGNED)
        ),
        "PKCS 1 v1.5": lambda: resigned(padding.PKCS1v15()),
        "PSS salt of digest length": lambda: resigned(pss(32)),
        "PSS salt shorter by one": lambda: resigned(pss(221)),
        "no PSS salt": lambda: resigned(pss(0)),
        "SHA-1": lambda: resigned(pss(234, SHA1()), SHA1()),
        "SHA-512": lambda: resigned(pss(190, SHA512()), SHA512()),
        "SHA-1 in the mask": lambda: resigned(pss(222, SHA1())),
        "SHA-512 in the mask": lambda: resigned(pss(222, SHA512())),
    },
    "ticket is not valid now": {
        "early": lambda: ticket(now=NOW + 11 * SECOND),
        "early by hours": lambda: ticket(now=NOW + timedelta(hours=3)),
        "late": lambda: ticket(now=NOW - 16 * SECOND),
        "late by hours": lambda: ticket(now=NOW - timedelta(hours=3)),
        "first year": lambda: resigned(validFrom="00010101000000", validTo="00010101000005"),
        "last year": lambda: resigned(validFrom="99991231235959", validTo="99991231235959"),
    },
    "lifetime": {
        "ends before it begins": lambda: resigned(validTo="20261124075959"),
        "lives a second too long": lambda: ticket(lifetime=61 * SECOND),
        "lives for hours": lambda: ticket(lifetime=timedelta(hours=3)),
        "lives for days": lambda: ticket(lifetime=timedelta(days=2, seconds=5)),
    },
    "trusted CA": {
        "certificate of an unknown algorithm": of_unknown_algorithm,
        "another CA": lambda: certified(issuer=authority("another CA")),
        "another CA of the same name": lambda: certified(
            issuer=authority("another CA"), issuer_name=authority().certificate.subject
        ),
        "our CA by another name": lambda: certified(
            issuer_name=authority("another CA").certificate.subject
        ),
        "intermediate": lambda: certified(issuer=signer()),
        "intermediate with its chain": lambda: changed(
            certificate=certified_pem(issuer=signer()) + signer().certificate_pem().decode()
        ),
        "self-signed": lambda: certified(issuer=pki.Identity(certificate(), signer().key)),
        "certificate altered": lambda: changed(
            certificate=pem(certificate().public_bytes(Encoding.DER).replace(b"proxy", b"prosy"))
        ),
    },
    "self-signed": {
        "the CA itself": lambda: ticket(identity=authority()),
        "the CA's certificate": lambda: changed(certificate=authority().certificate_pem().decode()),
    },
    "extended key usage lacks": {
        "EKU of a client": lambda: certified(usages=[ExtendedKeyUsageOID.CLIENT_AUTH]),
        "EKU of anything": lambda: certified(usages=[ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE]),
        "EKU that begins alike": lambda: certified(
            usages=[ObjectIdentifier(f"{pki.TICKET_OID.dotted_string}.1")]
        ),
    },
    "extensions cannot be read": {
        "EKU of garbage": lambda: certified(usages=(), usages_der=b"garbage"),
    },
    "certificate is not valid now": {
        "certificate expired": lambda: certified(ends=NOW - SECOND),
        "certificate not yet valid": lambda: certified(starts=NOW + SECOND),
    },
    "not RSA": {
        "elliptic curve": elliptic,
        "Edwards curve": lambda: certified(key=ed25519.Ed25519PrivateKey.generate().public_key()),
    },
    "certificate cannot be read": {
        "certificate of garbage": lambda: changed(certificate="garbage"),
        "certificate empty": lambda: changed(certificate=""),
        "certificate without armour": lambda: changed(
            certificate=base64.b64encode(certificate().public_bytes(Encoding.DER)).decode()
        ),
        "certificate cut": lambda: changed(
            certificate=pem(certificate().public_bytes(Encoding.DER)[:-1])
        ),
        "certificate with NUL": lambda: changed(certificate=certified_pem().replace("\n", "\0")),
        "a key as certificate": lambda: changed(certificate=signer().key_pem().decode()),
    },
    "The salt has": {
        f"salt of {size} bytes": lambda size=size: ticket(bytes(size)) for size in (0, 7, 9, 16)
    },
    "salt is no base64": {
        f"salt {name}": lambda text=text: resigned(salt=text) for name, text in SALTS.items()
    },
    "date is not": {
        f"{field}: {name}": lambda change={field: text}: resigned(**change)
        for field in ("validFrom", "validTo")
        for name, text in DATES.items()
    },
    "signedFields is not": {
        f"signed fields {name}": lambda text=text: resigned(signedFields=text)
        for name, text in SIGNED_FIELDS.items()
    },
}

MALFORMED: dict[str, dict[str, Make]] = {
    "no JSON in base64": {
        "empty": lambda: b"",
        "blank": lambda: b" \r\n",
        "not in base64": lambda: base64.b64decode(ticket()),
        "not ASCII": lambda: ticket() + "ä".encode(),
        "NUL behind it": lambda: ticket() + b"\0",
        "NUL before it": lambda: b"\0" + ticket(),
        "more behind it": lambda: ticket() + b"%",
        "padded too much": lambda: ticket() + b"====",
        "cut": lambda: ticket()[:-5],
        "twice, padded": lambda: two_tickets(1),
        "twice, not padded": lambda: two_tickets(0),
        "twice, on lines": lambda: ticket() + b"\n" + ticket(b"saltsal2"),
        "base64 of base64": lambda: base64.b64encode(ticket()),
        "no JSON": lambda: base64.b64encode(b"ticket"),
        "JSON and more": lambda: in_base64(after=b"{}"),
        "JSON and NUL": lambda: in_base64(after=b"\0"),
        "NUL and JSON": lambda: in_base64(before=b"\0"),
        "NUL in a text": lambda: with_field(b'"\0"'),
        "not UTF-8": lambda: with_field(b'"\xff"'),
        "overlong UTF-8": lambda: with_field(b'"\xc0\x80"'),
        "deep lists": lambda: with_field(b"[" * 10000 + b"]" * 10000),
        "deep objects": lambda: base64.b64encode(b'{"":' * 10000),
        "huge integer": lambda: with_field(b"9" * 5000),
    },
    "no text": {
        "huge float": lambda: with_field(b"9e9999"),
        "NaN": lambda: with_field(b"NaN"),
        "lone surrogate": lambda: changed(data="\ud800"),
        "lone surrogate aside": lambda: changed(more="\udfff"),
        "surrogate as UTF-8": lambda: with_field(b'"\xed\xa0\x80"'),
        "unknown field nested": lambda: changed(more={"a": "b"}),
        **{
            f"{name}: {json.dumps(value)}": lambda change={name: value}: body_of(
                {**fields_of(ticket()), **change}
            )
            for name in FIELDS
            for value in (None, True, 20261124080000, 0.5, [], ["text"], {}, {"text": "text"})
        },
    },
    "no JSON object": {
        "list": lambda: body_of([fields_of(ticket())]),
        "list of pairs": lambda: body_of(list(fields_of(ticket()).items())),
        "text": lambda: body_of("salt"),
        "number": lambda: body_of(1),
        "null": lambda: body_of(None),
    },
    "Missing": {
        "no fields": lambda: body_of({}),
        **{
            f"{name} missing": lambda name=name: changed(**{name: None})
            for name in FIELDS
            if name != "v2_signature"
        },
    },
    "twice": {
        "unknown field doubled": lambda: with_field(b'"", "more": ""'),
        **{f"{name} doubled": lambda name=name: doubled(name) for name in FIELDS},
        **{f"{name} doubled, otherwise": lambda name=name: doubled(name, "x") for name in FIELDS},
        **{
            f"{name} doubled, escaped": lambda name=name: doubled(name, escaped=True)
            for name in FIELDS
        },
    },
    "too large": {
        "a byte too large": lambda: ticket().ljust(65537),
        "far too large": lambda: changed(more="x" * 1000000),
    },
    "no extended key usage": {"no EKU": lambda: certified(usages=())},
}


def reordered() -> bytes:
    """A ticket's fields, the other way round, with spaces, lines and escapes."""
    fields = dict(reversed(fields_of(ticket()).items()))
    text = json.dumps(fields, indent=3).replace("public", "\\u0070ublic")
    return base64.encodebytes(text.encode()).replace(b"+", b"-").replace(b"/", b"_")


REPLAYED: dict[str, Make] = {
    "as it was": ticket,
    "with lines": lambda: base64.encodebytes(base64.b64decode(ticket())),
    "re-encoded": reordered,
    "with a field more": lambda: changed(more="x"),
    "with another certificate for the key": certified,
    "signed again": resigned,
    "signed in another order": lambda: resigned(signedFields="data,validTo,validFrom,salt"),
    "with other data": lambda: resigned(data=ANOTHER_COMMAND),
    "with other dates": lambda: ticket(now=NOW + SECOND, lifetime=60 * SECOND),
    "with its salt's idle bits set": lambda: resigned(salt="c2FsdHNhbHR="),
    "with its salt on lines": lambda: resigned(salt="c2Fsd\r\nHNhbHQ=\n"),
}


def kinds(table: dict[str, dict[str, Make]]) -> Iterator[tuple[str, str, Make]]:
    """Words of the reason, name, maker."""
    for words, makers in table.items():
        for name, make in makers.items():
            yield words, name, make


class BadTicketTests(SynchronousTestCase):
    """Each kind of bad ticket is refused with the reference's status, and poisons nothing."""

    def refusal(self, server: TicketVerifier, body: bytes) -> tuple[type[Exception], str]:
        """How it was refused, and why."""
        with self.assertRaises((TicketRefused, TicketMalformed)) as caught:
            server.verify(body, NOW)
        return type(caught.exception), str(caught.exception)

    def check(
        self, table: dict[str, dict[str, Make]], status: type[TicketRefused | TicketMalformed]
    ) -> None:
        for words, name, make in kinds(table):
            # With room for one ticket: a bad one must not take it.
            server = verifier(capacity=1)
            try:
                found, reason = self.refusal(server, make())
            except self.failureException:
                self.fail(f"{name}: taken")
            self.assertEqual((name, found), (name, status))
            self.assertIn(words, reason, name)
            self.assertEqual(server.verify(ticket(), NOW), DATA, name)

    def test_kinds(self) -> None:
        """There are far more than thirty kinds, and no two of them are the same ticket."""
        tables = (REFUSED, MOVED, MALFORMED)
        found = [kind for table in tables for kind in kinds(table)]
        names = {name for _, name, _ in found}
        self.assertEqual(len(names), len(found))
        self.assertEqual(len({make() for _, _, make in found}), len(found))
        self.assertGreaterEqual(len(names), 150)

    def test_refused(self) -> None:
        """What proves nothing is TicketRefused, 403, and the good ticket of that salt is taken."""
        self.check(REFUSED, TicketRefused)

    def test_malformed(self) -> None:
        """What is no ticket is TicketMalformed, 500, and the good ticket of that salt is taken."""
        self.check(MALFORMED, TicketMalformed)

    def test_moved(self) -> None:
        """A ticket whose values have other borders is refused, though its signature fits."""
        self.check(MOVED, TicketRefused)
        key = signer().key.public_key()
        for _, _, make in kinds(MOVED):
            fields = fields_of(make())
            signature = base64.b64decode(fields["v2_signature"])
            key.verify(signature, joined(fields).encode(), pss(), SHA256())

    def test_one_after_the_other(self) -> None:
        """A verifier that saw every bad ticket takes the good one, whose salt most of them had."""
        server = verifier(capacity=1)
        for table in (REFUSED, MOVED, MALFORMED):
            for _, _, make in kinds(table):
                self.refusal(server, make())
        self.assertEqual(server.verify(ticket(), NOW), DATA)

    def test_replayed(self) -> None:
        """A salt that was taken is not taken again in any guise, and another one is."""
        for name, make in REPLAYED.items():
            verifier().verify(make(), NOW)
            server = verifier()
            server.verify(ticket(), NOW)
            for _ in range(2):
                reason = (TicketRefused, "The ticket was used before.")
                self.assertEqual((name, self.refusal(server, make())), (name, reason))
            self.assertEqual(server.verify(ticket(b"saltsal2"), NOW), DATA, name)

    def test_almost_bad(self) -> None:
        """What is on the edge, and not over it, is taken."""
        several = [ExtendedKeyUsageOID.CLIENT_AUTH, pki.TICKET_OID]
        for name, body in {
            "early": ticket(now=NOW + 10 * SECOND),
            "late": ticket(now=NOW - 15 * SECOND),
            "no lifetime": ticket(lifetime=timedelta(0)),
            "longest lifetime": ticket(lifetime=60 * SECOND),
            "certificate of this second": certified(starts=NOW, ends=NOW),
            "certificate for more": certified(usages=several),
            "certificate and its CA": changed(
                certificate=certified_pem() + authority().certificate_pem().decode()
            ),
            "largest": ticket().ljust(65536),
            "salt of zeros": ticket(bytes(8)),
            "salt in the URL-safe alphabet": resigned(salt="-_-_-_-_-_8="),
        }.items():
            try:
                verifier().verify(body, NOW)
            except (TicketRefused, TicketMalformed) as error:
                self.fail(f"{name}: {error}")
