"""The stand-in for an oVirt Engine: as strict and as lenient as the real one, and our client on it.

The tickets are made by hand here: neither our own signer nor the stand-in's reader is the measure.
"""

from __future__ import annotations

import errno
import functools
import json
import re
import resource
import select
import socket
import ssl
from base64 import b64decode, b64encode
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime, timedelta
from io import BytesIO
from pathlib import Path
from typing import Any, cast

import treq
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.hashes import SHA1, SHA256, SHA512, HashAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier
from treq.testing import RequestTraversalAgent, StubTreq
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectError
from twisted.internet.interfaces import IPushProducer, IReactorTime
from twisted.internet.protocol import Protocol, connectionDone
from twisted.internet.ssl import Certificate, trustRootFromCertificates
from twisted.internet.threads import deferToThread
from twisted.python.failure import Failure
from twisted.trial.unittest import TestCase
from twisted.web.client import (
    Agent,
    BrowserLikePolicyForHTTPS,
    FileBodyProducer,
    ResponseFailed,
    ResponseNeverReceived,
)

from tests.engine_kit import (
    NOW,
    EngineTestCase,
    all_keys,
    authority,
    client_of,
    public_line,
    signer,
    start,
    todays_authority,
)
from tests.ovirt_engine import FAULTS, OVirtEngine
from vmconsole import pki
from vmconsole.engine.client import EngineClient
from vmconsole.errors import EngineError, EngineUnreachable

URL = "https://engine.example.com/ovirt-engine/services/vmconsole-proxy"
KEYS = {"command": "public_keys", "version": 1, "key_fp": "", "key_type": "", "key_content": ""}
OID = ObjectIdentifier("1.3.6.1.4.1.2312.13.1.2.1.1")
SIGNED = ("salt", "validFrom", "validTo", "data")
VM1 = "00000000-0000-4000-8000-000000000001"
VM2 = "f0000000-0000-4000-8000-000000000002"
VM3 = "70000000-0000-4000-8000-000000000003"

Fields = dict[str, Any]
Private = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey


@functools.cache
def rsa_key(name: str = "proxy", bits: int = 2048) -> rsa.RSAPrivateKey:
    """A key of ``name``, always the same."""
    return rsa.generate_private_key(65537, bits)


@functools.cache
def odd_key() -> rsa.RSAPrivateKey:
    """One of 2049 bits, which generators avoid: the last octet more makes no room for salt."""
    p, q = (rsa_key("part", bits).private_numbers().p for bits in (2048, 2050))
    public = rsa.RSAPublicNumbers(65537, p * q)
    d = pow(65537, -1, (p - 1) * (q - 1))
    parts = (d % (p - 1), d % (q - 1), pow(q, -1, p))
    key = rsa.RSAPrivateNumbers(p, q, d, *parts, public).private_key()
    assert key.key_size == 2049
    return key


def named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def certificate(
    *,
    key: Private | None = None,
    usages: Sequence[ObjectIdentifier] | None = (OID,),
    is_critical: bool = False,
    issuer: x509.Name | None = None,
    issuer_key: rsa.RSAPrivateKey | None = None,
    starts: timedelta = -timedelta(hours=1),
    ends: timedelta = timedelta(days=1),
    more: Sequence[tuple[x509.ExtensionType, bool]] = (),
) -> str:
    """A signer's certificate in PEM, good for the engine but for what is said."""
    builder = (
        x509.CertificateBuilder()
        .subject_name(named("proxy"))
        .issuer_name(issuer or authority().certificate.subject)
        .public_key((key or rsa_key()).public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW + starts)
        .not_valid_after(NOW + ends)
    )
    if usages is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage(usages), is_critical)
    for extension, critical in more:
        builder = builder.add_extension(extension, critical)
    signed = builder.sign(issuer_key or authority().key, SHA256())
    return signed.public_bytes(Encoding.PEM).decode()


@functools.cache
def good_certificate() -> str:
    return certificate()


def date(offset: float = 0.0) -> str:
    """So many seconds after NOW."""
    return (NOW + timedelta(seconds=offset)).strftime("%Y%m%d%H%M%S")


def pss(salt_length: int, mgf: HashAlgorithm | None = None) -> padding.PSS:
    return padding.PSS(padding.MGF1(mgf or SHA256()), salt_length)


def make_fields(
    command: object = KEYS,
    *,
    key: rsa.RSAPrivateKey | None = None,
    how: padding.AsymmetricPadding | None = None,
    digest: HashAlgorithm | None = None,
    names: str = ",".join(SIGNED),
    **changed: Any,
) -> Fields:
    """A ticket's fields. What is changed by name is so before the signature is made."""
    fields: Fields = {
        "salt": b64encode(b"12345678").decode(),
        "validFrom": date(),
        "validTo": date(5),
        "data": command if isinstance(command, str) else json.dumps(command),
        "certificate": changed.pop("certificate", None) or good_certificate(),
        **changed,
    }
    each = [name.strip() for name in names.split(",")]
    signed = "".join(str(fields.get(name, "")) for name in each).encode("utf-8", "replace")
    # For 2048 bits it is written out, as the reference has it.
    signature = (key or rsa_key()).sign(signed, how or pss(222), digest or SHA256())
    return {**fields, "signedFields": names, "v2_signature": b64encode(signature).decode()}


