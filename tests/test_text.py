"""Text from outside."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from vmconsole.text import ago, printable, printable_bytes


class PrintableTests(SynchronousTestCase):
    """Nothing in it can act."""

    def test_visible_text_stays(self) -> None:
        """Letters of any script, and plain spaces, stay as they are."""
        self.assertEqual(printable("web 1 - Schrödinger 猫"), "web 1 - Schrödinger 猫")

    def test_what_acts_is_escaped(self) -> None:
        """Control characters, escape sequences, line separators, overrides, backslashes."""
        self.assertEqual(printable("a\x1b[2J\n\u2028\u202e\\"), "a\\x1b[2J\\n\\u2028\\u202e\\\\")

    def test_long(self) -> None:
        """Long text is cut, visibly."""
        self.assertEqual(printable("x" * 300, 10), "xxxxxxxxxx...")

    def test_bytes(self) -> None:
        """Bytes that are no UTF-8 are escaped, too."""
        self.assertEqual(printable_bytes(b"\xff\x1bok\xc3\xa9"), "\\xff\\x1bok\u00e9")

    @given(st.text())
    def test_always_printable(self, text: str) -> None:
        """Whatever it is, the result is printable."""
        self.assertTrue(printable(text).isprintable())

    @given(st.binary())
    def test_bytes_always_printable(self, data: bytes) -> None:
        """Whatever it is, the result is printable."""
        self.assertTrue(printable_bytes(data).isprintable())


class AgoTests(SynchronousTestCase):
    """How long ago something was."""

    def test_words(self) -> None:
        """In whole seconds, minutes, hours or days that have passed, from two of them on; a clock
        that was set back shows no negative number."""
        for seconds, words in (
            (-5, "0 seconds ago"),
            (0, "0 seconds ago"),
            (1, "1 second ago"),
            (1.9, "1 second ago"),
            (119, "119 seconds ago"),
            (120, "2 minutes ago"),
            (7199, "119 minutes ago"),
            (7200, "2 hours ago"),
            (172799, "47 hours ago"),
            (172800, "2 days ago"),
            (86400 * 365, "365 days ago"),
        ):
            self.assertEqual(ago(seconds), words)
