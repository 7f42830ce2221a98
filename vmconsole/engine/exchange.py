"""One HTTP request and its whole reply, limited in time and size; its failures in our words."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from hashlib import sha256
from typing import Any, NamedTuple, cast

from OpenSSL import SSL
from service_identity import VerificationError
from treq.client import HTTPClient
from twisted.internet.defer import Deferred, succeed
from twisted.internet.error import ConnectError, ConnectionLost
from twisted.internet.interfaces import IConsumer, IPushProducer, IReactorTime
from twisted.internet.protocol import Protocol, connectionDone
from twisted.python.failure import Failure
from twisted.web.client import (
    RequestTransmissionFailed,
    ResponseDone,
    ResponseFailed,
    ResponseNeverReceived,
)
from twisted.web.http import PotentialDataLoss
from twisted.web.http_headers import Headers
from twisted.web.iweb import IBodyProducer, IResponse
from zope.interface import implementer

from vmconsole.errors import EngineError, EngineUnreachable
from vmconsole.text import printable


class Reply(NamedTuple):
    """A whole reply."""

    status: int
    pieces: list[bytes]
    """The body. It may be large: nothing that takes long is done with it in one go."""
    digest: bytes
    """SHA-256 of the body."""
    date: datetime | None
    """The engine's time, if it told it."""


class Exchange:
    """POSTs to ``url``, within ``timeout`` seconds. ``who`` names the engine in errors."""

    def __init__(
        self,
        http: HTTPClient,
        url: str,
        clock: IReactorTime,
        *,
        timeout: float,
        who: str,
    ) -> None:
        self._http = http
        self._url = url
        self._clock = clock
        self._timeout = timeout
        self._who = who

    async def post(self, body: bytes, max_reply: int) -> Reply:
        """Send ``body`` as text/plain, for a reply of up to ``max_reply`` bytes.

        Raises EngineUnreachable when no whole answer came in time; EngineError when it is too
        large, is no HTTP, or when TLS does not trust the engine.
        """
        exchange = Deferred.fromCoroutine(self._exchange(body, max_reply))
        # Not addTimeout: what is cancelled in an HTTP request fails with errors of many kinds.
        limit = self._clock.callLater(self._timeout, exchange.cancel)
        try:
            return await exchange
        except EngineError:
            raise
        except Exception as error:
            if not limit.active():
                raise EngineUnreachable(
                    f"{self._who} gave no answer within {self._timeout:g} seconds."
                ) from None
            raise _translated(self._who, error) from error
        finally:
            if limit.active():
                limit.cancel()

    async def _exchange(self, body: bytes, max_reply: int) -> Reply:
        response = await self._http.post(
            self._url,
            data=_Body(body),
            headers=Headers({"Content-Type": ["text/plain"]}),
            # A ticket is for this engine only.
            allow_redirects=False,
            unbuffered=True,
            # Only its callLater is used, and without a timeout here not even that.
            reactor=cast(Any, self._clock),
        )
        # Also when the status says all: an unread reply would keep the connection open.
        reader = await _Reader.read(response, max_reply)
        return Reply(response.code, reader.pieces, reader.digest.digest(), _date(response.headers))


@implementer(IBodyProducer)
class _Body:
    """A few KiB, written at once."""

    def __init__(self, body: bytes) -> None:
        self._body = body
        self.length = len(body)

    def startProducing(self, consumer: IConsumer) -> Deferred[None]:
        consumer.write(self._body)
        return succeed(None)

    def pauseProducing(self) -> None:
        """Nothing is left to hold back."""

    def resumeProducing(self) -> None:
        """Nothing is left to go on with."""

    def stopProducing(self) -> None:
        """Nothing is left to stop."""


class _Reader(Protocol):
    """Collects a reply's body, up to ``limit`` bytes."""

    def __init__(self, limit: int) -> None:
        self.pieces: list[bytes] = []
        self.digest = sha256()
        self._limit = limit
        self._size = 0
        self._done: Deferred[_Reader] | None = Deferred(self._cancelled)

    @classmethod
    def read(cls, response: IResponse, limit: int) -> Deferred[_Reader]:
        """The reader, when it has all. Cancelling closes the connection."""
        reader = cls(limit)
        done = reader._done
        assert done is not None
        response.deliverBody(reader)
        return done

    def dataReceived(self, data: bytes) -> None:
        self._size += len(data)
        if self._size <= self._limit:
            self.pieces.append(data)
            self.digest.update(data)
            return
        done = self._stop()
        if done is not None:
            done.errback(EngineError(f"The engine's answer is larger than {self._limit} bytes."))

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        done, self._done = self._done, None
        if done is None:
            return
        # Without a length the end of the connection is the end; what is cut shows in the JSON.
        if isinstance(reason.value, (ResponseDone, PotentialDataLoss)):
            done.callback(self)
        else:
            done.errback(reason)

    def _cancelled(self, _: Deferred[_Reader]) -> None:
        self._stop()

    def _stop(self) -> Deferred[_Reader] | None:
        self.pieces.clear()
        # Unlike loseConnection it does not wait for TLS's goodbye from the other side.
        cast(IPushProducer, self.transport).stopProducing()
        done, self._done = self._done, None
        return done


def _date(headers: Headers) -> datetime | None:
    try:
        date = parsedate_to_datetime((headers.getRawHeaders("Date") or [""])[0])
    except (ValueError, OverflowError):
        return None
    return date if date.tzinfo else date.replace(tzinfo=UTC)


def _causes(error: BaseException) -> Iterator[BaseException]:
    yield error
    for reason in getattr(error, "reasons", ()):
        if isinstance(reason, Failure) and reason.value is not None:
            yield from _causes(reason.value)


def _translated(who: str, error: Exception) -> EngineError:
    causes = list(_causes(error))
    last = printable(str(causes[-1])).rstrip(".") or type(causes[-1]).__name__
    for cause in causes:
        if isinstance(cause, VerificationError):
            return EngineError(
                f"{who} has a certificate that is not for this name: look at engine.url, or at "
                "the names in the certificate."
            )
        if isinstance(cause, SSL.Error) and "certificate verify failed" in str(cause):
            return EngineError(
                f"{who} has a certificate that was not issued by a CA that we trust, or has "
                "expired: look at engine.ca."
            )
        if isinstance(cause, SSL.Error) and "unexpected eof" not in str(cause) and cause.args:
            return EngineError(f"{who} failed at TLS: {last}.")
    if isinstance(causes[-1], (OSError, ConnectError, ConnectionLost)):
        return EngineUnreachable(f"{who} does not answer: {last}.")
    if isinstance(error, (ResponseNeverReceived, ResponseFailed, RequestTransmissionFailed)):
        kind = type(causes[-1]).__name__
        return EngineUnreachable(f"{who} gave no whole answer: {last} ({kind}).")
    return EngineError(f"{who} cannot be asked: {last}.")