def encoded(fields: object) -> bytes:
    return b64encode(json.dumps(fields).encode())


def make_ticket(command: object = KEYS, **settings: Any) -> bytes:
    return encoded(make_fields(command, **settings))


def without(name: str) -> bytes:
    """A ticket that lacks a field, and is signed as if it was empty."""
    changed: Fields = {name: ""} if name in SIGNED else {}
    fields = make_fields(**changed)
    del fields[name]
    return encoded(fields)


def tampered(**changes: Any) -> bytes:
    """A ticket that was changed after it was signed."""
    return encoded({**make_fields(), **changes})


class InMemoryTestCase(EngineTestCase):
    """An engine in memory, with its clock at NOW."""

    def setUp(self) -> None:
        super().setUp()
        self.engine = OVirtEngine(self.clock, authority())
        self.treq: Any = StubTreq(self.engine)

    def post(self, body: bytes, **settings: Any) -> tuple[int, bytes]:
        """Status and body of the answer."""
        settings = {"headers": {"Content-Type": "text/plain"}, **settings}
        response = self.successResultOf(self.treq.post(settings.pop("url", URL), body, **settings))
        return response.code, self.successResultOf(self.treq.content(response))

    def status(self, body: bytes, **settings: Any) -> int:
        return self.post(body, **settings)[0]

    def ask(self, command: object = KEYS) -> Any:
        """The answer to a command."""
        status, body = self.post(make_ticket(command))
        self.assertEqual(status, 200)
        return json.loads(body)

    def check(self, status: int, tickets: dict[str, bytes]) -> None:
        """Each of these gets this status, and no body unless that is 200."""
        self.assertEqual(self.status(make_ticket()), 200)
        for what, body in tickets.items():
            found, reply = self.post(body)
            self.assertEqual((what, found), (what, status))
            self.assertEqual(bool(reply), status == 200)


class ForbiddenTests(InMemoryTestCase):
    """403: what does not prove that it comes from the proxy, now."""

    def test_tampered(self) -> None:
        """What is signed cannot be changed, nor signed by somebody else."""
        stranger = rsa_key("stranger")
        self.check(
            403,
            {
                "data": tampered(data=json.dumps({**KEYS, "more": 1})),
                "salt": tampered(salt=b64encode(b"87654321").decode()),
                "validTo": tampered(validTo=date(6)),
                "validFrom": tampered(validFrom=date(-1)),
                "order": tampered(signedFields="validFrom,salt,validTo,data"),
                "other key": make_ticket(key=stranger),
                "other certificate": tampered(certificate=certificate(key=stranger)),
                "short": tampered(v2_signature=make_fields()["v2_signature"][:-4]),
                "empty": tampered(v2_signature=""),
            },
        )

    def test_scheme(self) -> None:
        """Only RSASSA-PSS with SHA-256, MGF1 with SHA-256, and the longest salt that fits."""
        self.check(
            403,
            {
                "digest's length": make_ticket(how=pss(32)),
                "one less": make_ticket(how=pss(221)),
                "none": make_ticket(how=pss(0)),
                "PKCS 1": make_ticket(how=padding.PKCS1v15()),
                "SHA-1": make_ticket(how=pss(222), digest=SHA1()),
                "SHA-512": make_ticket(how=pss(190), digest=SHA512()),
                "MGF1 with SHA-1": make_ticket(how=pss(222, SHA1())),
            },
        )

    def test_no_signature(self) -> None:
        """Without v2_signature, also if there is one of the older engines."""
        fields = make_fields()
        signature = fields.pop("v2_signature")
        self.check(
            403,
            {
                "none": encoded(fields),
                "older": encoded({**fields, "digest": "sha1", "signature": signature}),
            },
        )

    def test_signed_fields(self) -> None:
        """salt and data have to be among the signed ones."""
        self.check(
            403,
            {
                "no salt": make_ticket(names="validFrom,validTo,data"),
                "no data": make_ticket(names="salt,validFrom,validTo"),
                "none": make_ticket(names=""),
            },
        )

    def test_lifetime(self) -> None:
        """More than 10 s before or behind it."""
        self.check(
            403,
            {
                "over": make_ticket(validFrom=date(-60), validTo=date(-11)),
                "to come": make_ticket(validFrom=date(11), validTo=date(60)),
                "no date": make_ticket(validTo="tomorrow"),
                "short": make_ticket(validTo=date(5)[:-2]),
                "empty": make_ticket(validFrom=""),
            },
        )
        ticket = make_ticket()
        for advance, status in ((15.0, 200), (0.1, 403)):
            self.clock.advance(advance)
            self.assertEqual(self.status(ticket), status, advance)

    def test_issuer(self) -> None:
        """Only a certificate that the engine's CA issued itself."""
        middle = rsa_key("middle")
        ca = authority().certificate.subject
        for_ca = [(x509.BasicConstraints(ca=True, path_length=None), True)]
        self.check(
            403,
            {
                "other CA": make_ticket(
                    certificate=certificate(
                        issuer=authority("other CA").certificate.subject,
                        issuer_key=authority("other CA").key,
                    )
                ),
                "other CA of that name": make_ticket(
                    certificate=certificate(issuer=ca, issuer_key=authority("other CA").key)
                ),
                "self-signed": make_ticket(
                    certificate=certificate(issuer=named("proxy"), issuer_key=rsa_key())
                ),
                "below one of its own": make_ticket(
                    certificate=certificate(issuer=named("proxy"), issuer_key=middle)
                    + certificate(key=middle, more=for_ca)
                ),
                "garbage": make_ticket(certificate="garbage"),
                "half": make_ticket(certificate=good_certificate()[:400]),
            },
        )

    def test_certificate(self) -> None:
        """One that is valid now, to the second, has the OID, and nothing critical and unknown."""
        second = timedelta(seconds=1)
        strange = x509.UnrecognizedExtension(ObjectIdentifier("1.2.3.4"), b"\x05\x00")
        self.check(
            403,
            {
                "expired": make_ticket(certificate=certificate(ends=-second)),
                "not yet valid": make_ticket(certificate=certificate(starts=second)),
                "client": make_ticket(
                    certificate=certificate(usages=[ExtendedKeyUsageOID.CLIENT_AUTH])
                ),
                "any": make_ticket(
                    certificate=certificate(usages=[ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE])
                ),
                "strange": make_ticket(certificate=certificate(more=[(strange, True)])),
            },
        )


