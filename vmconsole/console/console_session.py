"""Joins a user's ssh channel and an Attachment: keystrokes one way, the screen the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.error import ConnectionDone
from twisted.internet.interfaces import (
    IConsumer,
    IDelayedCall,
    IHalfCloseableProtocol,
    IPushProducer,
    IReactorTime,
    ITransport,
)
from twisted.internet.protocol import Protocol, connectionDone
from twisted.python.failure import Failure
from zope.interface import implementer

from vmconsole.console.console import Attachment, ConsolePool
from vmconsole.console.escape import Command, EscapeScanner, escape_name
from vmconsole.errors import ConsoleError
from vmconsole.interfaces import ConsoleInfo, Role
from vmconsole.text import printable

# Seconds after a lone escape character until the help line is shown.
HELP_AFTER = 0.7
# Seconds until somebody who waits for a console is told that it takes longer.
CONNECTING_AFTER = 1.0
# Seconds of silence on a fresh console, until the user is told what brings a prompt.
QUIET_AFTER = 2.0
# After the client's end of input: seconds of silence both ways until the session ends, and how
# long a guest that prints without end is listened to when it takes no more input.
SILENCE = 1.0
LAST_INPUT = 5.0
_LOOK_EVERY = 0.25

_CTRL_C = b"\x03"
# Attributes off, cursor visible: what a guest may have left behind on the user's terminal.
_TERMINAL_RESET = b"\x1b[0m\x1b[?25h"


class Screen(Protocol):
    """The guest's output, on its way to the user's channel."""

    def __init__(self, channel: IConsumer, opened: Callable[[Attachment], None]) -> None:
        self._channel = channel
        self._opened = opened
        self.silent = True
        """Until the guest printed something."""
        self.ended: Deferred[BaseException] = Deferred()

    def connectionMade(self) -> None:
        """From here on the channel holds the output back when the user is slow."""
        attachment = cast(Attachment, self.transport)
        self._channel.registerProducer(attachment, True)
        self._opened(attachment)

    def dataReceived(self, data: bytes) -> None:
        """The guest printed."""
        self.silent = False
        self._channel.write(data)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """The console is closed."""
        self._channel.unregisterProducer()
        self.ended.callback(reason.value or ConnectionDone())


@implementer(IHalfCloseableProtocol)
class ConsoleSession(Protocol):
    """One user on one console; the protocol on the user's channel.

    Keys that are typed before the console is open wait for it, and the channel's window bounds
    how many can. Those of a viewer, who may only watch, go nowhere.
    """

    transport: ITransport

    def __init__(
        self, info: ConsoleInfo, pool: ConsolePool, clock: IReactorTime, escape: int | None
    ) -> None:
        self._info = info
        self._name = printable(info.vm_name)
        self._pool = pool
        self._clock = clock
        self._escape = escape
        self._role = info.role
        self._told_viewer = False
        self._scanner = EscapeScanner(escape)
        self._early = bytearray()
        self._connecting: Deferred[Attachment] | None = None
        self._told_connecting = False
        self._attachment: Attachment | None = None
        self._hint: IDelayedCall | None = None
        self._input_ended = False
        self._left = ""

    async def open(self, holder: str) -> Attachment:
        """Open the console and join it to the channel.

        Raises ConsoleError, also when the user gave up meanwhile, or the channel closed.
        """
        if self._left:
            raise ConsoleError(self._left)
        self._screen = Screen(cast(IConsumer, self.transport), self._opened)
        self._connecting = Deferred.fromCoroutine(
            self._pool.attach(self._info, holder, self._screen)
        )
        slow = self._clock.callLater(CONNECTING_AFTER, self._tell_connecting)
        try:
            return await self._connecting
        except CancelledError:
            if self._left:
                raise ConsoleError(self._left) from None
            raise
        finally:
            self._connecting = None
            if slow.active():
                slow.cancel()

    async def ended(self) -> str:
        """Wait until it is over, say why on the user's screen, and return the reason."""
        error = await self._screen.ended
        self._attachment = None
        self._stop_hint()
        reason = self._left if isinstance(error, ConnectionDone) else str(error)
        self.transport.write(_TERMINAL_RESET)
        self._say(reason)
        return reason

    def revoke(self, reason: str) -> None:
        """The user may not go on."""
        self._leave(reason)

    def change_role(self, role: Role) -> None:
        """From now on the user may type, or may only watch."""
        self._role = role
        self._told_viewer = True
        if role == "viewer":
            self._say(f"From now on you may only watch {self._name}.")
        else:
            self._say(f"From now on you may type on {self._name}.")

    # --- Protocol: from the user

    def dataReceived(self, data: bytes) -> None:
        """The user typed."""
        self._stop_hint()
        if self._told_connecting and self._attachment is None and _CTRL_C in data:
            self._leave(f"You gave up {self._name}.")
            return
        for item in self._scanner.feed(data):
            if isinstance(item, bytes):
                self._type(item)
            elif item is Command.LEAVE:
                did = "gave up" if self._attachment is None else "left"
                self._leave(f"You {did} {self._name}.")
                return
            else:
                self._tell_help()
        if self._scanner.pending:
            self._hint = self._clock.callLater(HELP_AFTER, self._tell_help)

    def readConnectionLost(self) -> None:
        """The client's input ended: leave, once the guest took it and had time to answer."""
        self._input_ended = True
        if self._attachment is not None:
            self._leave_when_quiet()

    def writeConnectionLost(self) -> None:
        """Never comes for an ssh channel."""

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """The channel is gone."""
        self._stop_hint()
        self._leave("The ssh connection ended.")

    # ---

    def _leave(self, reason: str) -> None:
        self._left = self._left or reason
        if self._attachment is not None:
            self._attachment.loseConnection()
        elif self._connecting is not None:
            self._connecting.cancel()

    def _opened(self, attachment: Attachment) -> None:
        self._attachment = attachment
        watching = ", watching only" if self._role == "viewer" else ""
        place = f"{self._name} on {printable(self._info.host)}{watching}"
        self._say(f"{place}. {self._how_to_leave()}")
        if self._role == "operator":
            self._hint = self._clock.callLater(QUIET_AFTER, self._tell_quiet)
        early, self._early = bytes(self._early), bytearray()
        if early:
            attachment.write(early)
            cast(IPushProducer, self.transport).resumeProducing()
        attachment.registerProducer(cast(IPushProducer, self.transport), True)
        if self._input_ended:
            self._leave_when_quiet()

    def _type(self, data: bytes) -> None:
        if self._role == "viewer":
            if not self._told_viewer:
                self._told_viewer = True
                self._say(f"You may only watch {self._name}; what you type goes nowhere.")
        elif self._attachment is not None:
            self._attachment.write(data)
        else:
            self._early += data
            cast(IPushProducer, self.transport).pauseProducing()

    def _leave_when_quiet(self) -> None:
        seen = (-1, -1)
        taken_at = moved_at = self._clock.seconds()

        def look() -> None:
            nonlocal seen, taken_at, moved_at
            attachment, now = self._attachment, self._clock.seconds()
            if attachment is None:
                return
            unsent, printed = attachment.unsent, attachment.bytes_out
            if unsent != seen[0]:
                taken_at = now
            if (unsent, printed) != seen:
                moved_at = now
            seen = (unsent, printed)
            if now - moved_at >= SILENCE or now - taken_at >= LAST_INPUT:
                self._leave(f"The input ended; you left {self._name}.")
            else:
                self._clock.callLater(_LOOK_EVERY, look)

        look()

    def _tell_connecting(self) -> None:
        self._told_connecting = True
        self._say(f"Connecting to {self._name} on {printable(self._info.host)}... Ctrl-C gives up.")

    def _tell_quiet(self) -> None:
        if self._screen.silent:
            self._say(f"{self._name} is quiet; Enter brings its prompt.")

    def _tell_help(self) -> None:
        if self._escape is not None:
            key = escape_name(self._escape)
            self._say(f"{key} . leaves, {key} {key} sends {key}, {key} ? shows this.")

    def _how_to_leave(self) -> str:
        if self._escape is None:
            return "To leave, end ssh: Enter, ~, ."
        key = escape_name(self._escape)
        return f"To leave: {key} . (help: {key} ?)"

    def _say(self, text: str) -> None:
        self.transport.write(f"\r\n[vmconsole: {text}]\r\n".encode())

    def _stop_hint(self) -> None:
        if self._hint is not None and self._hint.active():
            self._hint.cancel()
        self._hint = None
