"""What a guest printed last, for who attaches later. Pure."""

from __future__ import annotations

from vmconsole.console.terminal import RESET, Sanitizer


class Scrollback:
    """The last ``limit`` bytes of a guest's output."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._kept = bytearray()
        self._cut = False

    def __len__(self) -> int:
        return len(self._kept)

    def append(self, data: bytes) -> None:
        """The guest printed; the oldest bytes are forgotten."""
        self._kept += data
        excess = len(self._kept) - self._limit
        if excess > 0:
            self._cut = True
            # At the front of a bytearray this moves no memory.
            del self._kept[:excess]

    def restart(self) -> None:
        """The guest starts afresh: the modes of the terminal that it had set count no more."""
        if self._kept:
            self.append(RESET)

    def tail(self, size: int | None = None) -> bytes:
        """The last ``size`` bytes, or all that are kept, as the guest printed them.

        For a file or a pipe; on a terminal they would act.
        """
        start = 0 if size is None else max(0, len(self._kept) - size)
        return bytes(self._kept[start:])

    def replay(self) -> tuple[bytes, Sanitizer]:
        """What to show to somebody who attaches, and what joins the output from now on to it.

        It begins with attributes reset, and, when older output was forgotten, at the start of a
        line; a Sanitizer makes it harmless. It ends as it is, without a line of its own, so that
        a prompt stays the current line, and with the attributes and modes that the guest believes
        to be on. A sequence or character that is not complete at the end is left out: the next
        output must go through the Sanitizer's ``join``, each piece, before any of it is dropped.
        ``b""``: there is nothing to show.
        """
        sanitizer = Sanitizer()
        shown = sanitizer.feed(self._from_line_start())
        return b"\x1b[m" + shown if shown else b"", sanitizer

    def _from_line_start(self) -> bytes:
        kept = bytes(self._kept)
        if not self._cut:
            return kept
        # A line end that is last begins no line. Screens that are drawn without line ends begin
        # at a sequence, so that the rest of one is not shown as text.
        line_end = kept.find(b"\n", 0, -1)
        return kept[line_end + 1 :] if line_end >= 0 else kept[max(0, kept.find(b"\x1b")) :]