class BrokenTests(InMemoryTestCase):
    """500: what the servlet stumbles over."""

    def test_bodies(self) -> None:
        """No ticket at all."""
        self.check(
            500,
            {
                "empty": b"",
                "blank": b" \n",
                "garbage": b"garbage!",
                "bytes": bytes(range(256)),
                "not in base64": json.dumps(make_fields()).encode(),
                "no JSON": b64encode(b"garbage"),
                "cut": make_ticket()[:-40],
                "list": encoded([make_fields()]),
                "null": encoded(None),
                "text": encoded("ticket"),
                "object": encoded({}),
                "nested field": tampered(more={}),
                "list as field": tampered(data=["a"]),
                "NaN": tampered(more=float("nan")),
                "no UTF-8": b64encode(b'{"a":"\xff"}'),
                "deep": b64encode(b"[" * 100000),
            },
        )

    def test_missing(self) -> None:
        """Each field but the signature has to be there; null is as if it was not."""
        for name in (*SIGNED, "certificate", "signedFields"):
            self.check(500, {name: without(name), f"{name} null": tampered(**{name: None})})
        self.check(
            500,
            {
                "signature null": tampered(v2_signature=None),
                "strange name": make_ticket(names="salt,validFrom,validTo,data,more"),
                "no name": make_ticket(names="salt,,data"),
            },
        )

    def test_certificate(self) -> None:
        """No extended key usage at all, or a key that is not RSA."""
        self.check(
            500,
            {
                "no EKU": make_ticket(certificate=certificate(usages=None)),
                "EC": make_ticket(
                    certificate=certificate(key=ec.generate_private_key(ec.SECP256R1()))
                ),
            },
        )

    def test_commands(self) -> None:
        """Unknown commands and versions, and what is no map of strings."""
        self.check(
            500,
            {
                "command": make_ticket({**KEYS, "command": "private_keys"}),
                "no command": make_ticket({"version": 1}),
                "no version": make_ticket({"command": "public_keys"}),
                "version 2": make_ticket({**KEYS, "version": 2}),
                'version "2"': make_ticket({**KEYS, "version": "2"}),
                "version 1.0": make_ticket({**KEYS, "version": 1.0}),
                "version true": make_ticket({**KEYS, "version": True}),
                "version null": make_ticket({**KEYS, "version": None}),
                "nested": make_ticket({**KEYS, "features": {}}),
                "list": make_ticket({**KEYS, "features": ["a"]}),
                "no map": make_ticket([KEYS]),
                "no JSON": make_ticket("public_keys"),
                "empty": make_ticket(""),
            },
        )

    def test_form(self) -> None:
        """A body of that type was read by somebody else before; any other type is fine."""
        for kind, status in (
            ("application/x-www-form-urlencoded", 500),
            ("Application/X-WWW-Form-URLencoded; charset=UTF-8", 500),
            ("text/plain; charset=UTF-8", 200),
            ("application/octet-stream", 200),
            ("", 200),
        ):
            headers = {"Content-Type": kind} if kind else {}
            self.assertEqual(self.status(make_ticket(), headers=headers), status, kind)

    def test_users(self) -> None:
        """A user whom it does not know is a failure, an id that is none has no consoles."""
        self.engine.add_user("alice")
        for user_id, status in (
            ("00000000-0000-4000-8000-000000000000", 500),
            ("1-2-3-4-5", 500),
            ("", 200),
            (None, 200),
            ("alice", 200),
            ("1-2-3-4", 200),
            ("g-2-3-4-5", 200),
            ("00000000-0000-4000-8000-0000000000000", 200),
        ):
            command = {"command": "available_consoles", "version": 1, "user_id": user_id}
            found, body = self.post(make_ticket(command))
            self.assertEqual(found, status, user_id)
            if status == 200:
                self.assertEqual(json.loads(body)["consoles"], [])


