"""The HTTP connections of the embedded engine: how many there may be, and how slow."""

from __future__ import annotations

from typing import Any, cast

from twisted.internet.interfaces import IAddress, IDelayedCall
from twisted.internet.protocol import connectionDone
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web.http import HTTPChannel
from twisted.web.http import Request as HTTPRequest
from twisted.web.resource import Resource
from twisted.web.server import Request, Site

# Seconds from the connection, or from the last reply, to the end of a request: TLS's handshake,
# headers and body together.
REQUEST_SECONDS = 30.0
# Seconds in which a client takes what is waiting for it.
REPLY_SECONDS = 60.0

_log = Logger()


class _Connection(HTTPChannel):
    """A client, for whom there is always at most one thing that it has to do in time."""

    site: LimitedSite
    _limit: IDelayedCall | None = None
    _answering = False
    _full = False

    def connectionMade(self) -> None:
        super().connectionMade()
        self.site.opened(self)
        self._limit_to(REQUEST_SECONDS)

    def allContentReceived(self) -> None:
        self._answering = True
        if not self._full:
            self._limit_to(None)
        super().allContentReceived()

    def requestDone(self, request: HTTPRequest) -> None:
        self._answering = False
        if not self._full:
            self._limit_to(REQUEST_SECONDS)
        # It may go on with the next request, which is there already.
        super().requestDone(request)

    def pauseProducing(self) -> None:
        # Some transports say it again at each write.
        if not self._full:
            self._full = True
            self._limit_to(REPLY_SECONDS)
        super().pauseProducing()

    def resumeProducing(self) -> None:
        self._full = False
        self._limit_to(None if self._answering else REQUEST_SECONDS)
        # It may write, and pause us again.
        super().resumeProducing()

    def loseConnection(self) -> None:
        # What was written has to be taken, and TLS wants a goodbye.
        self._limit_to(REPLY_SECONDS)
        super().loseConnection()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self._limit_to(None)
        self.site.closed(self)
        super().connectionLost(reason)

    def end(self) -> None:
        """End it, whatever is on the way."""
        transport = cast(Any, self.transport)
        _log.debug("Ended the connection of {peer}", peer=transport.getPeer())
        transport.abortConnection()

    def _limit_to(self, seconds: float | None) -> None:
        limit, self._limit = self._limit, None
        if limit is not None and limit.active():
            limit.cancel()
        if seconds is not None:
            self._limit = self.callLater(seconds, self.end)


class LimitedSite(Site):
    """Keeps ``most`` connections at a time (None: any number), and none whose client is slow."""

    noisy = False
    displayTracebacks = False
    # Twisted's own chooses between HTTP/1 and HTTP/2.
    protocol = cast(Any, _Connection)

    def __init__(
        self, resource: Resource, request_factory: type[Request], clock: Any, most: int | None
    ) -> None:
        # Ours are the only timeouts, and nobody sends forms.
        super().__init__(
            resource,
            requestFactory=request_factory,
            timeout=None,
            reactor=clock,
            parsePOSTFormSubmission=False,
        )
        self._most = most
        self._connections: set[_Connection] = set()
        self._was_full = False

    def acceptableProtocols(self) -> list[bytes]:
        """See IProtocolNegotiationFactory: no HTTP/2."""
        return [b"http/1.1"]

    def buildProtocol(self, address: IAddress | None) -> Any:
        """See IProtocolFactory. None when there are too many, and the connection is closed."""
        if self._most is not None and len(self._connections) >= self._most:
            if not self._was_full:
                self._was_full = True
                _log.warn(
                    "{count} clients are connected to the engine: more are refused until some "
                    "have gone.",
                    count=self._most,
                )
            return None
        return super().buildProtocol(address)

    def opened(self, connection: _Connection) -> None:
        """It counts from now on."""
        self._connections.add(connection)

    def closed(self, connection: _Connection) -> None:
        """It does not count any more."""
        self._connections.discard(connection)
        # Not at once: one that goes and one that comes would be a line each time.
        if self._most is not None and len(self._connections) <= self._most // 2:
            self._was_full = False

    def startFactory(self) -> None:
        """Without an access log, no timer for its dates."""

    def stopFactory(self) -> None:
        """Nobody listens any more: end what is open."""
        for connection in tuple(self._connections):
            connection.end()

    def log(self, request: HTTPRequest) -> None:
        """No access log: the proxy's own audit says who did what."""
