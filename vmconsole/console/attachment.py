"""An Attachment: a user's own transport to a Console, which others may share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, cast
from typing import Protocol as Structural

import msgspec
from twisted.internet.defer import Deferred
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
from vmconsole.console.terminal import GIVE_UP, Sanitizer
from vmconsole.errors import ConsoleInterrupted, EngineError
from vmconsole.interfaces import ConsoleInfo, Role

if TYPE_CHECKING:
    from vmconsole.console.console import Console

# One burst to a party: large enough to be cheap, small enough to stop soon after a pause.
_BURST = 32768


class IAccess(Structural):
    """What the engine says of one party and one console, and who wants to know of both."""

    async def locate(self) -> ConsoleInfo | None:
        """Where the console stands, past what is remembered of earlier answers; None: it is not
        among those that the party may open now. Raises EngineError."""

    def begin(self, attachment: Attachment) -> None:
        """The party is on the open console, for the first time or again."""

    def pause(self, reason: str) -> None:
        """The console was interrupted; ``begin`` may follow."""


class Party(msgspec.Struct, frozen=True):
    """Somebody who attaches."""

    user: str
    """The user's name, printable."""
    address: str
    role: Role = "operator"
    watch: bool = False
    """Whether they want to watch only."""
    hidden: bool = False
    """Whether it is none of the people there: it is not listed, and has no part in the keyboard."""
    access: IAccess | None = None
    """None: whom no engine has to be asked about."""

    def __str__(self) -> str:
        """As the others are told."""
        return f"{self.user} from {self.address}"


class IScreen(Structural):
    """The protocol on an Attachment: besides output, it is told what happens on the console."""

    def begun(self) -> None:
        """It is attached, and it is known who has the keyboard."""

    def tell(self, text: str, hint: str = "") -> None:
        """Show a sentence; the hint has ``{key}`` where the escape character is meant."""

    def waiting(self, reason: str) -> None:
        """The console cannot be opened yet, for ``reason``; it is tried again."""

    def interrupted(self, reason: ConsoleInterrupted, patience: float) -> None:
        """The console ended, and is opened again within ``patience`` seconds, if it can be."""

    def resumed(self) -> None:
        """It is open again; perhaps on another host."""

    def revoked(self, reason: str) -> None:
        """The party may not go on, and has to leave."""

    def role_changed(self, role: Role) -> None:
        """From now on the party may type, or may only watch."""


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
        self,
        console: Console,
        party: Party,
        protocol: Protocol,
        clock: IReactorTime,
        backlog: int,
        force: bool = False,
        patient: bool = False,
    ) -> None:
        """``force``: who takes the console from another program, until it is open. ``patient``: who
        waits for as long as it takes until it can be opened."""
        self.console = console
        self.party = party
        self.role = party.role
        self.force = force
        self.patient = patient
        self.opened: Deferred[None] = Deferred()
        """Fires once it has begun; fails with ConsoleError when it cannot."""
        self.name = str(party)
        self.wants_keyboard = not party.watch
        self.since = self.typed_at = clock.seconds()
        self.has_begun = False
        self.has_waited = False
        """Whether a try to open the console has failed since they came."""
        self.is_there = False
        """Whether they are on the stream that is open: a recording of it says so."""
        self.bytes_in = 0
        """Bytes typed into the guest."""
        self.bytes_out = 0
        """Bytes printed by the guest since the attach."""
        self._protocol = protocol
        self._screen = cast(IScreen, protocol)
        self._clock = clock
        self._backlog = Backlog(backlog)
        self._paused = False
        self._is_listed = True
        self._gets_queries = False
        self._sanitizer: Sanitizer | None = None

    async def locate(self) -> ConsoleInfo | None:
        """See IAccess; without one, and when the engine is of no use, the console's last place.

        An outage of the engine ends nothing, so it keeps nobody from going on; unless its last
        answer was that the console is none of theirs.
        """
        if self.party.access is not None:
            try:
                found = await self.party.access.locate()
            except EngineError:
                if not self._is_listed:
                    return None
            else:
                self._is_listed = found is not None
                return found
        return msgspec.structs.replace(self.console.info, role=self.role)

    def begin(self) -> None:
        """The stream is open, for the first time or again."""
        self.is_there = True
        if self.party.access is not None:
            self.party.access.begin(self)
        if not self.party.hidden:
            self.console.mark(f"{self.name} attached")
        if self.has_begun:
            if self.has_keyboard:
                self._mark_keyboard()
            self._screen.resumed()
            return
        self.has_begun = True
        self._protocol.makeConnection(self)
        if not self.disconnecting:
            if not self.party.hidden:
                self.console.keyboard.join(self)
            self._screen.begun()
        self.opened.callback(None)

    def refuse(self, error: Exception) -> None:
        """The stream cannot be opened: wait on, or give up."""
        if self.patient:
            self.has_waited = True
            self._screen.waiting(str(error))
        else:
            self.console.detach(self)
            self.opened.errback(error)

    def interrupt(self, reason: ConsoleInterrupted, patience: float) -> None:
        """The stream ended, and may be opened again within ``patience`` seconds."""
        self.is_there = False
        if self.party.access is not None:
            self.party.access.pause(str(reason))
        # What was begun is never ended now.
        if self._gets_queries:
            self._sanitizer = None
        elif self._sanitizer is not None:
            self._sanitizer.give_up()
        self._screen.interrupted(reason, patience)

    def revoke(self, reason: str) -> None:
        """The engine no longer lets the party on this console."""
        self._screen.revoked(reason)

    @property
    def has_keyboard(self) -> bool:
        """Whether what is written reaches the guest."""
        return self.console.keyboard.holder is self

    @property
    def may_type(self) -> bool:
        """See Typist."""
        return self.role == "operator"

    def change_role(self, role: Role) -> None:
        """The engine lets the user type from now on, or no longer."""
        if role == self.role:
            return
        self.role = role
        if self.has_begun and not self.disconnecting:
            self._screen.role_changed(role)
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
        self._screen.tell(text, hint)

    def keyboard_moved(self) -> None:
        """See Typist."""
        # What was printed before is for the terminal of who had it then.
        self.console.flush()
        self._gets_queries = self.has_keyboard
        self._mark_keyboard()
        if self._gets_queries or self._sanitizer is not None:
            return
        # What was shown until now may have ended in the middle of a sequence.
        waiting = b"".join(iter(lambda: self._backlog.take(_BURST), b""))
        _, self._sanitizer = self.console.scrollback.replay()
        if waiting:
            self.show(GIVE_UP + Sanitizer().feed(waiting))
        elif self._sanitizer.pending:
            self.show(GIVE_UP)

    def _mark_keyboard(self) -> None:
        if self.is_there and self.has_keyboard:
            self.console.mark(f"{self.name} has the keyboard")
        elif self.is_there and self.console.keyboard.holder is None:
            self.console.mark("nobody has the keyboard")

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
        if self.disconnecting:
            return
        self.disconnecting = True
        if not self.has_begun:
            self.opened.errback(reason)
            return
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