class LenientTests(InMemoryTestCase):
    """200: what the real one lets pass."""

    def test_base64(self) -> None:
        """Lines, the URL-safe alphabet, no padding, and bytes of neither alphabet."""
        fields = make_fields(salt=b64encode(b"\xff\xfe\xfb\xff\xfe\xfb\xff\xfe").decode())
        signature = fields["v2_signature"]
        # Characters beyond Latin-1 give a + or a / in the ticket's own base64.
        fields["more"] = "\u00ff" * 90
        body = b64encode(json.dumps(fields, ensure_ascii=False).encode())
        safe = body.translate(bytes.maketrans(b"+/", b"-_"))
        self.assertNotEqual(body, safe)
        self.check(
            200,
            {
                "lines": b"\r\n".join(re.findall(rb".{1,76}", body)) + b"\r\n",
                "URL-safe": safe,
                "no padding": body.rstrip(b"="),
                "other bytes": b" \xff!" + body,
                "signature in lines": encoded(
                    {**fields, "v2_signature": "\n".join(re.findall(".{1,76}", signature))}
                ),
                "behind the padding": encoded({**fields, "v2_signature": f"{signature}AAAA"}),
                "signature URL-safe": encoded(
                    {**fields, "v2_signature": signature.translate(str.maketrans("+/", "-_"))}
                ),
            },
        )

    def test_certificate(self) -> None:
        """CRLF, text before it, more behind it, a critical EKU with others in it, key usage."""
        usage = pki.issue(authority(), "proxy", "ticket", NOW, key_size=2048)
        self.check(
            200,
            {
                "CRLF": make_ticket(certificate=good_certificate().replace("\n", "\r\n")),
                "text": make_ticket(certificate=f"the proxy's\n{good_certificate()}\n"),
                "two": make_ticket(certificate=good_certificate() + certificate(key=rsa_key("x"))),
                "critical": make_ticket(
                    certificate=certificate(
                        usages=[ExtendedKeyUsageOID.CLIENT_AUTH, OID], is_critical=True
                    )
                ),
                "as we issue it": make_ticket(
                    certificate=usage.certificate_pem().decode(), key=usage.key
                ),
                "as it issues it": make_ticket(
                    certificate=(issued := self.engine.issue()).certificate_pem().decode(),
                    key=issued.key,
                ),
            },
        )

    def test_key_sizes(self) -> None:
        """Each size has its own longest salt, odd ones too."""
        for key, length in (
            (rsa_key("small", 1024), 94),
            (odd_key(), 222),
            (rsa_key("large", 3072), 350),
        ):
            pem, bits = certificate(key=key), str(key.key_size)
            self.check(200, {bits: make_ticket(certificate=pem, key=key, how=pss(length))})
            self.check(403, {bits: make_ticket(certificate=pem, key=key, how=pss(length - 1))})

    def test_command(self) -> None:
        """The version as a number or as text, more keys, any filters, and text behind it."""
        self.check(
            200,
            {
                "text": make_ticket({**KEYS, "version": "1"}),
                "more": make_ticket({**KEYS, "features": "role", "x": 1.5, "y": None, "z": True}),
                "no filters": make_ticket({"command": "public_keys", "version": 1}),
                "behind": make_ticket(json.dumps(KEYS) + " and so on"),
                "half a character": make_ticket({**KEYS, "key_fp": "\ud800"}),
            },
        )

    def test_fields(self) -> None:
        """More fields, numbers, any order, blanks between the names, a salt of any size; dates
        need no signature."""
        self.check(
            200,
            {
                "more": tampered(more="text", number=7),
                "order": make_ticket(names="data,validTo,validFrom,salt"),
                "blanks": make_ticket(names=" salt , validFrom,\tvalidTo ,data "),
                "twice": make_ticket(names="salt,data,data"),
                "comma": tampered(signedFields="salt,validFrom,validTo,data,,"),
                "salt": make_ticket(salt=""),
                "half a character": make_ticket(salt="\ud800"),
                "no dates": encoded({**make_fields(names="salt,data"), "validTo": date(100)}),
            },
        )

    def test_lifetime(self) -> None:
        """10 s before and behind it, however long it is, and as often as it is sent."""
        self.check(
            200,
            {
                "over": make_ticket(validFrom=date(-60), validTo=date(-10)),
                "to come": make_ticket(validFrom=date(10), validTo=date(60)),
                "a year": make_ticket(validTo=date(365 * 86400)),
                "backwards": make_ticket(validFrom=date(5), validTo=date(-5)),
                "behind": make_ticket(validTo=date() + "Z"),
                # 2026-11-24 08:00, and 24 months later.
                "month 35": make_ticket(validFrom="20243524080000"),
            },
        )
        ticket = make_ticket()
        self.assertEqual([self.status(ticket) for _ in range(3)], [200] * 3)


