"""Open consoles: one Console holds a guest's stream and gives its user an Attachment."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

from twisted.application.service import Service
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import connectProtocol
from twisted.internet.error import ConnectionDone
from twisted.internet.interfaces import (
    IAddress,
    IConsumer,
    IProducer,
    IProtocol,
    IPushProducer,
    IReactorTime,
    IStreamClientEndpoint,
    ITransport,
)
from twisted.internet.protocol import Protocol, connectionDone
from twisted.python.failure import Failure
from zope.interface import implementer

from vmconsole.console.backlog import Backlog
from vmconsole.errors import ConsoleBusy, ConsoleGone
from vmconsole.interfaces import ConsoleInfo, IConsoleEndpoints, IConsoleTransport
from vmconsole.text import printable

# One burst to a party: large enough to be cheap, small enough to stop soon after a pause.
_BURST = 32768


class Console(Protocol):
    """The protocol on one guest's console stream. Output is always drained (law 2)."""

    transport: IConsoleTransport

    def __init__(self, info: ConsoleInfo) -> None:
        self.info = info
        self.attachment: Attachment | None = None
        self.closed: Deferred[None] = Deferred()

    def connectionMade(self) -> None:
        """The stream is open: who asked for it may begin."""
        if self.attachment is not None:
            self.attachment.begin()

    def dataReceived(self, data: bytes) -> None:
        """The guest printed."""
        if self.attachment is not None:
            self.attachment.deliver(data)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """The stream ended: the user's protocol is told why."""
        attachment, self.attachment = self.attachment, None
        self.closed.callback(None)
        if attachment is not None:
            attachment.end(reason)

    def detach(self, attachment: Attachment) -> None:
        """The user leaves; nobody else is here, so the stream is closed."""
        if self.attachment is attachment:
            self.attachment = None
            self.transport.loseConnection()


@implementer(ITransport, IConsumer, IPushProducer)
class Attachment:
    """A user's own transport to a Console.

    ``write`` types into the guest; a producer that is registered is paused while the guest takes
    no input. As a push producer it holds back output for a reader that is slow, up to
    ``backlog`` bytes.
    """

    disconnecting = False

    def __init__(self, console: Console, protocol: IProtocol, backlog: int) -> None:
        self.console = console
        self.bytes_in = 0
        """Bytes typed."""
        self.bytes_out = 0
        """Bytes printed by the guest."""
        self._protocol = protocol
        self._backlog = Backlog(backlog)
        self._paused = False

    def begin(self) -> None:
        """The stream is open."""
        self._protocol.makeConnection(self)

    def deliver(self, data: bytes) -> None:
        """Hand the guest's output to the user, or keep it while the user is slow."""
        self.bytes_out += len(data)
        if self._paused or self._backlog:
            self._backlog.append(data)
        else:
            self._protocol.dataReceived(data)

    def end(self, reason: Failure) -> None:
        """The stream is gone; what the user has not seen yet is still handed over."""
        if not self.disconnecting:
            self.disconnecting = True
            self._paused = False
            self._drain()
            self._protocol.connectionLost(reason)

    @property
    def unsent(self) -> int:
        """Bytes typed that the guest's host has not confirmed."""
        return cast(int, self.console.transport.unsent)

    # --- ITransport, IConsumer: towards the guest

    def write(self, data: bytes) -> None:
        """Type into the guest."""
        if not self.disconnecting:
            self.bytes_in += len(data)
            self.console.transport.write(data)

    def writeSequence(self, data: Iterable[bytes]) -> None:
        """Type into the guest."""
        self.write(b"".join(data))

    def loseConnection(self) -> None:
        """Leave the console; the protocol's connectionLost comes at once."""
        if not self.disconnecting:
            self.disconnecting = True
            self.console.detach(self)
            self._protocol.connectionLost(Failure(ConnectionDone()))

    def getPeer(self) -> IAddress:
        """The guest."""
        return self.console.transport.getPeer()

    def getHost(self) -> IAddress:
        """Our end of the stream."""
        return self.console.transport.getHost()

    def registerProducer(self, producer: IProducer, streaming: bool) -> None:
        """``producer`` types; it is paused while the guest does not take its input."""
        self.console.transport.registerProducer(producer, streaming)

    def unregisterProducer(self) -> None:
        """The producer has ended."""
        self.console.transport.unregisterProducer()

    # --- IPushProducer: towards the user

    def pauseProducing(self) -> None:
        """The user is slow: keep the output."""
        self._paused = True

    def resumeProducing(self) -> None:
        """The user takes output again."""
        self._paused = False
        self._drain()

    def stopProducing(self) -> None:
        """The user is gone."""
        self.loseConnection()

    def _drain(self) -> None:
        while not self._paused:
            data = self._backlog.take(_BURST)
            if not data:
                return
            self._protocol.dataReceived(data)


class _Holder:
    """Who has a console open, or is about to."""

    def __init__(self, name: str, since: float, console: Console) -> None:
        self.name = name
        self.since = since
        self.console = console


class ConsolePool(Service):
    """All consoles that are open through this proxy; each VM's at most once."""

    def __init__(self, endpoints: IConsoleEndpoints, clock: IReactorTime, backlog: int) -> None:
        self._endpoints = endpoints
        self._clock = clock
        self._backlog = backlog
        self._holders: dict[str, _Holder] = {}

    def __len__(self) -> int:
        return len(self._holders)

    async def attach(self, info: ConsoleInfo, holder: str, protocol: IProtocol) -> Attachment:
        """Open the console for ``holder`` (a user's name and address, to tell others).

        Output goes to ``protocol``, whose transport is the Attachment. Raises ConsoleBusy when
        somebody else holds it, and the other ConsoleErrors; cancelling gives it up.
        """
        held = self._holders.get(info.vm_id)
        if held is not None:
            minutes = int((self._clock.seconds() - held.since) // 60)
            raise ConsoleBusy(
                f"The console of {printable(info.vm_name)} is in use by {held.name}, for "
                f"{minutes} min now. Ask them to leave, then try again."
            )
        console = Console(info)
        attachment = console.attachment = Attachment(console, protocol, self._backlog)
        self._holders[info.vm_id] = _Holder(holder, self._clock.seconds(), console)
        try:
            endpoint = cast(IStreamClientEndpoint, self._endpoints.console_endpoint(info))
            await connectProtocol(endpoint, console)
        except BaseException:
            del self._holders[info.vm_id]
            raise
        console.closed.addCallback(lambda _: self._holders.pop(info.vm_id))
        return attachment

    def stopService(self) -> None:
        """End every console that is open; its user is told."""
        super().stopService()
        for holder in list(self._holders.values()):
            attachment = holder.console.attachment
            if attachment is not None and holder.console.connected:
                holder.console.detach(attachment)
                attachment.end(Failure(ConsoleGone("The proxy is being stopped.")))
