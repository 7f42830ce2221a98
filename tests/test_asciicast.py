"""The lines of a recording."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from vmconsole.console.asciicast import AsciicastEncoder

START = 1_700_000_000.25
# Bytes in which characters, whole, cut and wrong, are frequent.
printed = st.lists(
    st.one_of(
        st.text(max_size=4).map(str.encode),
        st.sampled_from([b"\xe2", b"\xe2\x94", b"\xf0\x9f\x98", b"\xff", b"\xed\xa0\x80", b"\x80"]),
        st.binary(max_size=4),
    )
).map(b"".join)


def begun(title: str = "vm") -> AsciicastEncoder:
    """An encoder whose file began at START."""
    encoder = AsciicastEncoder(title)
    encoder.header(START)
    return encoder


def text(lines: bytes) -> str:
    """What they print."""
    return "".join(event[2] for event in map(json.loads, lines.splitlines()) if event[1] == "o")


class AsciicastTests(SynchronousTestCase):
    """AsciicastEncoder."""

    def test_header(self) -> None:
        """The first line has what asciicast v2 asks for, and the name of the VM."""
        line = AsciicastEncoder("web1").header(START)
        self.assertEqual(
            json.loads(line),
            {
                "version": 2,
                "width": 80,
                "height": 24,
                "timestamp": 1_700_000_000,
                "title": "web1",
            },
        )
        self.assertEqual(line.count(b"\n"), 1)
        self.assertIsInstance(json.loads(line)["timestamp"], int)

    def test_events(self) -> None:
        """Output and markers, in seconds since the header's timestamp."""
        encoder = begun()
        lines = encoder.output(START + 1, b"login: ") + encoder.marker(
            START + 2.5, "alice attached"
        )
        self.assertEqual(lines, b'[1.25,"o","login: "]\n[2.75,"m","alice attached"]\n')

    def test_next_file(self) -> None:
        """Another file counts from its own header."""
        encoder = begun()
        encoder.output(START + 99, b"x")
        encoder.header(START + 100)
        self.assertEqual(encoder.output(START + 101, b"y"), b'[1.25,"o","y"]\n')

    @given(st.lists(st.floats(-1e4, 1e4), min_size=1))
    def test_never_back(self, times: list[float]) -> None:
        """However the clock is set, times never go backwards; and they go on while it does."""
        encoder = begun()
        elapsed, latest = 0.25, START
        for moment in times:
            now = encoder.elapsed(START + moment)
            self.assertAlmostEqual(now, elapsed + max(0, START + moment - latest), 4)
            self.assertGreaterEqual(now, elapsed)
            elapsed, latest = now, START + moment

    def test_precision(self) -> None:
        """Times have no more digits than microseconds need."""
        self.assertEqual(begun().output(START + 1 / 3, b"x"), b'[0.583333,"o","x"]\n')

    @given(printed, st.lists(st.integers(0, 40)), st.sets(st.integers(0, 10)))
    def test_splits(self, data: bytes, cuts: list[int], files: set[int]) -> None:
        """However the output is split, also over files, it is the same text in total."""
        ends = sorted({min(cut, len(data)) for cut in cuts} | {0, len(data)})
        encoder = begun()
        lines = b""
        for number, (a, b) in enumerate(pairwise(ends)):
            if number in files:
                encoder.header(START)
            lines += encoder.output(START, data[a:b])
        lines += encoder.end(START)
        self.assertEqual(text(lines), data.decode("utf-8", "replace"))

    def test_split_character(self) -> None:
        """A character is in the event of its last byte, and no event is empty."""
        encoder = begun()
        self.assertEqual(encoder.output(START, b"\xe2\x94"), b"")
        encoder.header(START)
        self.assertEqual(text(encoder.output(START, b"\x9c$")), "├$")
        self.assertEqual(encoder.end(START), b"")

    def test_cut_character(self) -> None:
        """One that is never completed is shown as such, at the end."""
        encoder = begun()
        encoder.output(START, b"\xe2\x94")
        self.assertEqual(text(encoder.end(START)), "\N{REPLACEMENT CHARACTER}")

    @given(st.text(st.characters(exclude_categories=["Cs"]), max_size=50))
    @example("\x00\x1b\x7f\x80\x85\x9b\x9f\xa0\u2028\u2029\r\n")
    def test_harmless_lines(self, output: str) -> None:
        """Whatever is printed is read back as it was; and in the file it is one line, for every
        reader, that does nothing to a terminal."""
        line = begun().output(START, output.encode())
        self.assertEqual(text(line), output)
        shown = line.decode().removesuffix("\n")
        self.assertLessEqual(len(shown.splitlines()), 1)
        for char in shown:
            self.assertFalse(char < " " or "\x7f" <= char <= "\x9f", ascii(shown))

    def test_hostile_names(self) -> None:
        """A title or label from outside is escaped, and may be any string at all."""
        for hostile in ("\x1b]0;x\x07", "\ud800", '"\n[0,"o","x"]', "\u202e"):
            encoder = AsciicastEncoder(hostile)
            values: list[Any] = [json.loads(encoder.header(START))["title"]]
            values.append(json.loads(encoder.marker(START, hostile))[2])
            for value in values:
                self.assertTrue(value.isprintable(), ascii(value))
