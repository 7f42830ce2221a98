"""What a guest printed last, and how it is shown."""

from __future__ import annotations

import tracemalloc

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from tests.test_terminal import hostile, queries
from vmconsole.console.scrollback import Scrollback


def printed(limit: int, *pieces: bytes) -> Scrollback:
    """A scrollback of what a guest printed."""
    scrollback = Scrollback(limit)
    for piece in pieces:
        scrollback.append(piece)
    return scrollback


class KeepTests(SynchronousTestCase):
    """What is kept."""

    @given(st.lists(st.binary(max_size=30)), st.integers(0, 50), st.integers(0, 60))
    def test_last(self, pieces: list[bytes], limit: int, size: int) -> None:
        """The last bytes, as they were, and never more than the limit."""
        scrollback = Scrollback(limit)
        whole = b""
        for piece in pieces:
            scrollback.append(piece)
            whole += piece
            kept = whole[max(0, len(whole) - limit) :]
            self.assertEqual(len(scrollback), len(kept))
            self.assertEqual(scrollback.tail(), kept)
            self.assertEqual(scrollback.tail(size), kept[max(0, len(kept) - size) :])

    def test_tail(self) -> None:
        """So many bytes, none at all, or all that is kept."""
        scrollback = printed(6, b"0123", b"4567")
        self.assertEqual(scrollback.tail(2), b"67")
        self.assertEqual(scrollback.tail(0), b"")
        self.assertEqual(scrollback.tail(99), b"234567")
        self.assertEqual(scrollback.tail(), b"234567")

    def test_memory(self) -> None:
        """Whatever the pieces are, it takes the memory of its limit, and little more."""
        for size in (1, 3, 4096, 1 << 20):
            piece = bytes(size)
            tracemalloc.start()
            try:
                scrollback = printed(65536)
                for _ in range((1 << 20) // size):
                    scrollback.append(piece)
                now, peak = tracemalloc.get_traced_memory()
            finally:
                tracemalloc.stop()
            self.assertLess(now, 65536 * 1.3)
            self.assertLess(peak, 65536 * 2.6 + size * 1.3)


class ReplayTests(SynchronousTestCase):
    """What is shown to somebody who attaches."""

    def shown(self, scrollback: Scrollback) -> bytes:
        """The replay, without what it begins with."""
        replay, _ = scrollback.replay()
        self.assertTrue(replay.startswith(b"\x1b[m"), replay)
        return replay[3:]

    def test_whole(self) -> None:
        """While nothing was forgotten, all is shown, and a prompt stays the current line."""
        self.assertEqual(self.shown(printed(100, b"half\r\nlog", b"in: ")), b"half\r\nlogin: ")

    def test_line_start(self) -> None:
        """When older output was forgotten, it begins with a line."""
        self.assertEqual(self.shown(printed(12, b"aaaa\r\nbbbb\r\n", b"cccc$ ")), b"cccc$ ")
        self.assertEqual(self.shown(printed(4, b"a\nbc\n")), b"bc\n")

    def test_no_line_start(self) -> None:
        """Without one it begins with a sequence, and without that where it has to."""
        self.assertEqual(self.shown(printed(14, b"\x1b[31;1Hab\x1b[2;2Hcd\n")), b"\x1b[2;2Hcd\n")
        self.assertEqual(self.shown(printed(4, b"abcdefg\n")), b"efg\n")

    def test_nothing(self) -> None:
        """When there is nothing to show, nothing is, not even a reset."""
        for scrollback in (printed(100), printed(0, b"text"), printed(100, b"\x07\x1b[6n")):
            replay, sanitizer = scrollback.replay()
            self.assertEqual(replay, b"")
            self.assertEqual(sanitizer.join(b"\x1b[6n"), b"\x1b[6n")

    def test_joined(self) -> None:
        """What is not complete yet is shown when it is, and never twice."""
        scrollback = printed(100, b"a\x1b[3", b"1mb\xe2\x94")
        replay, sanitizer = scrollback.replay()
        self.assertEqual(replay, b"\x1b[ma\x1b[31mb")
        scrollback.append(b"\x9c$ ")
        self.assertEqual(sanitizer.join(b"\x9c$ "), "├$ ".encode())
        self.assertEqual(scrollback.replay()[0], "\x1b[ma\x1b[31mb├$ ".encode())

    def test_same_again(self) -> None:
        """To look at it changes nothing."""
        scrollback = printed(20, b"aaaa\nbbbb\ncccc\ndddd\neeee\n")
        self.assertEqual(scrollback.replay()[0], scrollback.replay()[0])
        self.assertEqual(len(scrollback), 20)

    @given(st.lists(hostile, max_size=4), st.integers(0, 200))
    def test_no_queries(self, pieces: list[bytes], limit: int) -> None:
        """Wherever it was cut off, no replay makes a terminal answer."""
        self.assertEqual(queries(printed(limit, *pieces).replay()[0]), [])
