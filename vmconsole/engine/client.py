"""The client of the engine protocol, the same for an oVirt Engine and for our own.

Source: oVirt Engine 4.5, VMConsoleProxyServlet.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Mapping, Sequence

import msgspec
from treq.client import HTTPClient
from twisted.internet.interfaces import IReactorTime
from zope.interface import implementer

from vmconsole import pki
from vmconsole.clocks import utc_now
from vmconsole.engine.credentials import ticket_certificate_problems
from vmconsole.engine.exchange import Exchange, Reply
from vmconsole.engine.replies import Problems, read_consoles, read_keys
from vmconsole.engine.slices import in_slices
from vmconsole.engine.ticket import SALT_BYTES, sign_ticket
from vmconsole.errors import EngineError, EngineUnreachable
from vmconsole.interfaces import ConsoleInfo, IEngine, KeyList

Credentials = Callable[[], Awaitable[pki.Identity]]

SERVLET = "services/vmconsole-proxy"
MAX_REPLY_BYTES = 256 * 1024 * 1024
# Of that, what one user's consoles may take: there may be many such questions at a time, and this
# is enough for some 250,000 VMs.
_CONSOLES_PART = 8
_UNREACHABLE = frozenset({502, 503, 504})
# What we understand beyond the protocol. A real Engine ignores what it does not know.
_FEATURES = "role,key_options,console_problem,keyless_users"
# Seconds between both clocks that are worth a word; a reply's date has whole seconds.
_SKEW = 3


@implementer(IEngine)
class EngineClient:
    """Asks the engine at ``url``, signing with what ``credentials`` gives for each request.

    ``timeout`` seconds limit one request, reply included; ``max_reply`` bytes the list of keys,
    and an eighth of it one of consoles. Each call asks: who remembers answers is Permissions.
    """

    def __init__(
        self,
        http: HTTPClient,
        url: str,
        credentials: Credentials,
        clock: IReactorTime,
        *,
        timeout: float = 5.0,
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
            who=self._called,
        )
        self._credentials = credentials
        self._clock = clock
        self._random = random
        self._max_reply = max_reply
        self._problems = Problems(clock)

    async def authorized_keys(self) -> KeyList:
        """See IEngine."""
        filters = {"key_fp": "", "key_type": "", "key_content": ""}
        reply = await self._ask(self._max_reply, "public_keys", filters)
        return KeyList(reply.digest, read_keys(reply.pieces, self._problems))

    async def consoles(self, user_id: str) -> Sequence[ConsoleInfo]:
        """See IEngine."""
        limit = self._max_reply // _CONSOLES_PART
        reply = await self._ask(limit, "available_consoles", {"user_id": user_id})
        consoles: list[ConsoleInfo] = []
        await in_slices(read_consoles(reply.pieces, self._problems, consoles), self._clock)
        consoles.sort(key=lambda each: (each.vm_name, each.vm_id))
        return tuple(consoles)

    async def _ask(self, max_reply: int, command: str, arguments: Mapping[str, str]) -> Reply:
        identity = await self._credentials()
        data = {"command": command, "version": 1, **arguments, "features": _FEATURES}
        ticket = sign_ticket(
            msgspec.json.encode(data).decode(),
            identity,
            utc_now(self._clock),
            self._random(SALT_BYTES),
        )
        reply = await self._exchange.post(ticket, max_reply)
        if reply.status != 200:
            raise self._refusal(reply, identity)
        return reply

    def _refusal(self, reply: Reply, identity: pki.Identity) -> EngineError:
        who, status = self._called, reply.status
        if status in _UNREACHABLE:
            return EngineUnreachable(f"{who} does not answer (HTTP status {status}).")
        if status == 403:
            return EngineError(
                f"{who} refused our ticket (HTTP status 403). Look at the certificate that signs "
                "our tickets: is it issued by the engine's own CA, is it expired, does its "
                f"extended key usage have {pki.TICKET_OID.dotted_string}? Then look at both "
                f"clocks.{self._suspicions(reply, identity)}"
            )
        if status == 500:
            return EngineError(
                f"{who} failed (HTTP status 500); its log may say why. A user whom it does not "
                "know is one reason. Another is the certificate that signs our tickets: look at "
                "its extended key usage, its CA, and both clocks."
                f"{self._suspicions(reply, identity)}"
            )
        if status == 404 or 300 <= status < 400:
            return EngineError(
                f"{who} has no console servlet there (HTTP status {status}): look at engine.url, "
                "which for an oVirt Engine is https://NAME/ovirt-engine/."
            )
        return EngineError(f"{who} answered with HTTP status {status}.")

    def _suspicions(self, reply: Reply, identity: pki.Identity) -> str:
        """What is wrong with our certificate and with the clocks, as far as it shows from here."""
        now = utc_now(self._clock)
        found = [
            f" Our certificate: {problem}."
            for problem in ticket_certificate_problems(identity.certificate, now)
        ]
        if reply.date is not None:
            skew = round((reply.date - now).total_seconds())
            if abs(skew) > _SKEW:
                relation = "ahead of" if skew > 0 else "behind"
                found.append(
                    f" The engine's clock is {abs(skew)} seconds {relation} ours: set both."
                )
        return "".join(found)
