"""The escape prefix."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from vmconsole.console.escape import Command, EscapeScanner, escape_name

PREFIX = 0x1D
# Bytes in which the prefix and its keys are frequent enough to meet.
typed = st.lists(
    st.one_of(st.sampled_from([b"\x1d", b".", b"?"]), st.binary(min_size=1, max_size=3))
).map(b"".join)


def scan(scanner: EscapeScanner, pieces: list[bytes]) -> list[bytes | Command]:
    """All results, with neighbouring data joined: where it was split does not matter."""
    joined: list[bytes | Command] = []
    for piece in pieces:
        for item in scanner.feed(piece):
            if joined and isinstance(item, bytes) and isinstance(joined[-1], bytes):
                joined[-1] += item
            else:
                joined.append(item)
    return joined


class EscapeTests(SynchronousTestCase):
    """What keys mean."""

    def test_commands(self) -> None:
        """The prefix and a key are a command, and what is around it is data."""
        scanner = EscapeScanner(PREFIX)
        self.assertEqual(
            scanner.feed(b"ab\x1d?cd\x1d."), [b"ab", Command.HELP, b"cd", Command.LEAVE]
        )

    def test_doubled(self) -> None:
        """The prefix typed twice is the prefix, once."""
        self.assertEqual(scan(EscapeScanner(PREFIX), [b"a\x1d\x1db"]), [b"a\x1db"])

    def test_unknown_key(self) -> None:
        """A key without a meaning asks for help, and is not typed into the guest."""
        self.assertEqual(EscapeScanner(PREFIX).feed(b"\x1dX"), [Command.HELP])

    def test_pending(self) -> None:
        """A lone prefix is known as such until its key comes."""
        scanner = EscapeScanner(PREFIX)
        self.assertEqual(scanner.feed(b"\x1d"), [])
        self.assertTrue(scanner.pending)
        self.assertEqual(scanner.feed(b"."), [Command.LEAVE])
        self.assertFalse(scanner.pending)

    def test_none(self) -> None:
        """Without a prefix every byte is data."""
        self.assertEqual(EscapeScanner(None).feed(bytes(range(256))), [bytes(range(256))])

    def test_name(self) -> None:
        """The prefix is written the way people do."""
        self.assertEqual((escape_name(0x1D), escape_name(1)), ("^]", "^A"))

    @given(typed, st.lists(st.integers(0, 40)))
    def test_splits(self, data: bytes, cuts: list[int]) -> None:
        """However the input is split, it means the same."""
        ends = sorted({min(cut, len(data)) for cut in cuts} | {0, len(data)})
        pieces = [data[a:b] for a, b in pairwise(ends)]
        self.assertEqual(scan(EscapeScanner(PREFIX), pieces), scan(EscapeScanner(PREFIX), [data]))

    @given(st.binary())
    def test_everything_can_be_typed(self, data: bytes) -> None:
        """With the prefix doubled, any bytes reach the guest unchanged."""
        items = scan(EscapeScanner(PREFIX), [data.replace(b"\x1d", b"\x1d\x1d")])
        self.assertEqual(items, [data] if data else [])
