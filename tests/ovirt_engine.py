"""A stand-in for an oVirt Engine 4.5: the servlet that a console proxy asks, and ways to fail.

    engine = OVirtEngine(clock)
    engine.add_key("alice", "ssh-ed25519 AAAA...")
    engine.add_vm("0f..", "web1", "node1.example.com")
    engine.grant("alice", "0f..")
    RequestTraversalAgent(engine)                 # in memory, or
    await engine.listen(reactor, folder)          # engine.url, engine.ca, .certificate, .key
    engine.fault = "half"                         # one of FAULTS, until it is None again
    await engine.stop(); await engine.start()     # killed, and back on the same port
    engine.asked("public_keys")                   # what was asked so far

As strict as the Engine, and as lenient: what it does was taken from what VMConsoleProxyServlet,
TicketDecoder, Jackson and commons-codec do (engine 4.5). It shares nothing with vmconsole.engine,
which is tested against it.
"""

from __future__ import annotations

import json
import re
import socket
from base64 import b64decode
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any, NoReturn, cast
from uuid import UUID, uuid4

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.x509.oid import ExtensionOID, ObjectIdentifier
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IPushProducer, IReactorTime, ITCPTransport
from twisted.internet.ssl import PrivateCertificate
from twisted.protocols.policies import ProtocolWrapper, WrappingFactory
from twisted.python.failure import Failure
from twisted.web.http import datetimeToString
from twisted.web.http_headers import Headers
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET, Request, Site
from zope.interface import implementer

from vmconsole import pki

PATH = b"/ovirt-engine/services/vmconsole-proxy"
FAULTS = (
    "hang",  # takes the request, never answers
    "garbage",  # 200, and no JSON
    "403",
    "500",
    "502",
    "503",
    "half",  # half of the body, then the connection ends
    "reset",  # the connection is reset instead of an answer
    "huge",  # a well-formed answer of `huge_size` bytes
    "slow",  # the answer as of now, sent once the test fires `gate`
    "skew",  # its clock is `skew` seconds ahead
)

_EKU = ObjectIdentifier("1.3.6.1.4.1.2312.13.1.2.1.1")
_TOLERANCE = timedelta(seconds=10)
# Those that Java's path builder looks at; another one that is critical fails it.
_KNOWN_EXTENSIONS = frozenset(
    {
        ExtensionOID.BASIC_CONSTRAINTS,
        ExtensionOID.KEY_USAGE,
        ExtensionOID.EXTENDED_KEY_USAGE,
        ExtensionOID.SUBJECT_ALTERNATIVE_NAME,
        ExtensionOID.NAME_CONSTRAINTS,
        ExtensionOID.CERTIFICATE_POLICIES,
    }
)
# What Java's String.trim removes.
_BLANKS = "".join(map(chr, range(33)))

Strings = Mapping[str, str | None]


class Forbidden(Exception):
    """What a GeneralSecurityException is there: status 403."""


class Broken(Exception):
    """What any other exception is there: status 500."""


@dataclass(frozen=True)
class Asked:
    """A request for the servlet, whatever it was."""

    at: float
    """When, by the clock that was passed in."""
    headers: Headers
    command: Strings | None
    """The ticket's data, verified or not; None: there is none that can be read."""
    status: int
    """What the servlet says to it; a fault may keep that from the client."""


@dataclass
class _User:
    id: UUID
    name: str
    lines: list[str] = field(default_factory=list)
    roles: dict[UUID, str] = field(default_factory=dict)


@dataclass
class _VM:
    id: UUID
    name: str
    host: str


