"""The escape prefix."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from vmconsole.console.escape import Command, EscapeScanner, SysRq, escape_name

PREFIX = 0x1D
# Bytes in which the prefix and its keys are frequent enough to meet; fewer commands than count.
typed = st.lists(
    st.one_of(
        st.sampled_from([b"\x1d", b"\x1ds", b"s", b"h", b".", b"?"]),
        st.binary(min_size=1, max_size=3),
    ),
    max_size=10,
).map(b"".join)
# What the user is promised.
KEYS = {
    b".": Command.LEAVE,
    b"q": Command.LEAVE,
    b"m": Command.MENU,
    b"b": Command.BREAK,
    b"w": Command.WHO,
    b"t": Command.TAKE,
    b"n": Command.KEEP,
    b"r": Command.REPLAY,
    b"z": Command.SIZE,
    b"?": Command.HELP,
}
_TOKEN = re.compile(rb"\x1ds.|\x1d[^s]|\x1ds?\Z|[^\x1d]+", re.DOTALL)


def joined(items: Iterable[bytes | Command | SysRq]) -> list[bytes | Command | SysRq]:
    """The same, with neighbouring data as one: where it was split does not matter."""
    found: list[bytes | Command | SysRq] = []
    for item in items:
        if found and isinstance(item, bytes) and isinstance(found[-1], bytes):
            found[-1] += item
        else:
            found.append(item)
    return found


def scan(scanner: EscapeScanner, pieces: list[bytes]) -> list[bytes | Command | SysRq]:
    """All results, joined."""
    return joined(item for piece in pieces for item in scanner.feed(piece))


def meant(data: bytes) -> Iterator[bytes | Command | SysRq]:
    """What all of ``data`` means, told another way."""
    for token in _TOKEN.findall(data):
        if token[0] != PREFIX:
            yield token
        elif re.fullmatch(rb"\x1ds[a-zA-Z0-9]", token):
            yield SysRq(token[2:].decode().lower())
        elif token == b"\x1d\x1d":
            yield b"\x1d"
        elif token not in (b"\x1d", b"\x1ds"):
            yield KEYS.get(token[1:], Command.HELP)


class EscapeTests(SynchronousTestCase):
    """What keys mean."""

    def test_commands(self) -> None:
        """The prefix and a key are a command, and what is around it is data."""
        scanner = EscapeScanner(PREFIX)
        self.assertEqual(
            scanner.feed(b"ab\x1d?cd\x1d."), [b"ab", Command.HELP, b"cd", Command.LEAVE]
        )

    def test_keys(self) -> None:
        """Each key that the user is told of, and what it asks for."""
        for key, command in KEYS.items():
            self.assertEqual(EscapeScanner(PREFIX).feed(b"\x1d" + key), [command])

    def test_sysrq(self) -> None:
        """``s`` takes one more key, a letter in either case or a digit; anything else asks for
        help, also the prefix."""
        scanner = EscapeScanner(PREFIX)
        for key, letter in ((b"h", "h"), (b"B", "b"), (b"0", "0"), (b"s", "s")):
            self.assertEqual(scanner.feed(b"\x1ds" + key + b"x"), [SysRq(letter), b"x"])
        for key in (b"?", b".", b"\r", b"\x1d", b"\xb2", b"\xe4"):
            self.assertEqual(scanner.feed(b"\x1ds" + key + b"x"), [Command.HELP, b"x"])

    def test_sysrq_pending(self) -> None:
        """Until that key comes the prefix is still pending."""
        scanner = EscapeScanner(PREFIX)
        self.assertEqual((scanner.feed(b"a\x1ds"), scanner.pending), ([b"a"], True))
        self.assertEqual((scanner.feed(b"h"), scanner.pending), ([SysRq("h")], False))

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

    def test_many(self) -> None:
        """Of many commands at once sixteen count, and those that leave; all data does."""
        for leave, command in ((b".", Command.LEAVE), (b"m", Command.MENU)):
            found = EscapeScanner(PREFIX).feed(b"a\x1d?" * 20 + b"\x1d" + leave + b"b")
            self.assertEqual(found, [b"a", Command.HELP] * 16 + [b"aaaa", command, b"b"])

    def test_doubled_often(self) -> None:
        """What is data stays in one piece, however often the prefix is in it."""
        self.assertEqual(EscapeScanner(PREFIX).feed(b"a\x1d\x1d" * 1000), [b"a\x1d" * 1000])

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

    @given(typed)
    def test_meaning(self, data: bytes) -> None:
        """Data and commands come in order, and each means what it is said to."""
        self.assertEqual(scan(EscapeScanner(PREFIX), [data]), joined(meant(data)))

    @given(st.binary())
    def test_everything_can_be_typed(self, data: bytes) -> None:
        """With the prefix doubled, any bytes reach the guest unchanged."""
        items = scan(EscapeScanner(PREFIX), [data.replace(b"\x1d", b"\x1d\x1d")])
        self.assertEqual(items, [data] if data else [])
