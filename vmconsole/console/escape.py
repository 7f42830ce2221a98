"""The escape prefix: keystrokes in, data for the guest and commands for us out. Pure."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple


class Command(Enum):
    """What a key after the escape character asks for."""

    LEAVE = "leave"
    MENU = "menu"
    BREAK = "break"
    SYSRQ = "sysrq"
    WHO = "who"
    TAKE = "take"
    KEEP = "keep"
    REPLAY = "replay"
    SIZE = "size"
    HELP = "help"


class SysRq(NamedTuple):
    """SysRq, with the key that follows it."""

    key: str


_COMMANDS = {
    ord("."): Command.LEAVE,
    ord("q"): Command.LEAVE,
    ord("m"): Command.MENU,
    ord("b"): Command.BREAK,
    ord("w"): Command.WHO,
    ord("t"): Command.TAKE,
    ord("n"): Command.KEEP,
    ord("r"): Command.REPLAY,
    ord("z"): Command.SIZE,
    ord("?"): Command.HELP,
}
_SYSRQ = ord("s")
_LEAVING = (Command.LEAVE, Command.MENU)
# Nobody types so many at once, and each may take some of everybody's time.
_MOST_COMMANDS = 16


class EscapeScanner:
    """Splits what a user types into bytes for the guest and Commands.

    ``escape`` is the prefix's byte value; None: there is none, and all is data. Typed twice it is
    data, once. ``s`` takes one more key, a letter or a digit. A key that means nothing after the
    prefix asks for help, and goes nowhere: what was typed after it was not meant for the guest.
    """

    def __init__(self, escape: int | None) -> None:
        self._escape = escape
        self.pending = False
        """True while a prefix is typed, and its key is still to come."""
        self._sysrq = False

    def feed(self, data: bytes) -> list[bytes | Command | SysRq]:
        """What ``data`` means, in order. However the input is split, the result is the same, as
        long as there are few commands in it: of more the first sixteen count, and those that
        leave."""
        if self._escape is None:
            return [data] if data else []
        found: list[bytes | Command | SysRq] = []
        typed = bytearray()
        commands = start = 0
        while start < len(data):
            if not self.pending:
                at = data.find(self._escape, start)
                end = len(data) if at < 0 else at
                typed += data[start:end]
                self.pending = at >= 0
                start = end + 1
                continue
            meant = self._key(data[start])
            start += 1
            if isinstance(meant, bytes):
                typed += meant
            elif meant is not None:
                commands += 1
                if commands <= _MOST_COMMANDS or meant in _LEAVING:
                    if typed:
                        found.append(bytes(typed))
                        typed.clear()
                    found.append(meant)
        if typed:
            found.append(bytes(typed))
        return found

    def _key(self, key: int) -> bytes | Command | SysRq | None:
        if not self._sysrq and key == _SYSRQ:
            self._sysrq = True
            return None
        self.pending = False
        if self._sysrq:
            self._sysrq = False
            letter = chr(key).lower()
            known = letter.isascii() and letter.isalnum()
            return SysRq(letter) if known else Command.HELP
        if key == self._escape:
            return bytes([key])
        return _COMMANDS.get(key, Command.HELP)


def escape_name(escape: int) -> str:
    """How people write the escape character: ``^]`` for 29."""
    return f"^{chr(escape + 64)}"
