"""An Attachment: a user's own transport to a Console, which others may share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, cast
from typing import Protocol as Structural

import msgspec
from twisted.internet.error import ConnectionDone
from twisted.internet.interfaces import (
    IAddress,
    IConsumer,
    IProducer,
    IPushProducer,
    IReactorTime,
    ITransport,
)
from twisted.internet.protocol import Protocol
from twisted.python.failure import Failure
from zope.interface import implementer

from vmconsole.console.backlog import Backlog
from vmconsole.console.terminal import Sanitizer
from vmconsole.interfaces import Role

if TYPE_CHECKING:
    from vmconsole.console.console import Console

# One burst to a party: large enough to be cheap, small enough to stop soon after a pause.
_BURST = 32768
# Ends a sequence that a terminal has begun: CAN, and ST where CAN does not.
_GIVE_UP = b"\x18\x1b\\"


class Party(msgspec.Struct, frozen=True):
    """Somebody who attaches."""

    user: str
    """The user's name, printable."""
    address: str
    role: Role = "operator"
    watch: bool = False
    """Whether they want to watch only."""

    def __str__(self) -> str:
        """As the others are told."""
        return f"{self.user} from {self.address}"


class IScreen(Structural):
    """The protocol on an Attachment: besides output, it is told what happens on the console."""

    def begun(self) -> None:
        """It is attached, and it is known who has the keyboard."""

    def tell(self, text: str, hint: str = "") -> None:
        """Show a sentence; the hint has ``{key}`` where the escape character is meant."""


@implementer(ITransport, IConsumer, IPushProducer)
class Attachment:
    """A user's own transport to a Console, which others may share.

    ``write`` types into the guest, for who has the keyboard; a producer that is registered is
    paused while the guest takes no input. As a push producer it holds back output for a reader
    that is slow, up to ``backlog`` bytes, so that one slow reader never slows another.

    After ``replay``, which is for terminals, output passes a Sanitizer while somebody else has the
    keyboard: a terminal answers what the guest asks of it, and these answers would go nowhere.
    """

    disconnecting = False

    def __init__(
        self, console: Console, party: Party, protocol: Protocol, clock: IReactorTime, backlog: int
    ) -> None:
        self.console = console
        self.party = party
        self.name = str(party)
        self.may_type = party.role == "operator"
        self.wants_keyboard = not party.watch
        self.since = self.typed_at = clock.seconds()
        self.has_begun = False
        self.bytes_in = 0
        """Bytes typed into the guest."""
        self.bytes_out = 0
        """Bytes printed by the guest since the attach."""
        self._protocol = protocol
        self._clock = clock
        self._backlog = Backlog(backlog)
        self._paused = False
        self._gets_queries = False
        self._sanitizer: Sanitizer | None = None

    def begin(self) -> None:
        """The stream is open."""
        self.has_begun = True
        self._protocol.makeConnection(self)
        if not self.disconnecting:
            self.console.keyboard.join(self)
            cast(IScreen, self._protocol).begun()

    @property
    def has_keyboard(self) -> bool:
        """Whether what is written reaches the guest."""
        return self.console.keyboard.holder is self

    def change_role(self, role: Role) -> None:
        """The engine lets the user type from now on, or no longer."""
        self.may_type = role == "operator"
        if self.has_begun and not self.disconnecting:
            self.console.keyboard.may_type_changed(self)

    def replay(self, heading: bytes) -> bool:
        """Show what the guest printed last, made harmless, below ``heading``; output goes on from
        there. False: there is nothing."""
        self.console.flush()
        shown, self._sanitizer = self.console.scrollback.replay()
        if shown:
            self.show(heading + shown)
        return bool(shown)

    def tell(self, text: str, hint: str = "") -> None:
        """See Typist."""
        cast(IScreen, self._protocol).tell(text, hint)

    def keyboard_moved(self) -> None:
        """See Typist."""
        # What was printed before is for the terminal of who had it then.
        self.console.flush()
        self._gets_queries = self.has_keyboard
        if self._gets_queries or self._sanitizer is not None:
            return
        # What was shown until now may have ended in the middle of a sequence.
        waiting = b"".join(iter(lambda: self._backlog.take(_BURST), b""))
        _, self._sanitizer = self.console.scrollback.replay()
        if waiting:
            self.show(_GIVE_UP + Sanitizer().feed(waiting))
        elif self._sanitizer.pending:
            self.show(_GIVE_UP)

    def deliver(self, data: bytes) -> None:
        """Hand the guest's output to the user."""
        self.bytes_out += len(data)
        if self._sanitizer is not None:
            if not self._gets_queries:
                data = self._sanitizer.feed(data)
            else:
                data = self._sanitizer.join(data)
                if not self._sanitizer.pending:
                    self._sanitizer = None
        self.show(data)

    @property
    def is_behind(self) -> bool:
        """Whether the user has not taken all yet."""
        return self._paused or len(self._backlog) > 0

    def show(self, data: bytes) -> None:
        """Hand ``data`` to the user in its turn, or keep it while the user is slow."""
        if not data or self.disconnecting:
            return
        if self.is_behind:
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
        """See Console."""
        return self.console.unsent

    # --- ITransport, IConsumer: towards the guest

    def write(self, data: bytes) -> None:
        """Type into the guest. Nothing happens without the keyboard."""
        if not self.disconnecting and self.has_keyboard:
            self.bytes_in += len(data)
            self.typed_at = self._clock.seconds()
            self.console.type(data)

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
        self.console.add_typing_producer(self, cast(IPushProducer, producer))

    def unregisterProducer(self) -> None:
        """The producer has ended."""
        self.console.remove_typing_producer(self)

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
