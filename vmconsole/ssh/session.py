"""The session channel: a Twisted transport, with flow control both ways, over Conch's channel."""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, cast

from twisted.conch.ssh import channel
from twisted.conch.ssh.common import getNS
from twisted.conch.ssh.connection import EXTENDED_DATA_STDERR
from twisted.internet.error import ConnectionDone
from twisted.internet.interfaces import (
    IConsumer,
    IDelayedCall,
    IHalfCloseableProtocol,
    IProducer,
    IProtocol,
    IPushProducer,
    IReactorTime,
    ITransport,
)
from twisted.python.failure import Failure
from zope.interface import implementer

from vmconsole.ssh.idle import IdleTimer
from vmconsole.ssh.logs import conch_logger
from vmconsole.ssh.packets import ProtocolError

if TYPE_CHECKING:
    from vmconsole.ssh.avatar import ConsoleAvatar

# Seconds that a client has to take the rest of the output once a session is over.
LAST_OUTPUT = 5.0
# Bytes of output that wait for the client, above which its input is held, too: what answers each
# key (the menu, the help) must not pile up.
MAX_WAITING_OUTPUT = 65536
_JOINED = 4096
_MAX_PACKET = 32768
_LARGEST_WINDOW = 0xFFFFFFFF
# Of a TERM: none that terminfo knows is longer.
_LONGEST_TERMINAL = 64
_STDOUT = 0


