"""The engine protocol's server: ``POST /services/vmconsole-proxy``, as oVirt's servlet answers."""

from __future__ import annotations

from datetime import UTC, datetime
from uuid import UUID

import msgspec
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.web.http import Request as HTTPRequest
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET, Request, Site

from vmconsole.engine.embedded.answers import Answers, console_list
from vmconsole.engine.ticket import MAX_TICKET_BYTES, TicketRefused, TicketVerifier
from vmconsole.errors import VMConsoleError
from vmconsole.text import printable

_IDLE_SECONDS = 30
# One byte more than is taken, so that too much is seen without being kept.
_KEPT_BYTES = MAX_TICKET_BYTES + 1


class _CommandRefused(VMConsoleError):
    """The command is none that we know. HTTP status 500."""


class ConsoleProxyServlet(Resource):
    """Answers tickets. ``clock`` gives the time by which they are judged."""

    isLeaf = True
    _log = Logger()

    def __init__(self, answers: Answers, verifier: TicketVerifier, clock: IReactorTime) -> None:
        super().__init__()
        self._answers = answers
        self._verifier = verifier
        self._clock = clock

    def render(self, request: Request) -> bytes | int:
        """POST only; every refusal has an empty body."""
        if request.method != b"POST":
            request.setHeader(b"Allow", b"POST")
            request.setResponseCode(405)
            return b""
        gone: list[object] = []
        request.notifyFinish().addErrback(gone.append)
        assert request.content is not None
        body = request.content.read(_KEPT_BYTES)
        answer = Deferred.fromCoroutine(self._answer(body))

        def reply(status_and_body: tuple[int, bytes]) -> None:
            status, content = status_and_body
            if gone:
                return
            request.setResponseCode(status)
            if content:
                request.setHeader(b"Content-Type", b"application/json")
            request.setHeader(b"Content-Length", b"%d" % len(content))
            request.write(content)
            request.finish()

        answer.addCallback(reply)
        answer.addErrback(lambda failure: self._log.failure("While replying", failure))
        return NOT_DONE_YET

    async def _answer(self, body: bytes) -> tuple[int, bytes]:
        now = datetime.fromtimestamp(self._clock.seconds(), UTC)
        try:
            return 200, await self._obey(self._verifier.verify(body, now))
        except TicketRefused as error:
            self._log.warn("Refused a ticket: {reason}", reason=str(error))
            return 403, b""
        except VMConsoleError as error:
            self._log.warn("Failed on a request: {reason}", reason=str(error))
            return 500, b""
        except Exception:
            self._log.failure("Failed on a request")
            return 500, b""

    async def _obey(self, text: str) -> bytes:
        command = _decode(text)
        if command.get("version") != "1":
            raise _CommandRefused("The command's version is not 1.")
        if command.get("command") == "public_keys":
            return await self._answers.key_list()
        if command.get("command") == "available_consoles":
            try:
                user_id = str(UUID(command.get("user_id", "")))
            except ValueError:
                return console_list([])
            return await self._answers.console_list(user_id)
        raise _CommandRefused(f"Unknown command {printable(command.get('command', ''), 40)}.")


def make_site(servlet: ConsoleProxyServlet, reactor: IReactorTime) -> Site:
    """The servlet where clients look for it: below ``/``, and below ``/ovirt-engine/``."""
    root, engine = _Folder(), _Folder()
    for parent in (root, engine):
        services = _Folder()
        services.putChild(b"vmconsole-proxy", servlet)
        parent.putChild(b"services", services)
    root.putChild(b"ovirt-engine", engine)
    site = _QuietSite(root, requestFactory=_Request, timeout=_IDLE_SECONDS, reactor=reactor)
    site.displayTracebacks = False
    return site


class _Folder(Resource):
    """Holds what it was given; all else is not found."""

    def getChild(self, path: bytes, request: Request) -> Resource:
        return _Folder()

    def render(self, request: Request) -> bytes:
        request.setResponseCode(404)
        return b""


class _QuietSite(Site):
    noisy = False

    def startFactory(self) -> None:
        """Without an access log, no timer for its dates."""

    def stopFactory(self) -> None:
        """Nothing was started."""

    def log(self, request: HTTPRequest) -> None:
        """No access log: the proxy's own audit says who did what."""


class _Request(Request):
    """Keeps no more of a body than a ticket may have."""

    def handleContentChunk(self, data: bytes) -> None:
        assert self.content is not None
        room = _KEPT_BYTES - self.content.tell()
        self.content.write(data[: max(room, 0)])


def _decode(text: str) -> dict[str, str]:
    """As a map of strings: numbers become strings, anything nested is an error."""
    try:
        values = msgspec.json.decode(text, type=dict[str, str | int | float | bool | None])
    except (ValueError, RecursionError):
        raise _CommandRefused("The command is no JSON object of strings.") from None
    return {name: str(value) for name, value in values.items()}