class OVirtEngine(Resource):
    """The engine. ``clock`` is its clock, ``authority`` its CA."""

    isLeaf = True

    def __init__(self, clock: IReactorTime, authority: pki.Identity | None = None) -> None:
        super().__init__()
        self.clock = clock
        self._fault: str | None = None
        self.authority = authority or pki.make_authority("engine CA", self._now())
        self.extras = False
        """Answer as a later engine might: with more fields, some nested, and roles."""
        self.skew = 3600.0
        self.huge_size = 300 * 1024 * 1024
        self.requests: list[Asked] = []
        self.gate: Deferred[None] = Deferred()
        self._faults: dict[str, Callable[[Request, int, bytes], None]] = {
            "hang": lambda request, status, body: None,
            "garbage": lambda request, status, body: _send(request, 200, b"<html>Welcome"),
            "half": _send_half,
            "reset": _reset,
            "huge": self._send_huge,
            "slow": self._send_later,
            "skew": _send,
        }
        self._users: dict[str, _User] = {}
        self._vms: dict[UUID, _VM] = {}
        self._order = Random(0)
        self._is_shuffled = False
        self._awaited: list[tuple[str, Deferred[Asked]]] = []

    # Who there is, and what they may open.

    def add_user(self, name: str) -> str:
        """A user without keys, unless there is one of that name. Returns the id."""
        user = self._users.setdefault(name, _User(uuid4(), name))
        return str(user.id)

    def remove_user(self, name: str) -> None:
        """With the keys and the grants."""
        del self._users[name]

    def add_key(self, user: str, line: str) -> str:
        """Store this text, one key a line, for a user, who may be new. Returns the user's id."""
        user_id = self.add_user(user)
        self._users[user].lines.append(line)
        return user_id

    def remove_key(self, user: str, line: str) -> None:
        """Forget that text; the user stays, perhaps without any."""
        self._users[user].lines.remove(line)

    def add_vm(self, vm_id: str, name: str, host: str = "") -> str:
        """A VM, running on ``host``, or nowhere. Returns the id."""
        vm = _VM(UUID(vm_id), name, host)
        self._vms[vm.id] = vm
        return str(vm.id)

    def place(self, vm_id: str, host: str) -> None:
        """It runs there now."""
        self._vms[UUID(vm_id)].host = host

    def unplace(self, vm_id: str) -> None:
        """It runs nowhere any more."""
        self._vms[UUID(vm_id)].host = ""

    def grant(self, user: str, vm_id: str, role: str = "operator") -> None:
        """``role`` shows with ``extras`` only."""
        self.add_user(user)
        self._users[user].roles[self._vms[UUID(vm_id)].id] = role

    def revoke(self, user: str, vm_id: str) -> None:
        """Take the grant back."""
        del self._users[user].roles[UUID(vm_id)]

    def issue(self, days: int = 825) -> pki.Identity:
        """A certificate that signs tickets, as the engine's setup makes it for a proxy."""
        return pki.issue(
            self.authority, "vmconsole-proxy", "ticket", self._now(), days=days, key_size=2048
        )

    # How it answers.

    @property
    def fault(self) -> str | None:
        """One of FAULTS, or None."""
        return self._fault

    @fault.setter
    def fault(self, name: str | None) -> None:
        if name is not None and name not in FAULTS:
            raise ValueError(name)
        self._fault = name
        if name == "slow":
            self.gate = Deferred()

    def shuffle(self, seed: int) -> None:
        """From now on the fields of each JSON object come in any order, and not in HashMap's."""
        self._order = Random(seed)
        self._is_shuffled = True

    # What was asked.

    def asked(self, command: str) -> list[Asked]:
        """All requests with this command."""
        return [each for each in self.requests if (each.command or {}).get("command") == command]

    def next(self, command: str) -> Deferred[Asked]:
        """The next request with this command, once it comes."""
        deferred: Deferred[Asked] = Deferred()
        self._awaited.append((command, deferred))
        return deferred

    # On a port.

    async def listen(
        self, reactor: Any, folder: Path, server_authority: pki.Identity | None = None
    ) -> None:
        """Listen with TLS on 127.0.0.1, as "localhost".

        The server's certificate is issued by ``server_authority``, None: by the engine's CA. What a
        proxy needs is written into ``folder``: ``url``, ``ca``, ``certificate`` and ``key`` are for
        vmconsole.toml.
        """
        authority = server_authority or self.authority
        self.ca = folder / "engine-ca.pem"
        self.ca.write_bytes(authority.certificate_pem())
        self.certificate, self.key = folder / "proxy.cer", folder / "proxy.key"
        self.issue().save(self.certificate, self.key)
        self._port = _Port(reactor, self, authority, self._now())
        self.url = f"https://localhost:{self._port.number}/ovirt-engine/"
        await self.start()

    async def start(self) -> None:
        """Listen again, on the same port."""
        self._port.start()

    async def stop(self) -> None:
        """As if it was killed: nobody listens, open connections are reset."""
        await self._port.stop()

    async def close(self) -> None:
        """Stop for good."""
        await self._port.stop()
        self._port.close()

    # The servlet.

    def render(self, request: Request) -> int:
        assert request.content is not None
        body = request.content.read()
        request.setHeader(b"Date", datetimeToString(self._now().timestamp()))
        if request.path != PATH:
            _send(request, 404, b"<html>No such page.")
            return NOT_DONE_YET
        kind = (request.getHeader("Content-Type") or "").split(";")[0].strip().lower()
        # Somebody asked for a parameter before the servlet: the body is used up.
        status, reply = self._do(
            request, b"" if kind == "application/x-www-form-urlencoded" else body
        )
        self._note(request, body, status)
        if self.fault is not None and self.fault.isdecimal():
            _send(request, int(self.fault), b"")
        else:
            self._faults.get(self.fault or "", _send)(request, status, reply)
        return NOT_DONE_YET

    def _do(self, request: Request, body: bytes) -> tuple[int, bytes]:
        if request.method != b"POST":
            request.setHeader(b"Allow", b"POST, TRACE, OPTIONS")
            return 405, b""
        try:
            data = read_ticket(body, self.authority.certificate, self._now())
            answer = self._answer(_strings(data))
        except Forbidden:
            return 403, b""
        except Broken:
            return 500, b""
        request.setHeader(b"Content-Type", b"application/json")
        return 200, json.dumps(answer, ensure_ascii=False, separators=(",", ":")).encode()

    def _answer(self, command: Strings) -> dict[str, object]:
        if command.get("version") != "1":
            raise Broken("version")
        if command.get("command") == "public_keys":
            return self._reply("key_list", "keys", self._key_entries())
        if command.get("command") == "available_consoles":
            return self._reply(
                "console_list", "consoles", self._console_entries(command.get("user_id") or "")
            )
        raise Broken("command")

    def _key_entries(self) -> Iterable[dict[str, object]]:
        for user in self._users.values():
            for line in "\n".join(user.lines).split("\n"):
                if line.strip():
                    yield {
                        "entityid": str(user.id),
                        "entity": f"{user.name}@internal",
                        "key": line.strip(_BLANKS),
                        **({"added": {"by": "admin", "days": 3}} if self.extras else {}),
                    }

    def _console_entries(self, user_id: str) -> Iterable[dict[str, object]]:
        guid = _guid(user_id)
        if guid is None:
            return
        user = next((each for each in self._users.values() if each.id == guid), None)
        if user is None:
            raise Broken("LoginOnBehalf")
        for vm_id in sorted(user.roles):
            vm = self._vms[vm_id]
            if vm.host:
                yield {
                    "vmid": str(vm.id),
                    "vmname": vm.name,
                    "host": vm.host,
                    "console": "default",
                    **({"role": user.roles[vm_id], "tags": ["a", 1]} if self.extras else {}),
                }

    def _reply(
        self, content: str, name: str, entries: Iterable[dict[str, object]]
    ) -> dict[str, object]:
        reply: dict[str, object] = {"version": "1", "content": content}
        reply[name] = [self._ordered(each) for each in entries]
        if self.extras:
            reply["engine"] = {"version": "4.6", "since": 1}
        return self._ordered(reply)

    def _ordered(self, fields: dict[str, object]) -> dict[str, object]:
        names = sorted(fields, key=_bucket)
        if self._is_shuffled:
            self._order.shuffle(names)
        return {name: fields[name] for name in names}

    def _note(self, request: Request, body: bytes, status: int) -> None:
        try:
            command = _strings(_strings(_base64(body.decode("latin-1"))).get("data") or "")
        except Broken:
            command = None
        asked = Asked(self.clock.seconds(), request.requestHeaders, command, status)
        self.requests.append(asked)
        name = (command or {}).get("command")
        fired = [each for each in self._awaited if each[0] == name]
        self._awaited = [each for each in self._awaited if each[0] != name]
        for _, deferred in fired:
            deferred.callback(asked)

    def _now(self) -> datetime:
        seconds = self.clock.seconds() + (self.skew if self._fault == "skew" else 0.0)
        return datetime.fromtimestamp(seconds, UTC)

    # Faults.

    def _send_later(self, request: Request, status: int, body: bytes) -> None:
        gone: list[Failure] = []
        request.notifyFinish().addErrback(gone.append)

        def opened(result: None) -> None:
            if not gone:
                _send(request, status, body)

        self.gate.addCallback(opened)

    def _send_huge(self, request: Request, status: int, body: bytes) -> None:
        request.setHeader(b"Content-Type", b"application/json")
        _Flood(request, self.huge_size).resumeProducing()


