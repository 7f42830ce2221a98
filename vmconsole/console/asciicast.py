"""Recordings as asciicast v2: https://docs.asciinema.org/manual/asciicast/v2/. Pure."""

from __future__ import annotations

import codecs
import re

import msgspec

from vmconsole.text import printable

# A serial console tells no size of itself; guests assume this one.
_WIDTH, _HEIGHT = 80, 24
# JSON allows these as they are. But a line that is looked at with cat or grep must not act on the
# terminal, and some readers, Python's codecs for one, end lines at them.
_UNESCAPED = re.compile(rb"\x7f|\xc2[\x80-\x9f]|\xe2\x80[\xa8\xa9]")


class AsciicastEncoder:
    """Makes the lines of one recording, which may go on from file to file.

    Times are POSIX seconds; where the clock was set back, the recording's time goes on from where
    it was. Bytes that are no UTF-8 show as U+FFFD; a character whose bytes come apart is whole in
    the event, and in the file, of its last one.
    """

    def __init__(self, title: str) -> None:
        self._title = printable(title)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._zero = 0.0
        self._latest = 0.0

    def header(self, at: float) -> bytes:
        """The first line of a file: its events are timed from here on."""
        self._zero, self._latest = float(int(at)), at
        header = {
            "version": 2,
            "width": _WIDTH,
            "height": _HEIGHT,
            "timestamp": int(at),
            "title": self._title,
        }
        return _line(header)

    def output(self, at: float, data: bytes) -> bytes:
        """The guest printed; ``b""`` while that is no whole character."""
        return self._printed(at, self._decoder.decode(data))

    def marker(self, at: float, label: str) -> bytes:
        """Something happened that a player can jump to."""
        return _line([self.elapsed(at), "m", printable(label)])

    def end(self, at: float) -> bytes:
        """The recording ends; a character that is not complete shows as U+FFFD."""
        return self._printed(at, self._decoder.decode(b"", final=True))

    def elapsed(self, at: float) -> float:
        """Seconds from the header's timestamp to ``at``, which is now."""
        if at < self._latest:
            self._zero -= self._latest - at
        self._latest = at
        return round(at - self._zero, 6)

    def _printed(self, at: float, text: str) -> bytes:
        return _line([self.elapsed(at), "o", text]) if text else b""


def _line(value: object) -> bytes:
    return _UNESCAPED.sub(_escape, msgspec.json.encode(value)) + b"\n"


def _escape(match: re.Match[bytes]) -> bytes:
    return b"\\u%04x" % ord(match[0].decode())
