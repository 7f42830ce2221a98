"""The menu: a numbered list, a page at a time, and a line on which the user says which one."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Sequence
from typing import cast

import msgspec
from twisted.internet.defer import Deferred
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

from vmconsole.console.choice import AmbiguousConsole, NoSuchConsole, by_text, matching
from vmconsole.interfaces import ConsoleInfo
from vmconsole.text import printable

PROMPT = "> "
ROWS, COLUMNS = 24, 80
"""The screen of somebody whose client does not tell."""
# A client may tell any size, and gets a page of that size for each key.
_MOST_ROWS, _MOST_COLUMNS = 200, 500
# VMs to look through, some 10 ms, until everybody else has a turn.
_A_TURN = 50000
# Bytes of input that are read at once; and what each of them counts, and each answer, as a look at
# so many VMs.
_PIECE = 2048
_LOOKS_A_BYTE = 10
_LOOKS_A_PIECE = 100
# More than anybody types; longer input rings the bell.
_LONGEST_LINE = 300
# What may be answered with more than an echo, for page keys their last byte; in UTF-8 these bytes
# are part of no other character.
_ANSWERED = re.compile(rb"[\r\n\x03\x04\x0c~]")
_PAGE_UP, _PAGE_DOWN = "\x1b[5~", "\x1b[6~"


class Page(msgspec.Struct, frozen=True):
    """The VMs from ``first`` to before ``end``, counted from 0, as they are shown."""

    first: int = 0
    end: int = 0
    text: str = ""


class Menu:
    """Which VMs are listed, how a page of them looks, and what an answer means. Pure.

    A page takes as long as what is on it, however long the list is. A character is counted as one
    column: one that is wide or combining makes a page longer or shorter than the screen.
    """

    def __init__(
        self,
        consoles: Sequence[ConsoleInfo],
        filter: str = "",
        listed: Sequence[ConsoleInfo] | None = None,
    ) -> None:
        self._consoles = consoles
        self._filter = filter
        self._listed = consoles if listed is None else listed

    def __len__(self) -> int:
        """How many VMs there are, listed or not."""
        return len(self._consoles)

    def filtered(self, text: str) -> Menu:
        """The menu of the VMs that ``text`` matches (see ``matching``); without a text, of all.

        Raises NoSuchConsole, with a text for the user.
        """
        if not text:
            return Menu(self._consoles)
        listed = matching(self._consoles, text)
        if not listed:
            raise NoSuchConsole(f"None of your VMs matches {printable(text)}.")
        return Menu(self._consoles, text, listed)

    def page(self, first: int, rows: int, columns: int) -> Page:
        """What a screen of this size has room for, from ``first`` on; behind the end, from the
        start. It has a line that tells where one is, unless this is the whole list."""
        rows, columns = _bounded(rows, columns)
        if not self._filter:
            lines = self._lines(range(len(self._listed)), rows - 1, columns)
            if len(lines) == len(self._listed):
                return Page(0, len(lines), "".join(lines))
        first = first if first < len(self._listed) else 0
        lines = self._lines(range(first, len(self._listed)), self._room(rows, columns), columns)
        end = first + len(lines)
        return Page(first, end, "".join(lines) + self._status(first, end))

    def page_before(self, first: int, rows: int, columns: int) -> Page:
        """The page before the one that begins with ``first``; before the start, the last one."""
        rows, columns = _bounded(rows, columns)
        end = first or len(self._listed)
        lines = self._lines(reversed(range(end)), self._room(rows, columns), columns)
        return self.page(end - len(lines), rows, columns)

    def choose(self, answer: str) -> ConsoleInfo:
        """The console that ``answer`` names: a number of the list, or what ``by_text`` takes.

        A number is the one that is shown, with a filter that of the filtered list, unless a listed
        VM has just this name or id. Everything else is looked for among all VMs: it means the same
        with a filter, without one, and on the command line.

        Raises NoSuchConsole or AmbiguousConsole, with a text for the user.
        """
        if answer.isascii() and answer.isdigit():
            exact = [vm for vm in self._listed if answer in (vm.vm_id, vm.vm_name)]
            if exact:
                return by_text(exact, answer)
            number = int(answer)
            if 1 <= number <= len(self._listed):
                return self._listed[number - 1]
            raise NoSuchConsole(f"There is no {number}: choose 1 to {len(self._listed)}.")
        return by_text(self._consoles, answer)

    def _lines(self, places: Iterable[int], room: int, columns: int) -> list[str]:
        # As many as there is room for, and at least one.
        lines: list[str] = []
        for place in places:
            vm = self._listed[place]
            # It can be chosen all the same: its host knows better, and tells.
            mark = f" ({printable(vm.problem)})" if vm.problem else ""
            line = f"{place + 1}. {printable(vm.vm_name)} [{printable(vm.vm_id)}]{mark}\n"
            room -= _height(line, columns)
            if room < 0 and lines:
                break
            lines.append(line)
        return lines

    def _room(self, rows: int, columns: int) -> int:
        # Beside the prompt and the longest line that may tell where one is: that of the last page,
        # or of one before it, which has another word.
        last = len(self._listed)
        return (
            rows - 1 - max(_height(self._status(end - 1, end), columns) for end in (last - 1, last))
        )

    def _status(self, first: int, end: int) -> str:
        last = len(self._listed)
        where = f"{first + 1}-{end} of {last}"
        keys = []
        if (first, end) != (0, last):
            keys += ["Enter: more" if end < last else "Enter: top", "-: back"]
        if self._filter:
            where += f" matching {printable(self._filter, 40)}"
            keys.append("/: all")
        else:
            keys.append("/text: filter")
        return f"{where}. Which VM? {', '.join(keys)}, q: leave\n"


def _bounded(rows: int, columns: int) -> tuple[int, int]:
    return min(rows or ROWS, _MOST_ROWS), min(columns or COLUMNS, _MOST_COLUMNS)


def _height(line: str, columns: int) -> int:
    # Of a line with its end, on the screen.
    return -(-(len(line) - 1) // columns)


@implementer(IHalfCloseableProtocol, IPushProducer)
class MenuProtocol(Protocol):
    """Shows a Menu on a terminal in raw mode, and reads the answer with echo and corrections.

    Enter alone and PageDown show the next page, ``-`` and PageUp the one before, Ctrl-L the same
    again; ``/text`` filters, ``/`` no longer. ``chosen`` fires with a ConsoleInfo; with None when
    the user leaves (q, Ctrl-C, Ctrl-D, end of input, or a closed channel).

    While the client takes no output its input waits, and no page is made: a page for each key, of
    which a packet has thousands, piles up nowhere. With a ``clock`` it waits as well when answers
    that look through many VMs, as those to a text that is pasted, would hold up everybody else.
    """

    transport: ITransport

    def __init__(
        self,
        menu: Menu,
        *,
        rows: int = ROWS,
        columns: int = COLUMNS,
        clock: IReactorTime | None = None,
    ) -> None:
        self._menu = menu
        self._size = (rows, columns)
        self._clock = clock
        self._next_turn: IDelayedCall | None = None
        self._looked_at = 0
        self._page = Page()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._line = ""
        self._escape = ""
        self._waiting = bytearray()
        self._shown: list[str] = []
        self._reading = False
        self._full = False
        self._input_ended = False
        self._answer: tuple[ConsoleInfo | None] | None = None
        self.rest = b""
        """The bytes after the answer: typed ahead, for the console."""
        self.chosen: Deferred[ConsoleInfo | None] = Deferred(lambda _: self._over())

    def resized(self, rows: int, columns: int) -> None:
        """The user's screen has this size now, which counts from the next page on; 0: unknown."""
        self._size = (rows, columns)

    def connectionMade(self) -> None:
        """Show the list and ask."""
        cast(IConsumer, self.transport).registerProducer(self, True)
        self._show_page(self._menu.page(0, *self._size))

    def dataReceived(self, data: bytes) -> None:
        """The user typed."""
        self._waiting += data
        self._read()

    def readConnectionLost(self) -> None:
        """The client's input ended."""
        self._input_ended = True
        self._read()

    def writeConnectionLost(self) -> None:
        """Never comes for an ssh channel."""

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """The channel is gone."""
        self._finish(None)

    def pauseProducing(self) -> None:
        """The client takes no output."""
        self._full = True

    def resumeProducing(self) -> None:
        """The client takes output again."""
        self._full = False
        self._read()

    def stopProducing(self) -> None:
        """The client takes no output any more; the channel's end follows."""
        self._full = True

    def _read(self) -> None:
        # What is shown here may itself fill the channel, and empty it.
        if self._reading or self.chosen.called:
            return
        self._reading = True
        at = 0
        while at < len(self._waiting) and not (self._answer or self._full or self._next_turn):
            end = _ANSWERED.search(self._waiting, at, at + _PIECE)
            piece = self._waiting[at : end.end() if end else at + _PIECE]
            at += len(piece)
            for char in self._decoder.decode(piece):
                self._typed(char)
            self._flush()
            self._look_at(len(piece) * _LOOKS_A_BYTE + _LOOKS_A_PIECE)
        del self._waiting[:at]
        self._reading = False
        if self._answer is not None:
            self.rest = bytes(self._waiting)
            self._finish(*self._answer)
        elif self._waiting:
            cast(IPushProducer, self.transport).pauseProducing()
        elif self._input_ended:
            self._finish(None)
        elif at:
            cast(IPushProducer, self.transport).resumeProducing()

    def _look_at(self, count: int) -> None:
        self._looked_at += count
        late = self._looked_at > _A_TURN and self._next_turn is None
        if late and self._clock is not None:
            self._next_turn = self._clock.callLater(0, self._go_on)

    def _go_on(self) -> None:
        self._next_turn = None
        self._looked_at = 0
        self._read()

    def _typed(self, char: str) -> None:
        if self._skips(char):
            return
        if char in "\r\n":
            self._show("\n")
            answer, self._line = self._line.strip(), ""
            self._answered(answer)
        elif char in "\x03\x04":
            self._show("\n")
            self._answer = (None,)
        elif char == "\x0c":
            self._show("\n")
            self._show_page(self._menu.page(self._page.first, *self._size))
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
        # Arrow keys and their like (ESC [ ... letter, ESC O letter), most of which mean nothing.
        if char == "\x1b":
            self._escape = char
        elif not self._escape:
            return False
        elif not " " <= char <= "~":
            self._escape = ""
            return False
        elif self._escape == "\x1b":
            self._escape = self._escape + char if char in "[O" else ""
        elif "@" <= char <= "~":
            key, self._escape = self._escape + char, ""
            if key in (_PAGE_UP, _PAGE_DOWN):
                self._show("\n")
                self._turn(back=key == _PAGE_UP)
        elif len(self._escape) < len(_PAGE_UP):
            self._escape += char
        return True

    def _answered(self, answer: str) -> None:
        if answer == "q":
            self._answer = (None,)
        elif answer in ("", "-"):
            self._turn(back=answer == "-")
        else:
            self._look_at(len(self._menu))
            try:
                if answer[0] == "/":
                    self._menu = self._menu.filtered(answer[1:].strip())
                    self._show_page(self._menu.page(0, *self._size))
                else:
                    self._answer = (self._menu.choose(answer),)
            except (NoSuchConsole, AmbiguousConsole) as error:
                self._show(f"{error}\n{PROMPT}")

    def _turn(self, back: bool) -> None:
        page = (
            self._menu.page_before(self._page.first, *self._size)
            if back
            else self._menu.page(self._page.end, *self._size)
        )
        if page == self._page:
            # A list that fits is not shown again.
            self._show(PROMPT + self._line)
        else:
            self._show_page(page)

    def _show_page(self, page: Page) -> None:
        self._page = page
        self._show(page.text + PROMPT + self._line)

    def _finish(self, chosen: ConsoleInfo | None) -> None:
        if not self.chosen.called:
            self._over()
            self.chosen.callback(chosen)

    def _over(self) -> None:
        cast(IConsumer, self.transport).unregisterProducer()
        if self._next_turn is not None:
            self._next_turn.cancel()
            self._next_turn = None

    def _show(self, text: str) -> None:
        self._shown.append(text)
        if not self._reading:
            self._flush()

    def _flush(self) -> None:
        # What came together is answered together: a packet has thousands of keys.
        shown, self._shown = "".join(self._shown), []
        if shown:
            self.transport.write(shown.replace("\n", "\r\n").encode())
