"""The engine protocol's server: ``POST /services/vmconsole-proxy``, as oVirt's servlet answers."""

from __future__ import annotations

from uuid import UUID

import msgspec
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IPushProducer, IReactorTime
from twisted.logger import Logger
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET, Request
from zope.interface import implementer

from vmconsole.clocks import utc_now
from vmconsole.engine.embedded.answers import Answers, Features, Reply, console_list
from vmconsole.engine.embedded.connections import LimitedSite
from vmconsole.engine.ticket import MAX_TICKET_BYTES, TicketRefused, TicketVerifier
from vmconsole.errors import EngineUnreachable, StoreUnavailable, VMConsoleError
from vmconsole.refusals import Refusals
from vmconsole.text import printable

# One byte more than is taken, so that too much is seen without being kept.
_KEPT_BYTES = MAX_TICKET_BYTES + 1
# Questions that may wait for the database: when it hangs, their clients have long gone.
_ASKING = 256


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
        self._refusals = Refusals(self._log, clock)
        self._asking = 0

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

        def reply(status_and_body: tuple[int, Reply]) -> None:
            status, pieces = status_and_body
            if gone:
                return
            request.setResponseCode(status)
            if pieces:
                request.setHeader(b"Content-Type", b"application/json")
            request.setHeader(b"Content-Length", b"%d" % sum(map(len, pieces)))
            _Reply(request, pieces).start()

        answer.addCallback(reply)
        answer.addErrback(lambda failure: self._log.failure("While replying", failure))
        return NOT_DONE_YET

    async def _answer(self, body: bytes) -> tuple[int, Reply]:
        now = utc_now(self._clock)
        try:
            command = self._verifier.verify(body, now)
            if self._asking >= _ASKING:
                raise StoreUnavailable("Too many questions wait for the database.")
            self._asking += 1
            try:
                return 200, await self._obey(command)
            finally:
                self._asking -= 1
        except TicketRefused as error:
            self._refusals.tell("Refused a ticket", str(error))
            return 403, ()
        except (StoreUnavailable, EngineUnreachable) as error:
            # No answer, so that clients go by what they know for a while.
            self._refusals.tell("There is no answer now", str(error))
            return 503, ()
        except VMConsoleError as error:
            self._refusals.tell("Failed on a request", str(error))
            return 500, ()
        except Exception:
            self._log.failure("Failed on a request")
            return 500, ()

    async def _obey(self, text: str) -> Reply:
        command = _decode(text)
        if command.get("version") != "1":
            raise _CommandRefused("The command's version is not 1.")
        features = Features.parse(command.get("features", ""))
        if command.get("command") == "public_keys":
            return await self._answers.key_list(features)
        if command.get("command") == "available_consoles":
            try:
                user_id = str(UUID(command.get("user_id", "")))
            except ValueError:
                return console_list([])
            return await self._answers.console_list(user_id, features)
        raise _CommandRefused(f"Unknown command {printable(command.get('command', ''), 40)}.")


@implementer(IPushProducer)
class _Reply:
    """A body in pieces, at the pace at which the client takes them."""

    def __init__(self, request: Request, pieces: Reply) -> None:
        self._request = request
        self._pieces = iter(pieces)
        self._paused = False

    def start(self) -> None:
        self._request.registerProducer(self, True)
        self.resumeProducing()

    def resumeProducing(self) -> None:
        self._paused = False
        for piece in self._pieces:
            self._request.write(piece)
            if self._paused:
                return
        self._request.unregisterProducer()
        self._request.finish()

    def pauseProducing(self) -> None:
        self._paused = True

    def stopProducing(self) -> None:
        self._paused = True


def make_site(
    servlet: ConsoleProxyServlet, reactor: IReactorTime, most: int | None = None
) -> LimitedSite:
    """The servlet where clients look for it: below ``/``, and below ``/ovirt-engine/``.

    At most so many connections are open at a time; None: any number.
    """
    root, engine = _Folder(), _Folder()
    for parent in (root, engine):
        services = _Folder()
        services.putChild(b"vmconsole-proxy", servlet)
        parent.putChild(b"services", services)
    root.putChild(b"ovirt-engine", engine)
    return LimitedSite(root, _Request, reactor, most)


class _Folder(Resource):
    """Holds what it was given; all else is not found."""

    def getChild(self, path: bytes, request: Request) -> Resource:
        return _Folder()

    def render(self, request: Request) -> bytes:
        request.setResponseCode(404)
        return b""


class _Request(Request):
    """Keeps no more of a body than a ticket may have, and does not say what serves it."""

    def render(self, resource: Resource) -> None:
        self.responseHeaders.removeHeader(b"server")
        super().render(resource)

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