@implementer(ITransport, IConsumer, IPushProducer)
class SessionChannel(channel.SSHChannel):
    """A ``session`` channel (RFC 4254, section 6) as a transport to a user's terminal.

    A protocol is joined with ``join``; what arrives while there is none waits, and the window
    stays shut. A producer registered here is paused when the client's window or its TCP
    connection takes no more. As a push producer it holds the client's input back by the window.
    """

    name = b"session"
    _log = conch_logger("vmconsole.ssh.conch")
    conn: Any
    id: Any
    avatar: ConsoleAvatar

    def __init__(self, *args: Any, clock: IReactorTime, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.remoteMaxPacket = min(self.remoteMaxPacket, _MAX_PACKET)
        self.terminal: str | None = None
        """The client's TERM; None: it did not ask for a pty."""
        self.size = (24, 80)
        """Rows and columns of the client's terminal."""
        self._clock = clock
        self._protocol: IProtocol | None = None
        self._waiting_input = bytearray()
        self._input_ended = False
        self._input_paused = False
        self._output: deque[tuple[int, bytes]] = deque()
        self._waiting_output = 0
        self._producer: IPushProducer | None = None
        self._producer_paused = False
        # First the call that will start it, then its Deferred; both can be cancelled.
        self._command: Any = None
        self._exit_status: int | None = None
        self._last_output: IDelayedCall | None = None
        self._idle: IdleTimer | None = None

    def channelOpen(self, specificData: bytes) -> None:
        """The client may ask now."""

    # --- what the client asks for

    def request_pty_req(self, data: bytes) -> bool:
        """RFC 4254, section 6.2. A serial line knows no size; the menu does."""
        if not self.avatar.permits_pty:
            return False
        terminal, rest = getNS(data)
        self._resize(rest)
        self.terminal = terminal[:_LONGEST_TERMINAL].decode("ascii", "replace")
        limit = self.conn.transport.factory.limits.idle
        if limit and self._idle is None:
            self._idle = IdleTimer(self._clock, limit, self._warn, self._end_idle)
        return True

    def request_window_change(self, data: bytes) -> bool:
        """Section 6.7."""
        if self.terminal is None or len(data) != 16:
            return False
        self._resize(data)
        return True

    def _resize(self, data: bytes) -> None:
        columns, rows = struct.unpack(">2L", data[:8])
        # Zero: the client does not know.
        self.size = (rows or 24, columns or 80)
        resized = getattr(self._protocol, "resized", None)
        if resized is not None:
            resized(*self.size)

    def request_env(self, data: bytes) -> bool:
        """Section 6.4: language and terminal are harmless, and of no use here."""
        name = getNS(data)[0]
        return name in (b"LANG", b"TERM") or name.startswith(b"LC_")

    def request_break(self, data: bytes) -> bool:
        """RFC 4335; how long is the guest's device's to say. No window bounds these, and each is
        answered on the terminal."""
        send = getattr(self._protocol, "send_break", None)
        if send is None or len(data) != 4 or self._waiting_output > MAX_WAITING_OUTPUT:
            return False
        self._typed()
        send()
        return True

    def request_shell(self, data: bytes) -> bool:
        """Section 6.5, without a command."""
        return self._start(b"")

    def request_exec(self, data: bytes) -> bool:
        """Section 6.5, with the user's command line."""
        return self._start(getNS(data)[0])

    def requestReceived(self, requestType: bytes, data: bytes) -> bool:
        """Dispatch to request_*; whatever else a client asks for is refused."""
        handler = getattr(self, "request_" + requestType.decode("latin-1").replace("-", "_"), None)
        try:
            return bool(handler and handler(data))
        except struct.error:
            # A request that is cut; Conch would only answer one that wants a reply.
            return False

    def _start(self, line: bytes) -> bool:
        if self._command is not None or self._exit_status is not None or self.localClosed:
            return False
        # Later, so that the client hears that its request was granted before anything else.
        self._command = self._clock.callLater(0, self._run, line)
        return True

    def _run(self, line: bytes) -> None:
        self._command = self.avatar.run(self, line)
        self._command.addCallbacks(self.exit, self._failed)

    def _failed(self, failure: Failure) -> None:
        # Only a command that is cancelled ends like this, when the channel is closed.
        self.exit(1)

    # --- from the client

    def join(self, protocol: IProtocol, first: bytes = b"") -> None:
        """Hand the channel to ``protocol``, with ``first`` and what waited as its first input."""
        self._protocol = protocol
        protocol.makeConnection(self)
        waiting = first + bytes(self._waiting_input)
        self._waiting_input.clear()
        if waiting:
            protocol.dataReceived(waiting)
        self.resumeProducing()
        if self._input_ended:
            self._tell_input_ended()

    def part(self) -> None:
        """Take the channel back: input waits for the next protocol."""
        self._protocol = None

    def dataReceived(self, data: bytes) -> None:
        """The client sent input."""
        self._typed()
        if self._protocol is not None:
            self._protocol.dataReceived(data)
        elif self._exit_status is None:
            self._waiting_input += data
            self.pauseProducing()

    def _typed(self) -> None:
        if self._idle is not None:
            self._idle.typed()

    def extReceived(self, dataType: int, data: bytes) -> None:
        """A client has no use for this; it is dropped."""

    def eofReceived(self) -> None:
        """The client will send no more. It may say so again and again."""
        if not self._input_ended:
            self._input_ended = True
            self._tell_input_ended()

    def _tell_input_ended(self) -> None:
        half = IHalfCloseableProtocol(self._protocol, None)
        if half is not None:
            half.readConnectionLost()

    def closeReceived(self) -> None:
        """The client closed the channel; so do we."""
        self._close()

    def closed(self) -> None:
        """Both sides closed the channel, or the connection is gone."""
        protocol, self._protocol = self._protocol, None
        if self._idle is not None:
            self._idle.stop()
        if self._last_output is not None and self._last_output.active():
            self._last_output.cancel()
        if protocol is not None:
            protocol.connectionLost(Failure(ConnectionDone()))
        if self._command is not None:
            self._command.cancel()
        self._drop_output()

    def pauseProducing(self) -> None:
        """Take no more input than the client's window has room for."""
        self._input_paused = True

    def resumeProducing(self) -> None:
        """Take input again."""
        self._input_paused = False
        self._reopen_window()

    @property
    def held(self) -> bool:
        """While true, the connection does not reopen the client's window."""
        return self._input_paused or self._waiting_output > MAX_WAITING_OUTPUT

    def _reopen_window(self) -> None:
        used = self.localWindowSize - self.localWindowLeft
        if used >= self.localWindowSize // 2 and not self.held:
            self.conn.adjustWindow(self, used)

    def stopProducing(self) -> None:
        """The guest is gone: input may as well flow, it is dropped."""
        self.resumeProducing()

    # --- to the client

    def write(self, data: bytes) -> None:
        """Show ``data`` on the user's terminal; what the client does not take yet waits."""
        self._put(_STDOUT, data)

    def write_error(self, text: str) -> None:
        """Show a line on the user's standard error."""
        end = "\r\n" if self.terminal is not None else "\n"
        self._put(EXTENDED_DATA_STDERR, (text + end).encode())

    def writeSequence(self, data: Iterable[bytes]) -> None:
        """Show all of ``data``."""
        self.write(b"".join(data))

    def exit(self, status: int) -> None:
        """Send the rest of the output, then ``status`` (RFC 4254, section 6.10), and close."""
        self._exit_status = status
        self.part()
        if self.localClosed:
            return
        self._last_output = self._clock.callLater(LAST_OUTPUT, self._close)
        self.flush()

    def revoke(self, reason: str) -> None:
        """The user's login no longer holds: say so, and end what runs here."""
        if self._exit_status is None and not self.localClosed:
            self.write_error(f"[vmconsole: {reason}]")
            command, self._command = self._command, None
            if command is not None:
                command.cancel()
            # A command that had not begun, or that the client never asked for.
            if self._exit_status is None:
                self.exit(1)

    def _warn(self, text: str) -> None:
        self.write(f"\r\n[vmconsole: {text}]\r\n".encode())

    def _end_idle(self, reason: str) -> None:
        # A console is left, so that others see it, and the audit has the reason.
        leave = getattr(self._protocol, "revoke", None)
        if leave is not None:
            leave(reason)
        self.revoke(reason)

    def loseConnection(self) -> None:
        """Close: the client did, or one of its requests made no sense."""
        self._close()

    def registerProducer(self, producer: IProducer, streaming: bool) -> None:
        """``producer`` is paused while the client takes no output. Push producers only."""
        if not streaming:
            raise ValueError("only push producers can write to an ssh channel")
        self._producer = cast(IPushProducer, producer)
        self._producer_paused = False
        self.flush()

    def unregisterProducer(self) -> None:
        """The producer has ended."""
        self._producer = None

    def addWindowBytes(self, data: int) -> None:
        """The client takes ``data`` more bytes (section 5.2)."""
        self.remoteWindowLeft += data
        if self.remoteWindowLeft > _LARGEST_WINDOW:
            raise ProtocolError("a window that is too large")
        self.flush()

    def flush(self) -> None:
        """Send what the client takes, and pause or resume the producer accordingly."""
        while self._output and self._may_send():
            kind, data = self._output.popleft()
            size = min(len(data), self.remoteWindowLeft, self.remoteMaxPacket)
            if size < len(data):
                self._output.appendleft((kind, data[size:]))
            self._waiting_output -= size
            self.remoteWindowLeft -= size
            if kind == _STDOUT:
                self.conn.sendData(self, data[:size])
            else:
                self.conn.sendExtendedData(self, kind, data[:size])
        if not self._output and self._exit_status is not None:
            self._close()
            return
        self._reopen_window()
        if self._producer is not None:
            held = bool(self._output) or not self._may_send()
            if held != self._producer_paused:
                self._producer_paused = held
                if held:
                    self._producer.pauseProducing()
                else:
                    self._producer.resumeProducing()

    def _put(self, kind: int, data: bytes) -> None:
        if data and not self.localClosed:
            self._waiting_output += len(data)
            if self._output and self._output[-1][0] == kind and len(self._output[-1][1]) < _JOINED:
                data = self._output.pop()[1] + data
            self._output.append((kind, data))
            self.flush()

    def _drop_output(self) -> None:
        self._output.clear()
        self._waiting_output = 0

    def _may_send(self) -> bool:
        return self.remoteWindowLeft > 0 and cast(bool, self.conn.transport.takes_output)

    def _close(self) -> None:
        if self.localClosed:
            return
        if self._last_output is not None and self._last_output.active():
            self._last_output.cancel()
        self._drop_output()
        if self._exit_status is not None:
            self.conn.sendRequest(self, b"exit-status", struct.pack(">L", self._exit_status))
            self.conn.sendEOF(self)
        self.conn.sendClose(self)
