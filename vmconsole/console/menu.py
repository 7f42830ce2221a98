"""The menu: a numbered list, and a line on which the user says which one."""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IHalfCloseableProtocol, ITransport
from twisted.internet.protocol import Protocol, connectionDone
from twisted.python.failure import Failure
from zope.interface import implementer

from vmconsole.console.choice import AmbiguousConsole, NoSuchConsole, by_text
from vmconsole.interfaces import ConsoleInfo
from vmconsole.text import printable

PROMPT = "> "
# More than anybody types; longer input rings the bell.
_LONGEST_LINE = 300
# What may end an answer; in UTF-8 these bytes are part of no other character.
_END_OF_ANSWER = re.compile(rb"[\r\n\x03\x04]")


class Menu:
    """What the menu shows, and what an answer means. Pure."""

    def __init__(self, consoles: Sequence[ConsoleInfo]) -> None:
        self._consoles = consoles

    def render(self) -> str:
        """The numbered list, a line each."""
        return "".join(
            f"{number}. {printable(console.vm_name)} [{printable(console.vm_id)}]\n"
            for number, console in enumerate(self._consoles, 1)
        )

    def choose(self, answer: str) -> ConsoleInfo:
        """The console that ``answer`` names: a number of the list, an id, a name, a beginning.

        Raises NoSuchConsole or AmbiguousConsole, with a text for the user.
        """
        exact = [vm for vm in self._consoles if answer in (vm.vm_id, vm.vm_name)]
        if answer.isascii() and answer.isdigit() and not exact:
            number = int(answer)
            if 1 <= number <= len(self._consoles):
                return self._consoles[number - 1]
            raise NoSuchConsole(f"There is no {number}: choose 1 to {len(self._consoles)}.")
        return by_text(self._consoles, answer)


@implementer(IHalfCloseableProtocol)
class MenuProtocol(Protocol):
    """Shows a Menu on a terminal in raw mode, and reads the answer with echo and corrections.

    ``chosen`` fires with a ConsoleInfo; with None when the user leaves (q, Ctrl-C, Ctrl-D, end of
    input, or a closed channel).
    """

    transport: ITransport

    def __init__(self, menu: Menu) -> None:
        self._menu = menu
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._line = ""
        self._skipping = ""
        self._answer: tuple[ConsoleInfo | None] | None = None
        self.rest = b""
        """The bytes after the answer: typed ahead, for the console."""
        self.chosen: Deferred[ConsoleInfo | None] = Deferred()

    def connectionMade(self) -> None:
        """Show the list and ask."""
        self._show(self._menu.render() + PROMPT)

    def dataReceived(self, data: bytes) -> None:
        """The user typed."""
        at = 0
        while at < len(data) and self._answer is None:
            end = _END_OF_ANSWER.search(data, at)
            piece = data[at : end.end()] if end else data[at:]
            at += len(piece)
            for char in self._decoder.decode(piece):
                self._typed(char)
        if self._answer is not None:
            self.rest = data[at:]
            self._finish(*self._answer)

    def readConnectionLost(self) -> None:
        """The client's input ended."""
        self._finish(None)

    def writeConnectionLost(self) -> None:
        """Never comes for an ssh channel."""

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """The channel is gone."""
        self._finish(None)

    def _typed(self, char: str) -> None:
        if self._skips(char):
            return
        if char in "\r\n":
            self._show("\n")
            self._answered(self._line.strip())
        elif char in "\x03\x04":
            self._show("\n")
            self._answer = (None,)
        elif char in "\x7f\x08":
            if self._line:
                self._line = self._line[:-1]
                self._show("\b \b")
        elif char == "\x15":
            self._show("\b \b" * len(self._line))
            self._line = ""
        elif not char.isprintable() or len(self._line) >= _LONGEST_LINE:
            self._show("\a")
        else:
            self._line += char
            self._show(char)

    def _skips(self, char: str) -> bool:
        # Arrow keys and their like (ESC [ ... letter, ESC O letter) mean nothing here.
        match self._skipping:
            case "" if char == "\x1b":
                self._skipping = "escape"
            case "escape":
                self._skipping = "sequence" if char in "[O" else ""
                return char.isprintable()
            case "sequence":
                if "@" <= char <= "~":
                    self._skipping = ""
            case _:
                return False
        return True

    def _answered(self, answer: str) -> None:
        self._line = ""
        if answer == "q":
            self._answer = (None,)
            return
        if answer:
            try:
                self._answer = (self._menu.choose(answer),)
                return
            except (NoSuchConsole, AmbiguousConsole) as error:
                self._show(f"{error}\n")
        self._show(PROMPT)

    def _finish(self, chosen: ConsoleInfo | None) -> None:
        if not self.chosen.called:
            self.chosen.callback(chosen)

    def _show(self, text: str) -> None:
        self.transport.write(text.replace("\n", "\r\n").encode())
