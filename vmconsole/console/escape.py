"""The escape prefix: keystrokes in, data for the guest and commands for us out. Pure."""

from __future__ import annotations

from enum import Enum


class Command(Enum):
    """What a key after the escape character asks for."""

    LEAVE = "leave"
    HELP = "help"


_COMMANDS = {ord("."): Command.LEAVE, ord("?"): Command.HELP}


class EscapeScanner:
    """Splits what a user types into bytes for the guest and Commands.

    ``escape`` is the prefix's byte value; None: there is none, and all is data. Typed twice it is
    data, once. Another key that means nothing after it asks for help, and goes nowhere: what was
    typed after a prefix was not meant for the guest.
    """

    def __init__(self, escape: int | None) -> None:
        self._escape = escape
        self.pending = False
        """True while the last byte was the escape character, and its key is still to come."""

    def feed(self, data: bytes) -> list[bytes | Command]:
        """What ``data`` means, in order; however the input is split, the result is the same."""
        if self._escape is None:
            return [data] if data else []
        found: list[bytes | Command] = []
        start = 0
        while start < len(data):
            if self.pending:
                self.pending = False
                key = data[start]
                if key == self._escape:
                    found.append(data[start : start + 1])
                else:
                    found.append(_COMMANDS.get(key, Command.HELP))
                start += 1
                continue
            at = data.find(self._escape, start)
            end = len(data) if at < 0 else at
            if end > start:
                found.append(data[start:end])
            self.pending = at >= 0
            start = end + 1
        return found


def escape_name(escape: int) -> str:
    """How people write the escape character: ``^]`` for 29."""
    return f"^{chr(escape + 64)}"