class AnswerTests(InMemoryTestCase):
    """What it says, and where."""

    def consoles(self, user_id: str) -> Any:
        return self.ask({"command": "available_consoles", "version": 1, "user_id": user_id})

    def test_paths(self) -> None:
        """One path, POST alone."""
        base = "https://engine.example.com"
        for path in ("/", "/services/vmconsole-proxy", f"{URL[len(base) :]}/", "/ovirt-engine/"):
            self.assertEqual(self.status(make_ticket(), url=base + path), 404, path)
        self.assertEqual(self.status(make_ticket(), url=base + "/ovirt-engine//services/x"), 404)
        for method in ("GET", "HEAD", "PUT", "DELETE"):
            response = self.successResultOf(self.treq.request(method, URL))
            self.assertEqual(response.code, 405, method)

    def test_keys(self) -> None:
        """An entry for each line that is not blank, trimmed; nobody without keys."""
        alice = self.engine.add_key("alice", " ssh-ed25519 AAAA a \r\n\n \nssh-rsa BBBB\n")
        bob = self.engine.add_key("bob", "ssh-ed25519 CCCC")
        self.assertEqual(self.engine.add_key("alice", "DDDD"), alice)
        self.engine.add_user("carol")
        self.assertEqual(
            self.ask(),
            {
                "version": "1",
                "content": "key_list",
                "keys": [
                    {"entityid": user_id, "entity": f"{name}@internal", "key": key}
                    for user_id, name, key in (
                        (alice, "alice", "ssh-ed25519 AAAA a"),
                        (alice, "alice", "ssh-rsa BBBB"),
                        (alice, "alice", "DDDD"),
                        (bob, "bob", "ssh-ed25519 CCCC"),
                    )
                ],
            },
        )
        self.engine.remove_key("alice", "DDDD")
        self.engine.remove_user("bob")
        self.assertEqual([each["key"] for each in self.ask()["keys"]][1:], ["ssh-rsa BBBB"])

    def test_empty(self) -> None:
        """The lists are there also when nothing is in them."""
        self.assertEqual(self.ask(), {"version": "1", "content": "key_list", "keys": []})
        self.assertEqual(
            self.consoles(""), {"version": "1", "content": "console_list", "consoles": []}
        )

    def test_consoles(self) -> None:
        """What is granted and placed on a host, by id; all values are text."""
        alice, bob = (self.engine.add_key(name, "key") for name in ("alice", "bob"))
        self.engine.add_vm(VM2, "web", "node2")
        self.engine.add_vm(VM1, "web", "node1")
        self.engine.add_vm(VM3.upper(), "d\u00e9", "node1")
        for vm_id in (VM2, VM3, VM1):
            self.engine.grant("alice", vm_id)
        self.engine.grant("bob", VM2)
        self.assertEqual(
            self.consoles(alice)["consoles"],
            [
                {"vmid": vm_id, "vmname": name, "host": host, "console": "default"}
                for vm_id, name, host in (
                    (VM1, "web", "node1"),
                    (VM3, "d\u00e9", "node1"),
                    (VM2, "web", "node2"),
                )
            ],
        )
        self.engine.unplace(VM2)
        self.engine.place(VM1, "node3")
        self.engine.revoke("alice", VM3)
        self.assertEqual(self.consoles(bob)["consoles"], [])
        [console] = self.consoles(alice.upper())["consoles"]
        self.assertEqual((console["vmid"], console["host"]), (VM1, "node3"))
        self.engine.remove_user("alice")
        command = {"command": "available_consoles", "version": 1, "user_id": alice}
        self.assertEqual(self.status(make_ticket(command)), 500)

    def test_order(self) -> None:
        """As a HashMap has the fields; shuffled, any way."""
        self.engine.add_key("alice", "key")
        body = self.post(make_ticket())[1]
        self.assertEqual(re.findall(rb'"(\w+)":', body)[:1], [b"keys"])
        orders = set()
        for seed in range(20):
            self.engine.shuffle(seed)
            orders.add(tuple(re.findall(rb'"(\w+)":', self.post(make_ticket())[1])))
        self.assertGreater(len(orders), 5)
        self.assertEqual({frozenset(each) for each in orders}, {frozenset(orders.pop())})

    def test_extras(self) -> None:
        """More fields, and roles, on request."""
        alice = self.engine.add_key("alice", "key")
        self.engine.add_vm(VM1, "web", "node1")
        self.engine.grant("alice", VM1, "viewer")
        self.assertNotIn("role", self.consoles(alice)["consoles"][0])
        self.engine.extras = True
        reply = self.consoles(alice)
        self.assertEqual(reply["consoles"][0]["role"], "viewer")
        for each in (reply, reply["consoles"][0], self.ask()["keys"][0]):
            self.assertTrue([v for v in each.values() if not isinstance(v, str)])

    def test_requests(self) -> None:
        """Everything that was asked is on record, also what was refused."""
        awaited = self.engine.next("available_consoles")
        self.ask()
        self.clock.advance(3)
        self.assertNoResult(awaited)
        self.consoles("")
        self.assertEqual(self.successResultOf(awaited), self.engine.requests[1])
        self.post(tampered(data='{"command":"x"}'))
        self.post(b"garbage")
        now = NOW.timestamp()
        self.assertEqual(
            [(each.at - now, each.status) for each in self.engine.requests],
            [(0.0, 200), (3.0, 200), (3.0, 403), (3.0, 500)],
        )
        self.assertEqual(len(self.engine.asked("public_keys")), 1)
        [asked] = self.engine.asked("x")
        self.assertEqual(asked.headers.getRawHeaders("Content-Type"), ["text/plain"])
        self.assertIsNone(self.engine.requests[-1].command)


