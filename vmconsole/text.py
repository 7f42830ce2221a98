"""Text from outside, made safe to show on a terminal or to log."""

from __future__ import annotations


def printable(text: str, limit: int = 256) -> str:
    """``text`` with everything but visible characters and plain spaces escaped as Python does.

    Control characters, escape sequences, line separators and bidirectional overrides cannot act
    on the terminal, nor forge a log line. Longer than ``limit`` characters, it ends with ``...``.
    """
    cut = text if len(text) <= limit else text[:limit] + "..."
    if cut.isprintable() and "\\" not in cut:
        return cut
    return "".join(
        char if char.isprintable() and char != "\\" else char.encode("unicode_escape").decode()
        for char in cut
    )


def printable_bytes(data: bytes, limit: int = 256) -> str:
    """Like printable, for bytes of unknown encoding: what is no UTF-8 shows as ``\\xNN``."""
    # A backslash is escaped by printable, so the two kinds of escape cannot be confused.
    pieces = []
    for piece in data[: limit + 1].decode("utf-8", "surrogateescape"):
        if "\udc80" <= piece <= "\udcff":
            pieces.append(f"\\x{ord(piece) - 0xDC00:02x}")
        else:
            pieces.append(printable(piece))
    return "".join(pieces[:limit]) + ("..." if len(data) > limit else "")


def lasting(seconds: float) -> str:
    """How long something takes, in words: ``2 minutes``."""
    count, unit = max(0, int(seconds)), "second"
    for size, larger in ((60, "minute"), (60, "hour"), (24, "day")):
        if count < 2 * size:
            break
        count, unit = count // size, larger
    return f"{count} {unit}{'' if count == 1 else 's'}"


def ago(seconds: float) -> str:
    """How long ago something was, in words: ``2 minutes ago``."""
    return f"{lasting(seconds)} ago"
