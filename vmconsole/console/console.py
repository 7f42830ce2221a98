"""A Console holds a guest's stream, and serves everybody who is attached to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionDone
from twisted.internet.interfaces import IDelayedCall, IPushProducer, IReactorTime
from twisted.internet.protocol import Protocol, connectionDone
from twisted.python.failure import Failure
from zope.interface import implementer

from vmconsole.console.attachment import Attachment
from vmconsole.console.keyboard import Keyboard
from vmconsole.console.recording import Recording
from vmconsole.console.scrollback import Scrollback
from vmconsole.errors import ConsoleGone
from vmconsole.interfaces import ConsoleInfo, IConsoleTransport

# Seconds in which a guest's host says that it took what was typed, unless it is stuck.
_CONFIRMED = 1.0
# Output goes on at once, so many times in so many seconds; a guest that prints more often than
# that has its output gathered for as long, until it pauses.
_AT_ONCE = 32
# Bytes typed that wait for a guest which takes no input.
_CLOGGED = 262144
_GATHER = 0.004


@implementer(IPushProducer)
class Console(Protocol):
    """The protocol on a guest's console stream, and on the next one after that: see Follower.

    Output is always drained (law 2). When the last one leaves, the stream stays open for
    ``linger`` seconds more.
    """

    transport: IConsoleTransport
    ended: Deferred[BaseException]
    """Why the stream ended, once it has."""
    give_up: Callable[[], None]
    """Open it no more: nobody wants it."""

    def __init__(
        self,
        info: ConsoleInfo,
        clock: IReactorTime,
        keyboard: Keyboard,
        scrollback: int,
        linger: float,
    ) -> None:
        self.info = info
        self.keyboard = keyboard
        self.attachments: list[Attachment] = []
        self.scrollback = Scrollback(scrollback)
        self.lost = 0
        """Bytes typed that the host had not confirmed when the stream ended."""
        self.recording: Recording | None = None
        self._clock = clock
        self._linger = linger
        self._lingering: IDelayedCall | None = None
        self._gathered: list[bytes] = []
        self._window = -1.0
        self._delivered = 0
        self._flush: IDelayedCall | None = None
        self._typing: dict[Attachment, IPushProducer] = {}
        self._takes_input = True
        self._kept: bytearray | None = None

    @property
    def is_open(self) -> bool:
        """Whether the guest's stream is."""
        return bool(self.connected)

    def connectionMade(self) -> None:
        """A stream is open; ``begin`` follows."""
        self.ended = Deferred()
        self.transport.registerProducer(self, True)

    def begin(self, info: ConsoleInfo) -> None:
        """Whoever is attached may begin, or go on, at the place where the stream is open."""
        self.info = info
        for attachment in list(self.attachments):
            if self.is_open:
                attachment.begin()

    def dataReceived(self, data: bytes) -> None:
        """The guest printed: at once on a quiet line, gathered when it prints a lot."""
        if self.recording is not None:
            self.recording.write(data)
        self.scrollback.append(data)
        if self._flush is not None:
            self._gathered.append(data)
            return
        now = self._clock.seconds()
        if not 0 <= now - self._window < _GATHER:
            self._window, self._delivered = now, 0
        if self._delivered < _AT_ONCE:
            self._delivered += 1
            self._deliver(data)
        else:
            self._gathered.append(data)
            self._flush = self._clock.callLater(_GATHER, self._deliver_gathered)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """The stream ended; what becomes of who is attached is its Follower's to say."""
        self.flush()
        self._stop_lingering()
        self.lost, held = self.unsent, self._kept
        self.connected, self._kept = 0, None
        if held is not None:
            self.resumeProducing()
        recording, self.recording = self.recording, None
        if recording is not None:
            recording.close()
        self.ended.callback(reason.value or ConnectionDone())

    def join(self, attachment: Attachment) -> None:
        """Somebody attaches: to a stream that is open, or one that may be later."""
        self._stop_lingering()
        self.flush()
        self.attachments.append(attachment)
        if self.is_open:
            attachment.begin()

    def detach(self, attachment: Attachment) -> None:
        """Somebody leaves; when nobody is left, the stream is closed after a while."""
        if attachment not in self.attachments:
            return
        self.attachments.remove(attachment)
        self.remove_typing_producer(attachment)
        if attachment.is_there and not attachment.party.hidden:
            self.mark(f"{attachment.name} left")
        self.keyboard.leave(attachment)
        if any(not each.party.hidden for each in self.attachments):
            return
        if not self.is_open:
            if not self.attachments:
                self.give_up()
            return
        if not self.attachments and (not self._linger or self.is_input_held):
            self.close()
            return
        self._stop_lingering()
        self.transport.confirm()
        until = self._clock.seconds() + self._linger
        self._lingering = self._clock.callLater(_CONFIRMED, self._linger_on, until)

    def _stop_lingering(self) -> None:
        if self._lingering is not None and self._lingering.active():
            self._lingering.cancel()

    def _linger_on(self, until: float) -> None:
        left = until - self._clock.seconds()
        if self.unsent:
            # Where the guest takes no input, what was typed would wait for the next one.
            self.end(Failure(ConsoleGone("The guest takes no input.")))
        elif not self.attachments:
            self._lingering = self._clock.callLater(max(left, 0.0), self.close)

    def close(self) -> None:
        """Close the stream, which nobody is attached to."""
        if self.is_open:
            self.transport.loseConnection()

    def end(self, reason: Failure) -> None:
        """It is over; whoever is attached is told ``reason``."""
        self.flush()
        attachments, self.attachments = self.attachments, []
        self.keyboard.close()
        for attachment in attachments:
            attachment.end(reason)
        if self.is_open:
            self.close()
        else:
            self.give_up()

    def mark(self, label: str) -> None:
        """Note in the recording, if there is one, what happened."""
        if self.recording is not None:
            self.recording.mark(label)

    def tell(self, text: str) -> None:
        """Tell everybody who is on it."""
        for attachment in list(self.attachments):
            if attachment.has_begun:
                attachment.tell(text)

    def flush(self) -> None:
        """Hand on what was gathered: from here on the scrollback has no more than was shown."""
        if self._flush is not None:
            self._flush.cancel()
            self._deliver_gathered()

    # --- towards the guest

    def type(self, data: bytes) -> None:
        """Type into the guest; while input is held, once it no longer is."""
        if self._kept is not None:
            self._kept += data
        elif self.is_open:
            self.transport.write(data)

    @property
    def unsent(self) -> int:
        """Bytes typed that the guest's host has not confirmed."""
        unsent = cast(int, self.transport.unsent) if self.is_open else 0
        return unsent + len(self._kept or b"")

    @property
    def is_clogged(self) -> bool:
        """Whether more waits for the guest than the windows of two clients hold: nothing more is
        kept, lest everybody who comes and goes adds to it."""
        return self.unsent > _CLOGGED

    @property
    def is_input_held(self) -> bool:
        """Between hold_input and release_input."""
        return self._kept is not None

    def hold_input(self) -> bytearray:
        """Whoever types now waits, until ``release_input`` is called with the result."""
        held = self._kept = bytearray()
        for producer in list(self._typing.values()):
            producer.pauseProducing()
        return held

    def release_input(self, held: bytearray, first: bytes) -> None:
        """``first`` is typed, and then what was held, whoever has the keyboard by now; nothing,
        when the stream has ended meanwhile."""
        if held is not self._kept:
            return
        data, self._kept = first + bytes(held), None
        if self.is_open:
            self.transport.write(data)
        if self._takes_input:
            self.resumeProducing()

    # --- IPushProducer: whoever types is held back by the guest

    def add_typing_producer(self, attachment: Attachment, producer: IPushProducer) -> None:
        """``producer`` types through ``attachment``."""
        self._typing[attachment] = producer
        if not self._takes_input or self.is_input_held:
            producer.pauseProducing()

    def remove_typing_producer(self, attachment: Attachment) -> None:
        """It has ended."""
        self._typing.pop(attachment, None)

    def pauseProducing(self) -> None:
        """The guest takes no more input just now."""
        self._takes_input = False
        for producer in list(self._typing.values()):
            producer.pauseProducing()

    def resumeProducing(self) -> None:
        """The guest takes input again."""
        self._takes_input = True
        for producer in [] if self.is_input_held else list(self._typing.values()):
            producer.resumeProducing()

    def stopProducing(self) -> None:
        """The stream is gone: nothing holds up who types, who is told that it goes nowhere."""
        self.resumeProducing()

    def _deliver_gathered(self) -> None:
        self._flush = None
        if self._gathered:
            # What comes soon after is gathered, too.
            self._window, self._delivered = self._clock.seconds(), _AT_ONCE
            data = b"".join(self._gathered)
            self._gathered.clear()
            self._deliver(data)

    def _deliver(self, data: bytes) -> None:
        for attachment in list(self.attachments):
            # Who has not begun yet will find it in the scrollback.
            if attachment.has_begun:
                attachment.deliver(data)