def read_ticket(body: bytes, authority: x509.Certificate, now: datetime) -> str:
    """The data of a ticket. Raises Forbidden and Broken, in the order of TicketDecoder."""
    fields = _strings(_base64(body.decode("latin-1")))
    certificate = _certificate(_field(fields, "certificate"))
    _check_path(certificate, authority, now)
    usages = _usages(certificate)
    if usages is None:
        raise Broken("no extended key usage")
    if _EKU not in usages:
        raise Forbidden("extended key usage")
    names = re.split(r"\s*,\s*", _field(fields, "signedFields").strip(_BLANKS))
    while names and not names[-1]:
        names.pop()
    if not {"salt", "data"} <= set(names):
        raise Forbidden("signedFields")
    if "v2_signature" not in fields:
        raise Forbidden("no v2_signature")
    key = certificate.public_key()
    if not isinstance(key, rsa.RSAPublicKey):
        raise Broken("a key that is not RSA")
    # Java puts a question mark for what is no character.
    signed = "".join(_field(fields, name) for name in names).encode("utf-8", "replace")
    # RFC 8017, section 9.1.1: all the room that the digest and two more octets leave.
    salt = -(-(key.key_size - 1) // 8) - SHA256.digest_size - 2
    try:
        signature = _base64(_field(fields, "v2_signature"))
        key.verify(signature, signed, padding.PSS(padding.MGF1(SHA256()), salt), SHA256())
    except InvalidSignature:
        raise Forbidden("signature") from None
    valid_from, valid_to = (_date(_field(fields, name)) for name in ("validFrom", "validTo"))
    if not valid_from - _TOLERANCE <= now <= valid_to + _TOLERANCE:
        raise Forbidden("lifetime")
    return _field(fields, "data")


def _field(fields: Strings, name: str) -> str:
    value = fields.get(name)
    if value is None:
        raise Broken(f"{name}: NullPointerException")
    return value


def _base64(text: str) -> bytes:
    """As commons-codec: both alphabets, anything else is skipped, a padding ends it."""
    digits = re.sub(r"[^A-Za-z0-9+/_-]", "", text.partition("=")[0])
    digits = digits.replace("-", "+").replace("_", "/")
    if len(digits) % 4 == 1:
        digits = digits[:-1]
    return b64decode(digits + "=" * (-len(digits) % 4))


def _strings(source: bytes | str) -> dict[str, str | None]:
    """As Jackson reads a map of strings: numbers become text, nested values fail, and what stands
    behind the object is never looked at."""
    try:
        text = source if isinstance(source, str) else source.decode(json.detect_encoding(source))
        value, _ = _JSON.raw_decode(text.lstrip(" \t\r\n"))
    except (ValueError, RecursionError):
        raise Broken("no JSON") from None
    if not isinstance(value, dict):
        raise Broken("no JSON object")
    return {name: _string(each) for name, each in value.items()}


def _string(value: object) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool):
        return str(value).lower()
    raise Broken("a nested value")