class FaultTests(InMemoryTestCase):
    """Each fault, in memory."""

    def setUp(self) -> None:
        super().setUp()
        self.engine.add_key("alice", "key")

    def start(self) -> Deferred[Any]:
        deferred: Deferred[Any] = self.treq.post(URL, make_ticket())
        return deferred

    def test_unknown(self) -> None:
        """A fault that is none."""
        with self.assertRaises(ValueError):
            self.engine.fault = "404"
        for name in FAULTS:
            self.engine.fault = name

    def test_answers(self) -> None:
        """Statuses without a body, and a page instead of JSON, whatever the ticket."""
        for fault in ("403", "500", "502", "503"):
            self.engine.fault = fault
            self.assertEqual(self.post(make_ticket()), (int(fault), b""))
        self.engine.fault = "garbage"
        for ticket in (make_ticket(), b""):
            status, body = self.post(ticket)
            self.assertEqual(status, 200)
            self.assertRaises(ValueError, json.loads, body)
        self.engine.fault = None
        self.assertEqual(len(self.ask()["keys"]), 1)
        self.assertEqual([each.status for each in self.engine.requests], [*[200] * 5, 500, 200])

    def test_hang(self) -> None:
        """It never answers, also not when it is well again; others are answered."""
        self.engine.fault = "hang"
        asked = self.start()
        self.engine.fault = None
        self.ask()
        self.treq.flush()
        self.assertNoResult(asked)

    def test_slow(self) -> None:
        """The answer as of the request, when the test says so."""
        self.engine.fault = "slow"
        both = [self.start(), self.start()]
        self.assertNoResult(both[0])
        self.engine.remove_user("alice")
        self.engine.gate.callback(None)
        self.treq.flush()
        for asked in both:
            content = self.treq.json_content(self.successResultOf(asked))
            self.assertEqual(len(self.successResultOf(content)["keys"]), 1)
        self.engine.fault = "slow"
        self.assertNoResult(self.start())

    def test_half(self) -> None:
        """The headers, half of the body, the end."""
        self.engine.fault = "half"
        response = self.successResultOf(self.start())
        self.assertEqual(response.code, 200)
        failure = self.failureResultOf(self.treq.content(response), ResponseFailed)
        self.assertTrue(failure)

    def test_reset(self) -> None:
        """No answer."""
        self.engine.fault = "reset"
        self.failureResultOf(self.start(), ResponseNeverReceived)

    def test_huge(self) -> None:
        """A well-formed answer of just that size."""
        self.engine.fault, self.engine.huge_size = "huge", 1000001
        status, body = self.post(make_ticket())
        self.assertEqual((status, len(body)), (200, 1000001))
        reply = json.loads(body)
        self.assertEqual(reply["content"], "console_list")
        self.assertGreater(len(reply["consoles"]), 5000)

    def test_skew(self) -> None:
        """Its clock is off: tickets are refused, and its Date header shows it."""
        for skew, status in ((0.0, 200), (60.0, 403), (-60.0, 403)):
            self.engine.fault, self.engine.skew = "skew", skew
            response = self.successResultOf(self.start())
            self.assertEqual(response.code, status)
            [told] = response.headers.getRawHeaders("Date")
            expected = (NOW + timedelta(seconds=skew)).strftime("%a, %d %b %Y %H:%M:%S GMT")
            self.assertEqual(told, expected)


