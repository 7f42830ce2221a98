"""A guest's console as a Twisted stream endpoint; see virDomainOpenConsole."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from twisted.internet.defer import Deferred, TimeoutError
from twisted.internet.error import ConnectionDone, NoProtocol
from twisted.internet.interfaces import (
    IAddress,
    IDelayedCall,
    IProducer,
    IProtocol,
    IProtocolFactory,
    IPushProducer,
    IStreamClientEndpoint,
)
from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from vmconsole.errors import ConsoleBusy, ConsoleGone, HostLost, HostUnreachable
from vmconsole.hypervisor.libvirt_ending import EXPLAINING, Ending
from vmconsole.hypervisor.libvirt_errors import (
    ConsoleLocked,
    connection_lost,
    is_connection_lost,
    left_behind,
)
from vmconsole.hypervisor.libvirt_line import Line
from vmconsole.hypervisor.pacing import Credit
from vmconsole.interfaces import ConsoleInfo, IConsoleTransport

if TYPE_CHECKING:
    from vmconsole.hypervisor.libvirt_host import Host

# Finds out why a console ended. Raises HostUnreachable.
Why = Callable[[], Coroutine[Deferred[Any], Any, ConsoleGone]]

# Seconds that our own leaving may take before a new open is tried.
_LEAVING = 5.0
# Seconds in which a console that is taken may become free: one that an open left behind which was
# cancelled; one that only seems to be taken after libvirtd was restarted or we left it.
_PATIENCE = 0.5
_LONG_PATIENCE = 2.0
_RETRY = 0.2

# Seconds from what was typed until the host is asked whether it took it: so that what is told to be
# lost is little, and true.
_CONFIRM = 1.0

# Bytes.
_BURST = 262144
_PAUSE_ABOVE = 16384
_RESUME_BELOW = 4096


@implementer(IAddress)
@dataclass(frozen=True)
class ConsoleAddress:
    """A console: the host, and the domain's UUID and name. Unescaped."""

    host: str
    vm_id: str
    vm_name: str


@implementer(IStreamClientEndpoint)
class ConsoleEndpoint:
    """The way to one console. ``host_of`` gives its host of the day, or raises ConsoleError.

    ``force`` takes the console from another program, by the first ``connect`` that succeeds.
    """

    def __init__(
        self, host_of: Callable[[], Host], console: ConsoleInfo, force: bool = False
    ) -> None:
        self._host_of = host_of
        self._console = console
        self._force = force

    def connect(self, factory: IProtocolFactory) -> Deferred[IProtocol]:
        """Open the console. Fails with ConsoleError; may be cancelled at any time."""
        return Deferred.fromCoroutine(self._connect(factory))

    async def _connect(self, factory: IProtocolFactory) -> IProtocol:
        host = self._host_of()
        host.console_opening()
        try:
            line = await self._open(host)
        except BaseException:
            host.console_closed()
            raise
        # Whoever takes it back is left in peace.
        self._force = False
        return ConsoleStream(host, self._console, line).start(factory)

    async def _open(self, host: Host) -> Line:
        # The host may still believe that we have the console which we just left.
        ours = await host.left(self._console.vm_id, _LEAVING)
        start = host.reactor.seconds()
        while True:
            try:
                return await host.threads.call(
                    partial(Line, host, self._console, self._force), host.timeout, Line.close
                )
            except ConsoleBusy as error:
                waits = ours or isinstance(error, ConsoleLocked)
                patience = _LONG_PATIENCE if waits else _PATIENCE
                if host.reactor.seconds() - start >= patience:
                    if ours:
                        raise left_behind(host.name, self._console.vm_name) from error
                    raise
            await deferLater(host.reactor, _RETRY, lambda: None)