def _no_number(text: str) -> NoReturn:
    raise ValueError(text)


_JSON = json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=_no_number)


def _certificate(pem: str) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(pem.encode())
    except (ValueError, x509.InvalidVersion):
        # A CertificateException is a GeneralSecurityException.
        raise Forbidden("certificate") from None


def _check_path(certificate: x509.Certificate, authority: x509.Certificate, now: datetime) -> None:
    """What CertPathBuilder sees to, of a certificate right below the CA."""
    try:
        certificate.verify_directly_issued_by(authority)
        critical = {each.oid for each in certificate.extensions if each.critical}
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm, x509.DuplicateExtension):
        raise Forbidden("not issued by the CA") from None
    if critical - _KNOWN_EXTENSIONS:
        raise Forbidden("an unknown critical extension")
    # The tolerance is the ticket's alone.
    if not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
        raise Forbidden("certificate not valid now")


def _usages(certificate: x509.Certificate) -> x509.ExtendedKeyUsage | None:
    try:
        return certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except x509.ExtensionNotFound:
        return None


def _date(text: str) -> datetime:
    """As a lenient SimpleDateFormat reads yyyyMMddHHmmss: 13 is next year's January, and what
    stands behind it is never looked at."""
    match = re.match(r"([0-9]{4})([0-9]{2})([0-9]{2})([0-9]{2})([0-9]{2})([0-9]+)", text)
    if match is None:
        raise Forbidden("a date: ParseException")
    year, month, day, hour, minute, second = map(int, match.groups())
    years, month = divmod(month - 1, 12)
    try:
        return datetime(year + years, month + 1, 1, tzinfo=UTC) + timedelta(
            days=day - 1, hours=hour, minutes=minute, seconds=second
        )
    except (ValueError, OverflowError):
        # Java's calendar goes further, and such a date is never near.
        raise Forbidden("lifetime") from None


