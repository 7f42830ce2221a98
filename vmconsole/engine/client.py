"""The client of the engine protocol, the same for an oVirt Engine and for our own.

Source: oVirt Engine 4.5, VMConsoleProxyServlet.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any, Generic, TypeVar

import msgspec
from treq.client import HTTPClient
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from zope.interface import implementer

from vmconsole import pki
from vmconsole.engine.exchange import MAX_REPLY_BYTES, Exchange
from vmconsole.engine.flight import Flight
from vmconsole.engine.keyline import parse_key_line
from vmconsole.engine.ticket import SALT_BYTES, sign_ticket
from vmconsole.errors import EngineError, EngineUnreachable
from vmconsole.interfaces import AuthorizedKey, ConsoleInfo, IEngine, Role
from vmconsole.text import printable

T = TypeVar("T")
Credentials = Callable[[], Awaitable[pki.Identity]]

SERVLET = "services/vmconsole-proxy"
_UNREACHABLE = frozenset({502, 503, 504})
_MAX_PROBLEMS = 1000


class _KeyList(msgspec.Struct):
    content: str
    keys: list[msgspec.Raw]


class _ConsoleList(msgspec.Struct):
    content: str
    consoles: list[msgspec.Raw]


class _KeyEntry(msgspec.Struct):
    entityid: str
    entity: str
    key: str


class _ConsoleEntry(msgspec.Struct):
    vmid: str
    vmname: str
    host: str
    console: str = "default"
    role: Role = "operator"


class _Remembered(msgspec.Struct, frozen=True):
    asked: float
    consoles: tuple[ConsoleInfo, ...]


@implementer(IEngine)
class EngineClient:
    """Asks the engine at ``url``, signing with what ``credentials`` gives for each request.

    ``timeout`` seconds limit one request, reply included. What a user may open is remembered for
    ``cache_ttl`` seconds; who remembers the keys is AuthorizedKeys. All who want the same answer
    at the same time share one request.
    """

    def __init__(
        self,
        http: HTTPClient,
        url: str,
        credentials: Credentials,
        clock: IReactorTime,
        *,
        timeout: float = 5.0,
        cache_ttl: float = 5.0,
        random: Callable[[int], bytes] = os.urandom,
        max_reply: int = MAX_REPLY_BYTES,
        called: str = "",
    ) -> None:
        """``called`` names the engine in errors instead of its URL."""
        self._called = called or f"The engine at {url}"
        self._exchange = Exchange(
            http,
            f"{url.rstrip('/')}/{SERVLET}",
            clock,
            timeout=timeout,
            max_reply=max_reply,
            who=self._called,
        )
        self._credentials = credentials
        self._clock = clock
        self._cache_ttl = cache_ttl
        self._random = random
        self._keys: _Shared[tuple[AuthorizedKey, ...]] = _Shared()
        self._consoles: _Shared[tuple[ConsoleInfo, ...]] = _Shared()
        self._remembered: dict[str, _Remembered] = {}
        self._problems = _Problems()

    async def authorized_keys(self) -> Sequence[AuthorizedKey]:
        """See IEngine. Asks each time."""
        return await self._keys.result("", self._ask_keys)

    async def consoles(self, user_id: str, fresh: bool = False) -> Sequence[ConsoleInfo]:
        """See IEngine. ``fresh`` may share a request that is under way."""
        remembered = self._remembered.get(user_id)
        if remembered and not fresh and self._is_recent(remembered):
            return remembered.consoles
        return await self._consoles.result(user_id, lambda: self._ask_consoles(user_id))

    async def _ask_keys(self) -> tuple[AuthorizedKey, ...]:
        command = {"command": "public_keys", "version": 1}
        filters = {"key_fp": "", "key_type": "", "key_content": ""}
        reply = _decode(await self._ask({**command, **filters}), _KeyList, "key_list")
        return tuple(self._each(reply.keys, _authorized_key))

    async def _ask_consoles(self, user_id: str) -> tuple[ConsoleInfo, ...]:
        asked = self._clock.seconds()
        command = {"command": "available_consoles", "version": 1, "user_id": user_id}
        reply = _decode(await self._ask(command), _ConsoleList, "console_list")
        consoles = sorted(
            self._each(reply.consoles, _console), key=lambda each: (each.vm_name, each.vm_id)
        )
        remembered = _Remembered(asked, tuple(consoles))
        # Also forgets the others' old answers: as many stay as users asked lately.
        self._remembered = {
            user: each for user, each in self._remembered.items() if self._is_recent(each)
        }
        self._remembered[user_id] = remembered
        return remembered.consoles

    def _is_recent(self, remembered: _Remembered) -> bool:
        # A clock that was set back must not make an answer last.
        return 0 <= self._clock.seconds() - remembered.asked < self._cache_ttl

    async def _ask(self, command: dict[str, object]) -> bytes:
        identity = await self._credentials()
        ticket = sign_ticket(
            msgspec.json.encode(command).decode(),
            identity,
            datetime.fromtimestamp(self._clock.seconds(), UTC),
            self._random(SALT_BYTES),
        )
        status, body = await self._exchange.post(ticket)
        if status != 200:
            raise _refusal(self._called, status)
        return body

    def _each(
        self, entries: Sequence[msgspec.Raw], read: Callable[[msgspec.Raw], T | None]
    ) -> Iterator[T]:
        """The entries that can be read; what is wrong with the others is logged, once."""
        for entry in entries:
            try:
                value = read(entry)
            except (ValueError, RecursionError) as error:
                self._problems.tell(str(error))
            else:
                if value is not None:
                    yield value


class _Shared(Generic[T]):
    """One request for all who ask for the same at the same time."""

    def __init__(self) -> None:
        self._flights: dict[str, Flight[T]] = {}

    def result(self, name: str, ask: Callable[[], Coroutine[Deferred[Any], Any, T]]) -> Deferred[T]:
        flight = self._flights.get(name)
        if flight is None:
            answer = Deferred.fromCoroutine(ask())
            flight = Flight(answer)
            self._flights[name] = flight
            answer.addBoth(lambda _: self._flights.pop(name))
        return flight.wait()


class _Problems:
    """Logs what is wrong with an answer, each problem once, not at every refresh."""

    _log = Logger()

    def __init__(self) -> None:
        self._told: set[str] = set()

    def tell(self, problem: str) -> None:
        if problem in self._told or len(self._told) >= _MAX_PROBLEMS:
            return
        self._told.add(problem)
        self._log.warn("Left out of the engine's answer: {problem}", problem=problem)
        if len(self._told) == _MAX_PROBLEMS:
            self._log.warn(
                "{count} entries were left out of the engine's answers; no more are logged.",
                count=_MAX_PROBLEMS,
            )


_Reply = TypeVar("_Reply", _KeyList, _ConsoleList)


def _decode(body: bytes, kind: type[_Reply], content: str) -> _Reply:
    try:
        reply = msgspec.json.decode(body, type=kind)
    except (ValueError, RecursionError) as error:
        raise EngineError(
            f"The engine's answer cannot be understood: {printable(str(error))}."
        ) from error
    if reply.content != content:
        raise EngineError(
            f"The engine's answer holds {printable(reply.content, 40)} instead of {content}."
        )
    return reply


def _authorized_key(raw: msgspec.Raw) -> AuthorizedKey | None:
    try:
        entry = msgspec.json.decode(raw, type=_KeyEntry)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise ValueError(f"a key: {printable(str(error))}") from error
    if not entry.key.strip():
        return None
    try:
        key = parse_key_line(entry.key)
    except ValueError as error:
        raise ValueError(f"a key of {printable(entry.entity)}: {error}") from None
    if not entry.entityid:
        raise ValueError(f"a key of {printable(entry.entity)}: the user has no id")
    return AuthorizedKey(entry.entityid, entry.entity, key.blob)


def _console(raw: msgspec.Raw) -> ConsoleInfo:
    try:
        entry = msgspec.json.decode(raw, type=_ConsoleEntry)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise ValueError(f"a console: {printable(str(error))}") from error
    if not entry.vmid or not entry.host:
        raise ValueError(f"the console of {printable(entry.vmname)}: no VM id, or no host")
    return ConsoleInfo(entry.vmid, entry.vmname, entry.host, entry.console, entry.role)


def _refusal(who: str, status: int) -> EngineError:
    if status in _UNREACHABLE:
        return EngineUnreachable(f"{who} does not answer (HTTP status {status}).")
    if status == 403:
        return EngineError(
            f"{who} refused our ticket (HTTP status 403). Look at the certificate that signs our "
            "tickets: is it issued by the engine's own CA, is it expired, does its extended key "
            f"usage have {pki.TICKET_OID.dotted_string}? Then look at both clocks."
        )
    if status == 500:
        return EngineError(
            f"{who} failed (HTTP status 500); its log may say why. A user whom it does not know "
            "is one reason, and so is a certificate without an extended key usage."
        )
    if status == 404 or 300 <= status < 400:
        return EngineError(
            f"{who} has no console servlet there (HTTP status {status}): look at engine.url, "
            "which for an oVirt Engine is https://NAME/ovirt-engine/."
        )
    return EngineError(f"{who} answered with HTTP status {status}.")
