"""The bounded backlog of a slow party."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from vmconsole.console.backlog import Backlog

GAP = re.compile(rb"\r\n\x1b\[0m\[vmconsole: (\d+) bytes dropped\]\r\n")


def take_all(backlog: Backlog) -> bytes:
    """Everything, in small bites."""
    taken = b""
    while piece := backlog.take(7):
        taken += piece
    return taken


class BacklogTests(SynchronousTestCase):
    """What is kept, and what is said."""

    def test_in_order(self) -> None:
        """What fits comes out as it went in."""
        backlog = Backlog(100)
        for piece in (b"one ", b"two ", b"three"):
            backlog.append(piece)
        self.assertEqual(take_all(backlog), b"one two three")
        self.assertEqual(len(backlog), 0)

    def test_oldest_go_first(self) -> None:
        """On overflow the oldest are dropped; the gap is said, and a line begins after it."""
        backlog = Backlog(12)
        backlog.append(b"aaaa\nbbbb\ncccc\ndddd\n")
        self.assertEqual(
            take_all(backlog), b"\r\n\x1b[0m[vmconsole: 10 bytes dropped]\r\ncccc\ndddd\n"
        )

    @given(
        st.lists(st.binary(max_size=30).map(lambda b: b.replace(b"[", b"("))), st.integers(1, 50)
    )
    def test_nothing_vanishes(self, pieces: list[bytes], limit: int) -> None:
        """Never more than the limit is held, and each byte is either shown or counted."""
        backlog = Backlog(limit)
        for piece in pieces:
            backlog.append(piece)
            self.assertLessEqual(len(backlog), limit)
        taken = take_all(backlog)
        dropped = sum(int(count) for count in GAP.findall(taken))
        shown = GAP.sub(b"", taken)
        whole = b"".join(pieces)
        self.assertEqual(dropped + len(shown), len(whole))
        self.assertTrue(whole.endswith(shown))