def _guid(text: str) -> UUID | None:
    """As java.util.UUID.fromString: five hexadecimal numbers, whatever their lengths."""
    parts = text.split("-")
    if len(text) > 36 or len(parts) != len(_GUID_DIGITS):
        return None
    if not all(re.fullmatch("[0-9A-Fa-f]{1,15}", part) for part in parts):
        return None
    # Of a longer one the last digits count.
    pairs = zip(parts, _GUID_DIGITS, strict=True)
    return UUID("-".join(part.rjust(digits, "0")[-digits:] for part, digits in pairs))


_GUID_DIGITS = (8, 4, 4, 4, 12)


def _bucket(name: str) -> int:
    """Where a java.util.HashMap of 16 buckets, which is what a small one has, puts it."""
    code = 0
    for character in name:
        code = (31 * code + ord(character)) & 0xFFFFFFFF
    return (code ^ code >> 16) & 15


def _send(request: Request, status: int, body: bytes) -> None:
    request.setResponseCode(status)
    request.setHeader(b"Content-Length", b"%d" % len(body))
    if request.method != b"HEAD":
        request.write(body)
    request.finish()


def _send_half(request: Request, status: int, body: bytes) -> None:
    body = body or b"{}"
    request.setResponseCode(status)
    request.setHeader(b"Content-Length", b"%d" % len(body))
    request.write(body[: len(body) // 2])
    request.channel.loseConnection()


def _reset(request: Request, status: int, body: bytes) -> None:
    cast(Any, request.channel).transport.abortConnection()


@implementer(IPushProducer)
class _Flood:
    """A console list of so many bytes, as fast as it is taken."""

    _ENTRY = (
        b'{"vmid":"00000000-0000-0000-0000-000000000000","vmname":"flood","host":"node1",'
        b'"console":"default"},'
    ) * 600

    def __init__(self, request: Request, size: int) -> None:
        self._request = request
        self._left = size
        self._is_paused = True
        request.setResponseCode(200)
        request.registerProducer(self, True)
        self._write(b'{"version":"1","content":"console_list","consoles":[')

    def resumeProducing(self) -> None:
        self._is_paused = False
        while not self._is_paused:
            if self._left > len(self._ENTRY):
                self._write(self._ENTRY)
                continue
            self._is_paused = True
            self._write(b"null]}".rjust(self._left))
            self._request.unregisterProducer()
            self._request.finish()

    def pauseProducing(self) -> None:
        self._is_paused = True

    def stopProducing(self) -> None:
        self._is_paused = True

    def _write(self, data: bytes) -> None:
        self._left -= len(data)
        self._request.write(data)


class _Connections(WrappingFactory):
    """Knows the open ones."""

    noisy = False

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self._resetting: list[Deferred[None]] = []

    async def reset(self) -> None:
        """All of them, until none is left."""
        if self.protocols:
            deferred: Deferred[None] = Deferred()
            self._resetting.append(deferred)
            for connection in list(self.protocols):
                cast(ITCPTransport, connection.transport).abortConnection()
            await deferred

    def unregisterProtocol(self, p: ProtocolWrapper) -> None:
        super().unregisterProtocol(p)
        if not self.protocols:
            resetting, self._resetting = self._resetting, []
            for deferred in resetting:
                deferred.callback(None)


class _Port:
    """A TLS port that may be closed and opened again."""

    def __init__(
        self, reactor: Any, resource: Resource, authority: pki.Identity, now: datetime
    ) -> None:
        self._reactor = reactor
        server = pki.issue(authority, "localhost", "server", now, ["localhost"], key_size=2048)
        self._options = PrivateCertificate.loadPEM(
            server.key_pem() + server.certificate_pem()
        ).options()
        site = Site(resource, reactor=reactor)
        site.noisy = False
        self._connections = _Connections(site)
        self._port: Any = None
        # Keeps the number ours while nobody listens there.
        self._reserved = socket.socket()
        self._reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._reserved.bind(("127.0.0.1", 0))
        self.number: int = self._reserved.getsockname()[1]

    def start(self) -> None:
        if self._port is None:
            self._port = self._reactor.listenSSL(
                self.number, self._connections, self._options, interface="127.0.0.1"
            )

    async def stop(self) -> None:
        if self._port is not None:
            port, self._port = self._port, None
            await port.stopListening()
            await self._connections.reset()

    def close(self) -> None:
        self._reserved.close()