@implementer(IConsoleTransport)
class ConsoleStream:
    """The transport of whoever has a console: drains it always, types into it at its pace."""

    _log = Logger()
    disconnecting = False

    def __init__(self, host: Host, console: ConsoleInfo, line: Line) -> None:
        self.console = console
        self._host = host
        self._line = line
        self._errors = host.libvirt.libvirtError
        self._protocol: IProtocol | None = None
        self._queue = bytearray()
        self._full = False
        self._credit = Credit()
        self._asked_at = 0.0
        self._confirming = False
        self._confirm_later: IDelayedCall | None = None
        self._producer: IPushProducer | None = None
        self._paused = False
        self._open = True
        self._ending = Ending(host, console)

    def start(self, factory: IProtocolFactory) -> IProtocol:
        """Join it to a protocol. Raises what the factory does, and ConsoleError."""
        try:
            protocol = factory.buildProtocol(self.getPeer())
            if protocol is None:
                raise NoProtocol
            self._line.start(self._on_event)
            self._protocol = protocol
            protocol.makeConnection(self)
        except self._errors as error:
            self._release()
            raise HostUnreachable(connection_lost(self._host.name)) from error
        except BaseException:
            self._release()
            raise
        if self._open:
            self._host.console_opened(self)
            self._line.connection.lost.addCallback(self._lose)
        return protocol

    # ITransport and IConsumer

    @property
    def unsent(self) -> int:
        """Bytes that were written, and that the host has not confirmed."""
        return len(self._queue) + self._credit.unanswered

    def confirm(self) -> None:
        """See IConsoleTransport."""
        if self._open:
            self._confirming = True
            self._ask()

    def getPeer(self) -> ConsoleAddress:
        return ConsoleAddress(self.console.host, self.console.vm_id, self.console.vm_name)

    getHost = getPeer

    def write(self, data: bytes) -> None:
        """Type ``data``: at once, as far as the pace allows."""
        if self._open and data:
            self._confirming = False
            self._queue += data
            self._send()
        elif self._protocol is not None:
            # It is not told yet that this has ended. What is typed until then is lost, and counted.
            self._queue += data
            self._steer_producer()

    def writeSequence(self, data: Iterable[bytes]) -> None:
        self.write(b"".join(data))

    def registerProducer(self, producer: IProducer, streaming: bool) -> None:
        """Pause ``producer``, a push producer, while too much waits. Raises ValueError."""
        if not streaming:
            raise ValueError("a console takes push producers only: its guest sets the pace")
        if self._producer is not None:
            raise RuntimeError("another producer is registered")
        if not self._open:
            producer.stopProducing()
            return
        self._producer = cast(IPushProducer, producer)
        self._paused = False
        self._steer_producer()

    def unregisterProducer(self) -> None:
        self._producer = None

    def loseConnection(self) -> None:
        """Leave the console. The protocol is told at once; the host is left behind its back."""
        self.end(Failure(ConnectionDone()))

    abortConnection = loseConnection

    # What the host calls.

    def end(self, reason: Failure) -> None:
        """Leave the console for ``reason``, at once."""
        self._release()
        self._tell(reason)

    def prove_alive(self) -> None:
        """Be lost soon if the host does not answer on the console's own connection."""
        self._host.threads.call(partial(self._line.connection.keep_alive, 2, 3)).addErrback(
            lambda _: None
        )

    # Output

    def _on_event(self, has_room: bool) -> None:
        try:
            if has_room and self._full:
                self._full = False
                self._line.want_room(False)
                self._send()
            ended = self._receive()
        except Exception:
            # The protocol's mistake must not go on into libvirt, and the guest is not to blame.
            self._log.failure("a console's protocol failed")
            self.end(Failure())
            return
        if ended is not None and self._open:
            self._finish(ended())

    def _receive(self) -> Why | None:
        """Take what there is, up to a burst: libvirt calls again when there is more.

        Returns what finds out why it ended, when it did.
        """
        burst = bytearray()
        ended: Why | None = None
        while len(burst) < _BURST:
            try:
                data = self._line.receive()
            except self._errors as error:
                ended = self._why_broken(error)
                break
            if data is None:
                break
            if not data:
                ended = self._ending.at_its_end
                break
            burst += data
        if burst and self._protocol is not None:
            self._protocol.dataReceived(bytes(burst))
        return ended

    def _why_broken(self, error: Exception) -> Why:
        # The error itself is not kept: its frames hold the stream, and so its connection.
        return self._why_lost if is_connection_lost(error) else self._ending.by_error

    # Input

    def _send(self) -> None:
        try:
            while self._queue and not self._full and (room := self._credit.room):
                taken = self._line.send(bytes(self._queue[:room]))
                if not taken:
                    self._full = True
                    self._line.want_room(True)
                    break
                del self._queue[:taken]
                self._credit.sent(taken)
        except self._errors as error:
            self._finish(self._why_broken(error)())
            return
        self._ask()
        if self._confirm_later is None and self._credit.unanswered:
            self._confirm_later = self._host.reactor.callLater(_CONFIRM, self._confirm_now)
        self._steer_producer()

    def _confirm_now(self) -> None:
        self._confirm_later = None
        self.confirm()

    def _ask(self) -> None:
        if self._credit.ask(self._confirming):
            self._asked_at = self._host.reactor.seconds()
            self._host.threads.call(self._line.ping).addCallbacks(self._answered, self._lose)

    def _answered(self, _result: None) -> None:
        self._credit.answered()
        if self._open:
            self._send()

    def _steer_producer(self) -> None:
        if self._producer is None:
            return
        waiting = len(self._queue)
        if not self._paused and waiting > _PAUSE_ABOVE:
            self._paused = True
            self._producer.pauseProducing()
        elif self._paused and waiting < _RESUME_BELOW:
            self._paused = False
            self._producer.resumeProducing()

    # The end

    def _lose(self, _reason: object) -> None:
        if self._open:
            self._finish(self._why_lost())

    async def _why_lost(self) -> ConsoleGone:
        """Raises HostUnreachable."""
        unanswered = (
            self._host.reactor.seconds() - self._asked_at if self._credit.is_asking else 0.0
        )
        return await self._ending.by_loss(unanswered, self.unsent)

    def _finish(self, why: Coroutine[Deferred[Any], Any, ConsoleGone]) -> None:
        """End it, and tell the protocol as soon as it is known why."""
        self._release()

        def unknown(failure: Failure) -> ConsoleGone:
            if not failure.check(HostUnreachable, TimeoutError):
                self._log.failure("cannot tell why a console ended", failure)
            return HostLost(connection_lost(self._host.name))

        explaining = Deferred.fromCoroutine(why)
        explaining.addTimeout(EXPLAINING, self._host.reactor)
        explaining.addErrback(unknown)
        explaining.addCallback(lambda gone: self._tell(Failure(gone)))

    def _release(self) -> None:
        """Take no more part in it, and begin to leave it behind."""
        if not self._open:
            return
        self._open = False
        if self._confirm_later is not None:
            self._confirm_later.cancel()
        self._line.stop()
        self._host.console_ended(self)
        self._line.connection.closed.addCallback(lambda _: self._host.console_closed(self))
        # Not now: libvirt's callback, which may be below us on the stack, holds the stream.
        self._host.reactor.callLater(0, self._close)

    def _close(self) -> None:
        closing = self._host.threads.call(self._line.close)
        # Threads that stop no longer wait for it, and say so; it goes on all the same.
        closing.addErrback(lambda failure: failure.trap(HostUnreachable))
        closing.addErrback(
            lambda failure: self._log.failure("a console was not left in order", failure)
        )

    def _tell(self, reason: Failure) -> None:
        protocol, self._protocol = self._protocol, None
        producer, self._producer = self._producer, None
        if protocol is not None:
            with self._log.failuresHandled("a console's protocol failed"):
                if producer is not None:
                    producer.stopProducing()
                protocol.connectionLost(reason)