class ClientTests(EngineTestCase):
    """Our client at a real Engine, as far as the stand-in is one."""

    def setUp(self) -> None:
        super().setUp()
        self.engine = OVirtEngine(self.clock, authority())
        self.alice = self.engine.add_key("alice", public_line("alice"))
        self.bob = self.engine.add_key("bob", f"\n{public_line('bob')}\r\n{public_line('b')}")
        for vm_id, name in ((VM1, "web"), (VM2, "web"), (VM3, "db")):
            self.engine.add_vm(vm_id, name, "node1")
            self.engine.grant("alice", vm_id, "viewer" if vm_id == VM1 else "operator")
        self.agent = RequestTraversalAgent(self.engine)
        self.client = self.make_client()

    def make_client(
        self,
        identity: pki.Identity | None = None,
        url: str = "https://engine.example.com/ovirt-engine/",
        **settings: Any,
    ) -> EngineClient:
        return client_of(self.agent, self.clock, identity or signer(), url, **settings)

    def check(self) -> None:
        """It gets both lists, whole."""
        keys = self.result(all_keys(self.client))
        self.assertEqual(
            [(key.user_id, key.user_name) for key in keys],
            [
                (self.alice, "alice@internal"),
                (self.bob, "bob@internal"),
                (self.bob, "bob@internal"),
            ],
        )
        self.assertEqual(keys[0].blob, b64decode(public_line("alice").split()[1]))
        consoles = self.result(self.client.consoles(self.alice))
        self.assertEqual(
            [(each.vm_id, each.vm_name, each.host, each.console) for each in consoles],
            [
                (VM3, "db", "node1", "default"),
                (VM1, "web", "node1", "default"),
                (VM2, "web", "node1", "default"),
            ],
        )
        self.assertEqual(self.logged(""), [])

    def fails(self, kind: type[EngineError], *words: str) -> None:
        """Either call, with an error of just this kind that says so."""
        calls: tuple[Callable[[], Awaitable[object]], ...] = (
            lambda: all_keys(self.client),
            lambda: self.client.consoles(self.alice),
        )
        for call in calls:
            failure = self.failureResultOf(start(call()), EngineError)
            self.assertIs(type(failure.value), kind)
            for word in words:
                self.assertIn(word, str(failure.value))

    def test_urls(self) -> None:
        """The base URL with its last slash and without."""
        for url in ("https://engine.example.com/ovirt-engine", "https://e:8443/ovirt-engine/"):
            self.client = self.make_client(url=url)
            self.check()
        self.client = self.make_client(url="https://engine.example.com/")
        self.fails(EngineError, "404", "engine.url")

    def test_order(self) -> None:
        """The fields in any order."""
        self.check()
        for seed in range(10):
            self.engine.shuffle(seed)
            self.check()

    def test_roles(self) -> None:
        """An engine of today tells none; one of tomorrow may, among much else."""
        for extras, roles in (
            (False, ["operator"] * 3),
            (True, ["operator", "viewer", "operator"]),
        ):
            self.engine.extras = extras
            self.check()
            consoles = self.result(self.client.consoles(self.alice))
            self.assertEqual([each.role for each in consoles], roles)

    def test_empty(self) -> None:
        """Nobody has a key, and nobody may do anything."""
        for console in (VM1, VM2, VM3):
            self.engine.unplace(console)
        self.assertEqual(self.result(self.client.consoles(self.alice)), ())
        self.engine.remove_user("alice")
        self.engine.remove_user("bob")
        self.assertEqual(self.result(all_keys(self.client)), ())

    def test_clocks(self) -> None:
        """Clocks that differ by less than the tolerance are no matter; more is told."""
        for skew in (9.0, -9.0):
            self.engine.fault, self.engine.skew = "skew", skew
            self.check()
        for skew, words in ((60.0, "60 seconds ahead of"), (-60.0, "60 seconds behind")):
            self.engine.skew = skew
            self.fails(EngineError, "403", words)

    def test_certificates(self) -> None:
        """One that is not for this says what to look at."""
        for identity in (signer("client"), signer("ticket", "other CA")):
            self.client = self.make_client(identity)
            self.fails(EngineError, "403", "certificate", OID.dotted_string)
        pem = certificate(usages=None).encode()
        self.client = self.make_client(pki.Identity(x509.load_pem_x509_certificate(pem), rsa_key()))
        self.fails(EngineError, "500", "certificate", OID.dotted_string)

    def test_unknown_user(self) -> None:
        """A user who is gone is an error, and not one without consoles."""
        self.engine.remove_user("alice")
        text = self.failure(self.client.consoles(self.alice), EngineError)
        self.assertIn("user", text)
        self.assertEqual(self.result(self.client.consoles("nobody")), ())

    def test_no_answer(self) -> None:
        """What leaves it open what the engine would say."""
        for fault in ("502", "503", "half", "reset"):
            self.engine.fault = fault
            self.fails(EngineUnreachable)
        self.engine.fault = None
        self.check()

    def test_no_use(self) -> None:
        """What is an answer, and none that helps."""
        self.client = self.make_client(max_reply=100000)
        for fault, words in (
            ("403", "403"),
            ("500", "500"),
            ("garbage", "understood"),
            ("huge", "larger"),
        ):
            self.engine.fault, self.engine.huge_size = fault, 200000
            self.fails(EngineError, words)
        self.engine.fault = None
        self.check()

    def test_late(self) -> None:
        """No answer within the time, and one just in time."""
        for fault in ("hang", "slow"):
            self.engine.fault = fault
            asked = start(self.client.consoles(self.alice))
            self.clock.advance(4.9)
            self.assertNoResult(asked)
            if fault == "hang":
                self.clock.advance(0.1)
                self.failureResultOf(asked, EngineUnreachable)
            else:
                self.engine.gate.callback(None)
                self.agent.flush()
                self.assertEqual(len(self.successResultOf(asked)), 3)


