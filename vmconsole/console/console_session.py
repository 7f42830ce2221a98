"""Joins a user's ssh channel and an Attachment: keystrokes one way, the screen the other."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
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
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from vmconsole.console import terminal
from vmconsole.console.attachment import Attachment, Party
from vmconsole.console.escape import Command, EscapeScanner, SysRq, escape_name
from vmconsole.console.guard import shows_shell_prompt
from vmconsole.console.guest_control import GuestControl
from vmconsole.console.pool import ConsolePool
from vmconsole.console.quiet import when_quiet
from vmconsole.console.screen import Screen
from vmconsole.console.who import describe_all
from vmconsole.errors import ConsoleError, ConsoleInterrupted, GuestStopped, InputLost
from vmconsole.interfaces import ConsoleInfo, Role
from vmconsole.text import lasting, printable

# Seconds after a lone escape character until the help line is shown.
HELP_AFTER = 0.7
# Seconds until somebody who waits for a console is told that it takes longer.
CONNECTING_AFTER = 1.0
# Seconds of silence on a fresh console, until the user is told what brings a prompt.
QUIET_AFTER = 2.0

_CTRL_C = b"\x03"
_BELL = b"\x07"


@implementer(IHalfCloseableProtocol)
class ConsoleSession(Protocol):
    """One user on one console; the protocol on the user's channel.

    Keys that are typed before the console is open wait for it, and the channel's window bounds
    how many can. Those of somebody without the keyboard go nowhere.
    """

    transport: ITransport
    _logger = Logger()

    def __init__(
        self,
        info: ConsoleInfo,
        party: Party,
        pool: ConsolePool,
        clock: IReactorTime,
        escape: int | None,
        size: Callable[[], tuple[int, int]] = lambda: (24, 80),
    ) -> None:
        """``size`` gives the rows and columns of the user's terminal, now."""
        self._info = info
        self._name = printable(info.vm_name)
        self._party = party
        self._pool = pool
        self._clock = clock
        self._escape = escape
        self._size = size
        self._scanner = EscapeScanner(escape)
        self._early = bytearray()
        self._connecting: Deferred[Attachment] | None = None
        self._told_connecting = False
        self._told_refusal = False
        self._rang = False
        self._helped = False
        self._waits_for = ""
        self._guest_control = GuestControl(pool, clock, self._say, self._refuse)
        self._attachment: Attachment | None = None
        self._hint: IDelayedCall | None = None
        self._input_ended = False
        self._left = ""
        self._open_shell = False
        self.back_to_menu = False
        """Whether the user left for the menu."""
        self.rest = b""
        """What was typed behind that: for the menu."""

    async def open(self, force: bool = False, patient: bool = False) -> Attachment:
        """Attach to the console, and join it to the channel; for ``force`` and ``patient`` see
        ConsolePool.

        Raises ConsoleError, also when the user gave up meanwhile, or the channel closed.
        """
        if self._left:
            raise ConsoleError(self._left)
        channel = cast(IConsumer, self.transport)
        self._screen = Screen(channel, self)
        self._connecting = Deferred.fromCoroutine(
            self._pool.attach(self._info, self._party, self._screen, force, patient)
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
            if self._attachment is None:
                self._stop_hint()

    async def ended(self) -> str:
        """Wait until it is over, say why on the user's screen, and return the reason."""
        try:
            error = await self._screen.ended
        finally:
            self._attachment = None
            self._stop_hint()
        reason = self._left if isinstance(error, ConnectionDone) else str(error)
        self.transport.write(terminal.RESET)
        self._say(reason)
        if self._open_shell:
            self._say(
                f"A shell seems to be open on {self._name}: whoever comes next can use it. To log "
                "out first, connect again."
            )
        return reason

    # --- IScreen, and who else knows

    def opened(self, attachment: Attachment) -> None:
        """The console is open."""
        self._attachment = attachment
        host = printable(attachment.console.info.host)
        recorded = " It is recorded." if attachment.console.recording is not None else ""
        self._say(f"{self._name} on {host}.{recorded} {self._how_to_leave()}")

    def begun(self, attachment: Attachment) -> None:
        """The user is on it, and knows who has the keyboard."""
        replayed = self._replay(attachment)
        if attachment.has_keyboard and not replayed and not self._scanner.pending:
            self._hint = self._clock.callLater(QUIET_AFTER, self._tell_quiet, attachment)
        self._type_early(attachment)
        attachment.registerProducer(cast(IPushProducer, self.transport), True)
        if self._input_ended:
            self._leave_when_quiet(attachment)

    def tell(self, text: str, hint: str = "") -> None:
        """Show a sentence, in its turn: others bring this about, and it is bounded as output is."""
        if hint and self._escape is not None:
            text = f"{text} {hint.format(key=escape_name(self._escape))}"
        if self._attachment is not None:
            self._attachment.show(_lines(text))

    def waiting(self, reason: str) -> None:
        """The console cannot be opened yet, and the user said that they would wait."""
        if reason == self._waits_for:
            return
        self._waits_for, self._told_connecting = reason, True
        self._say(f"{reason} Waiting for it; Ctrl-C gives up.")
        if self._early:
            self._early.clear()
            cast(IPushProducer, self.transport).resumeProducing()
            self._say("What you typed until now went nowhere.")

    def interrupted(self, reason: ConsoleInterrupted, patience: float) -> None:
        """The console ended; it is opened again if that can be done."""
        attachment = cast(Attachment, self._attachment)
        self._stop_hint()
        if self._input_ended:
            self._leave(str(reason))
            return
        # What its editor had set goes with it. Of other guests the screen stays as it is.
        stopped = isinstance(reason, GuestStopped)
        attachment.show(terminal.RESET if stopped else terminal.GIVE_UP)
        # The first says so itself; and what a guest that stopped had not read matters no more.
        told = isinstance(reason, InputLost | GuestStopped)
        lost = 0 if told else attachment.console.lost
        also = f" Bytes typed that may be lost: {lost}." if lost else ""
        self._told_refusal = False
        self.tell(
            f"{reason}{also} Waiting up to {lasting(patience)} for {self._name}; {self._leaves()}."
        )

    def resumed(self) -> None:
        """It is open again."""
        host = printable(cast(Attachment, self._attachment).console.info.host)
        self._told_refusal = False
        self.tell(f"{self._name} is back, on {host}.")

    def revoke(self, reason: str) -> None:
        """The user may not go on."""
        self._leave(reason)

    def role_changed(self, role: Role) -> None:
        """From now on the user may type, or may only watch."""
        may = "type on" if role == "operator" else "only watch"
        self.tell(f"From now on you may {may} {self._name}.")
        self._told_refusal = role == "viewer"

    # --- Protocol: from the user

    def dataReceived(self, data: bytes) -> None:
        """The user typed."""
        self._stop_hint()
        self._rang = False
        # Until the console is open nothing tells how much the user has taken: one help is enough.
        self._helped = self._helped and self._attachment is None
        if self._told_connecting and self._attachment is None and _CTRL_C in data:
            self._leave(f"You gave up {self._name}.")
            return
        items = self._scanner.feed(data)
        for number, item in enumerate(items, 1):
            if isinstance(item, bytes):
                self._type(item)
            else:
                if item is Command.MENU:
                    self.rest = b"".join(rest for rest in items[number:] if isinstance(rest, bytes))
                self._obey(item)
            if self._left:
                return
        if self._scanner.pending:
            self._hint = self._clock.callLater(HELP_AFTER, self._tell_help)

    def readConnectionLost(self) -> None:
        """The client's input ended: leave, once the guest took it and had time to answer."""
        self._input_ended = True
        if self._attachment is not None:
            self._leave_when_quiet(self._attachment)

    def writeConnectionLost(self) -> None:
        """Never comes for an ssh channel."""

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """The channel is gone."""
        self._stop_hint()
        self._leave("The ssh connection ended.")

    # --- the keys after the escape character

    def _obey(self, command: Command | SysRq) -> None:
        match command:
            case Command.LEAVE | Command.MENU:
                self.back_to_menu = command is Command.MENU
                did = "gave up" if self._attachment is None else "left"
                self._open_shell = self._leaves_shell_open()
                self._leave(f"You {did} {self._name}.")
            case Command.WHO | Command.REPLAY if self._attachment and self._attachment.is_behind:
                # Much to show for a key: once the user has taken what there is.
                self._ring()
            case Command.WHO if self._attachment is not None:
                self._say(*describe_all(self._attachment.console, self._clock.seconds()))
            case Command.TAKE if self._attachment is not None:
                self._attachment.console.keyboard.ask(self._attachment)
            case Command.KEEP if self._attachment is not None:
                self._attachment.console.keyboard.keep(self._attachment)
            case Command.REPLAY if self._attachment is not None:
                self._replay(self._attachment)
            case Command.SIZE if self._attachment is not None:
                rows, columns = self._size()
                self._type(b"stty rows %d cols %d\r" % (rows, columns))
            case Command.BREAK if self._attachment is not None:
                self.send_break()
            case SysRq(key) if self._attachment is not None:
                self._guest_control.send_sysrq(self._attachment, key)
            case _:
                self._help()

    def _help(self) -> None:
        behind = self._attachment is not None and self._attachment.is_behind
        if behind or self._helped:
            self._ring()
        else:
            self._tell_help()

    def send_break(self) -> None:
        """The user wants BREAK on the line (RFC 4335, too)."""
        if self._attachment is not None:
            self._guest_control.send_break(self._attachment)

    def _leaves_shell_open(self) -> bool:
        attachment = self._attachment
        return (
            attachment is not None
            and attachment.has_keyboard
            and attachment.console.is_open
            and self._pool.settings.guard
            and shows_shell_prompt(attachment.console.scrollback.tail())
        )

    def _leave(self, reason: str) -> None:
        self._left = self._left or reason
        if self._attachment is not None:
            self._attachment.loseConnection()
        elif self._connecting is not None:
            self._connecting.cancel()

    def _replay(self, attachment: Attachment) -> bool:
        return attachment.replay(_lines(f"What {self._name} printed last:"))

    def _type_early(self, attachment: Attachment) -> None:
        early, self._early = bytes(self._early), bytearray()
        if early:
            if not attachment.has_keyboard:
                # Why was told a moment ago.
                self._told_refusal = True
                self._say("What you typed until now went nowhere.")
            self._type(early)
            cast(IPushProducer, self.transport).resumeProducing()

    def _type(self, data: bytes) -> None:
        attachment = self._attachment
        if attachment is None and not self._waits_for:
            self._early += data
            cast(IPushProducer, self.transport).pauseProducing()
        elif attachment is None or not attachment.console.is_open:
            self._refuse(partial(self._say, f"{self._name} is away: what you type goes nowhere."))
        elif attachment.has_keyboard and attachment.console.is_clogged:
            text = f"{self._name} takes no input: what you type now goes nowhere."
            self._refuse(partial(self._say, text))
        elif attachment.has_keyboard:
            self._told_refusal = False
            attachment.write(data)
        else:
            self._refuse(partial(attachment.console.keyboard.refuse, attachment))

    def _refuse(self, tell: Callable[[], None]) -> None:
        self._ring()
        if not self._told_refusal:
            self._told_refusal = True
            tell()

    def _ring(self) -> None:
        # Once for what came together, of which there may be much.
        if not self._rang:
            self._rang = True
            self.transport.write(_BELL)

    def _leave_when_quiet(self, attachment: Attachment) -> None:
        why = f"The input ended; you left {self._name}."
        when_quiet(attachment, self._clock, lambda: self._leave(why))

    def _tell_connecting(self) -> None:
        if self._told_connecting:
            return
        self._told_connecting = True
        self._say(f"Connecting to {self._name} on {printable(self._info.host)}... Ctrl-C gives up.")

    def _tell_quiet(self, attachment: Attachment) -> None:
        if not attachment.bytes_out:
            self._say(f"{self._name} is quiet; Enter brings its prompt.")

    def _tell_help(self) -> None:
        if self._escape is not None:
            self._helped = True
            key = escape_name(self._escape)
            self._say(
                f"{key} and then: . leave, m menu, w who is here, t take, ask for or give the "
                "keyboard, n keep it, r replay, b BREAK, s and a key SysRq, z stty size, "
                f"{key} sends {key}, ? this help"
            )

    def _leaves(self) -> str:
        if self._escape is None:
            return "ending ssh leaves: Enter, ~, dot"
        return f"{escape_name(self._escape)} . leaves"

    def _how_to_leave(self) -> str:
        if self._escape is None:
            return "To leave, end ssh: Enter, ~, ."
        key = escape_name(self._escape)
        return f"To leave: {key} . (help: {key} ?)"

    def _say(self, *texts: str) -> None:
        self.transport.write(_lines(*texts))

    def _stop_hint(self) -> None:
        if self._hint is not None and self._hint.active():
            self._hint.cancel()
        self._hint = None


def _lines(*texts: str) -> bytes:
    return ("\r\n" + "".join(f"[vmconsole: {text}]\r\n" for text in texts)).encode()