class PortTests(TestCase):
    """On a real TLS port."""

    timeout = 60

    async def setUp(self) -> None:  # type: ignore[override]
        self.folder = Path(self.mktemp())
        self.folder.mkdir()
        self.engine = OVirtEngine(IReactorTime(reactor), todays_authority())
        await self.engine.listen(reactor, self.folder)
        self.addCleanup(self.engine.close)
        self.number = int(self.engine.url.split(":")[2].split("/")[0])

    def agent(self) -> Agent:
        """Trusts what the engine's file has."""
        root = trustRootFromCertificates([Certificate.loadPEM(self.engine.ca.read_bytes())])
        return Agent(reactor, BrowserLikePolicyForHTTPS(root))

    def ask(self, body: bytes = b"") -> Deferred[Any]:
        producer = FileBodyProducer(BytesIO(body))
        url = f"{self.engine.url}services/vmconsole-proxy".encode()
        return self.agent().request(b"POST", url, None, producer)

    def ticket(self) -> bytes:
        """By the certificate that is in the files."""
        key = load_pem_private_key(self.engine.key.read_bytes(), None)
        assert isinstance(key, rsa.RSAPrivateKey)
        now = datetime.now(UTC)
        return make_ticket(
            certificate=self.engine.certificate.read_text(),
            key=key,
            validFrom=now.strftime("%Y%m%d%H%M%S"),
            validTo=now.strftime("%Y%m%d%H%M%S"),
        )

    async def refused(self, asked: Deferred[Any]) -> Exception:
        try:
            await asked
        except Exception as error:
            return error
        self.fail("it answered")

    def speak(self) -> tuple[int, bytes]:
        """What a plain socket gets for a request: its error, and the answer. For a thread."""
        context = ssl.create_default_context(cafile=str(self.engine.ca))
        # Without the session tickets of 1.3, what can be read is the answer or the end.
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        with (
            socket.create_connection(("127.0.0.1", self.number), 10) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as connection,
        ):
            connection.sendall(
                b"POST /ovirt-engine/services/vmconsole-proxy HTTP/1.1\r\n"
                b"Host: localhost\r\nContent-Length: 0\r\n\r\n"
            )
            select.select([connection], [], [], 10)
            error = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if error:
                with socket.socket(fileno=connection.detach()) as bare:
                    return error, bare.recv(4096)
            return 0, b"".join(iter(functools.partial(connection.recv, 4096), b""))

    async def test_answer(self) -> None:
        """The files are good for it, by the real clock."""
        response = await self.ask(self.ticket())
        self.assertEqual(response.code, 200)
        self.assertEqual(json.loads(await treq.content(response))["keys"], [])

    async def test_other_ca(self) -> None:
        """The server's certificate may come from elsewhere; tickets still need the engine's."""
        await self.engine.close()
        await self.engine.listen(
            reactor, self.folder, pki.make_authority("web CA", datetime.now(UTC))
        )
        self.assertEqual((await self.ask(self.ticket())).code, 200)
        self.assertNotEqual(self.engine.ca.read_bytes(), todays_authority().certificate_pem())

    async def test_killed(self) -> None:
        """Open connections are reset, new ones refused; it comes back on the same port."""
        self.engine.fault = "hang"
        came = self.engine.next("public_keys")
        asked = self.ask(self.ticket())
        await came
        await self.engine.stop()
        self.assertIsInstance(await self.refused(asked), ResponseNeverReceived)
        self.assertIsInstance(await self.refused(self.ask()), ConnectError)
        await self.engine.stop()
        self.engine.fault = None
        await self.engine.start()
        await self.engine.start()
        self.assertEqual((await self.ask(self.ticket())).code, 200)

    async def test_reset(self) -> None:
        """It is a TCP reset, and no orderly end, not of TLS either."""
        self.engine.fault = "reset"
        self.assertEqual(await deferToThread(self.speak), (errno.ECONNRESET, b""))

    async def test_half(self) -> None:
        """Half of it, and an orderly end."""
        self.engine.fault = "half"
        error, answer = await deferToThread(self.speak)
        self.assertEqual(error, 0)
        self.assertRegex(answer, rb"(?s)^HTTP/1.1 500 .*Content-Length: 2\r\n.*\r\n\r\n\{$")

    async def test_huge(self) -> None:
        """All of it arrives, and it is never in memory; who goes away half way stops it."""
        self.engine.fault, self.engine.huge_size = "huge", 100 * 1024 * 1024
        counter = Counter()
        before = resident()
        (await self.ask()).deliverBody(counter)
        self.assertEqual(await counter.done, self.engine.huge_size)
        self.assertLess(counter.most - before, 20 * 1024 * 1024)
        self.engine.huge_size = 10**12
        counter = Counter(enough=10**6)
        (await self.ask()).deliverBody(counter)
        self.assertLess(await counter.done, 10**8)
        self.engine.fault = None
        self.assertEqual((await self.ask(self.ticket())).code, 200)


def resident() -> int:
    """Bytes of memory that this process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


class Counter(Protocol):
    """Counts what arrives, up to ``enough``."""

    def __init__(self, enough: int | None = None) -> None:
        self.enough = enough
        self.size = 0
        self.most = 0
        self.done: Deferred[int] = Deferred()

    def dataReceived(self, data: bytes) -> None:
        self.size += len(data)
        self.most = max(self.most, resident())
        if self.enough is not None and self.size > self.enough:
            cast(IPushProducer, self.transport).stopProducing()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.done.callback(self.size)
