"""Terminal output that is shown again, and the way back to a sane terminal."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from vmconsole.console.terminal import RESET, Sanitizer

# --- A recogniser of what terminals answer, which shares nothing with the Sanitizer.

# RFC 3629, section 4; the C1 controls among the characters are taken for what they are before.
_CHARACTER = re.compile(
    rb"[\xc2-\xdf][\x80-\xbf]|\xe0[\xa0-\xbf][\x80-\xbf]|[\xe1-\xec\xee\xef][\x80-\xbf]{2}"
    rb"|\xed[\x80-\x9f][\x80-\xbf]|\xf0[\x90-\xbf][\x80-\xbf]{2}|[\xf1-\xf3][\x80-\xbf]{3}"
    rb"|\xf4[\x80-\x8f][\x80-\xbf]{2}"
)
_C1_CHARACTER = re.compile(rb"\xc2[\x80-\x9f]")
# Controls inside of a sequence do not end it, but for CAN, SUB and ESC.
_CONTROLS = rb"[\x00-\x17\x19\x1c-\x1f\x7f]*"
_ESC = rb"\x1b" + _CONTROLS
_CSI = rb"(?:" + _ESC + rb"\[|\x9b)"
_INSIDE = rb"[\x00-\x17\x19\x1c-\x3f\x7f]*"
_QUERY = re.compile(
    rb"\x05|\x9a|" + _ESC + rb"Z"
    # Reports, attributes, parameters, windows, printing, the mouse.
    rb"|" + _CSI + _INSIDE + rb"[ncxtiy]"
    rb"|" + _CSI + rb"\d+;" + _INSIDE + rb"T"
    rb"|" + _CSI + _INSIDE + rb"[$*+#\"'&,]" + _INSIDE + rb"[@-~]"
    # XTVERSION, the kitty keyboard, modifyOtherKeys: all with a mark of their own.
    rb"|" + _CSI + _CONTROLS + rb"[<=>]" + _INSIDE + rb"[@-~]"
    rb"|" + _CSI + _CONTROLS + rb"\?" + _INSIDE + rb"[^\x00-\x3f\x7fhl]"
    rb"|"
    + _CSI
    + _INSIDE
    + rb"(?<!\d)(?:9|100\d|101\d|2026|2031|2048|5522)(?!\d)"
    + _INSIDE
    + rb"h"
    # Control strings.
    rb"|" + _ESC + rb"[PX\]^_k]|[\x90\x98\x9d\x9e\x9f]"
)


def queries(data: bytes) -> list[bytes]:
    """What in ``data`` some terminal answers, whether it knows UTF-8, 8-bit controls or both."""
    seen = _CHARACTER.sub(
        lambda found: found[0][1:] if _C1_CHARACTER.fullmatch(found[0]) else b"_", data
    )
    return [found[0] for found in _QUERY.finditer(seen)]


# What terminals answer, by xterm's ctlseqs; and the reports of others.
QUERIES = [
    *(b"\x05", b"\x1bZ"),
    *(b"\x1b[c", b"\x1b[0c", b"\x1b[>c", b"\x1b[>0c", b"\x1b[=c"),
    *(b"\x1b[5n", b"\x1b[6n", b"\x1b[?6n", b"\x1b[?15n", b"\x1b[?25n", b"\x1b[?26n"),
    *(b"\x1b[?53n", b"\x1b[?55n", b"\x1b[?62n", b"\x1b[?996n", b"\x1b[>4n"),
    *(b"\x1b[x", b"\x1b[1x", b"\x1b[4$p", b"\x1b[?2026$p", b"\x1b[1$w", b"\x1b[1;1;1;1;2;2*y"),
    *(b"\x1b[?u", b"\x1b[>1u", b"\x1b[<u", b"\x1b[=5;1u", b"\x1b[>q", b"\x1b[>0q", b"\x1b[?4m"),
    *(b"\x1b[11t", b"\x1b[13t", b"\x1b[14;2t", b"\x1b[18t", b"\x1b[19t", b"\x1b[20t", b"\x1b[21t"),
    *(b"\x1b[?1;1;0S", b"\x1b[#S", b"\x1b[1'|", b"\x1b[1;2'z", b"\x1b[i", b"\x1b[?1i"),
    *(b"\x1b[?1004h", b"\x1b[?2048h", b"\x1b[?1003h", b"\x1b[1;1;1;1;1T"),
    *(b"\x1b]10;?\x07", b"\x1b]11;?\x1b\\", b"\x1b]12;?\x07", b"\x1b]4;1;?\x07"),
    *(b"\x1b]52;c;?\x07", b"\x1b]52;c;aGk=\x1b\\", b"\x1b]21;foreground=?\x1b\\"),
    *(b"\x1bP$qm\x1b\\", b"\x1bP+q544e\x1b\\", b"\x1b_Gi=31,a=q;AAAA\x1b\\", b"\x1b^x\x1b\\"),
    *(b"\x1bXx\x1b\\", b"\x1bP0;0;0q#0;2;0;0;0~~\x1b\\"),
]
# What draws.
DRAWN = [
    *(b"\x1b[m", b"\x1b[0m", b"\x1b[1;31;48;5;200m", b"\x1b[38:2::1:2:3m", b"\x1b[4:3m"),
    *(b"\x1b[%c" % final for final in b"@ABCDEFGHIJKLMPSTXZ`abdefrsu"),
    *(b"\x1b[5;10H", b"\x1b[2J", b"\x1b[1K", b"\x1b[2;23r", b"\x1b[3T", b"\x1b[!p"),
    *(b"\x1b7", b"\x1b8", b"\x1bD", b"\x1bE", b"\x1bM", b"\x1b=", b"\x1b>"),
    *(b"\x1b(0", b"\x1b(B", b"\x1b)0", b"\x1b)B", b"\x0e", b"\x0f"),
    *(b"\x1b[4h", b"\x1b[4l", b"\x1b[?1h", b"\x1b[?1l", b"\x1b[?25l", b"\x1b[?25h"),
    *(b"\x1b[?2004h", b"\x1b[?2004l", b"\x1b[?1048h", b"\x1b[?1048l"),
]
ALTERNATE = [b"\x1b[?%d%c" % (mode, kind) for mode in (47, 1047, 1049) for kind in b"hl"]

# Fragments that meet to become queries, if what stood between them is taken away.
hostile = st.lists(
    st.one_of(
        st.sampled_from([*QUERIES, *DRAWN, *ALTERNATE]),
        st.sampled_from(
            [
                *(b"\x1b", b"\x1b[", b"[", b"?", b">", b"=", b"<", b"$", b"6", b";", b"1004"),
                *(b"n", b"c", b"x", b"t", b"u", b"p", b"q", b"h", b"l", b"m", b"Z", b"\\"),
                *(b"P", b"]", b"_", b"^", b"X", b"k", b"(", b" ", b"\x1b]11;?", b"\x1bP$q"),
                *(b"\x07", b"\x18", b"\x1a", b"\n", b"\r", b"\x00", b"\x7f", b"0;" * 70),
                *(b"\x9b", b"\x90", b"\x9d", b"\x9c", b"\x9a", b"\x85", b"\xc2", b"\xc2\x9b"),
                *(b"\xe2", b"\x94", b"\xe2\x94", b"\xf0\x9f", b"\xa0", b"\xe9", b"\xc0\x9b"),
                *("├".encode(), "雛".encode(), "é".encode(), b"\x1bc", b"text"),
            ]
        ),
        st.binary(min_size=1, max_size=4),
    ),
    max_size=30,
).map(b"".join)
cuts = st.lists(st.integers(0, 120), max_size=8)
# All that has a picture, in any writing.
pictured = st.lists(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cc", "Cs"])).map(str.encode),
        st.sampled_from([b"\r\n", b"\t", b"\b", *DRAWN]),
    )
).map(b"".join)


def split(data: bytes, cuts: Iterable[int]) -> list[bytes]:
    """``data`` in pieces."""
    ends = sorted({min(cut, len(data)) for cut in cuts} | {0, len(data)})
    return [data[a:b] for a, b in pairwise(ends)]


def sanitized(*pieces: bytes) -> bytes:
    """What a new Sanitizer returns for it."""
    sanitizer = Sanitizer()
    return b"".join(sanitizer.feed(piece) for piece in pieces)


class RecogniserTests(SynchronousTestCase):
    """The recogniser of these tests, without which they would say nothing."""

    def test_recognises(self) -> None:
        """It finds each query, in each of the three ways to write it."""
        for query in QUERIES:
            self.assertTrue(queries(b"text" + query), query)
            if query[0] == 0x1B:
                c1 = bytes([query[1] + 0x40])
                self.assertTrue(queries(b"text" + c1 + query[2:]), query)
                self.assertTrue(queries(b"text\xc2" + c1 + query[2:]), query)

    def test_controls_inside(self) -> None:
        """It finds one with controls inside, which terminals obey on their way."""
        self.assertTrue(queries(b"\x1b[\n6\x07n"))
        self.assertFalse(queries(b"\x1b[\x186n"))

    def test_no_others(self) -> None:
        """It finds none in what draws, nor in characters whose bytes look like controls."""
        self.assertEqual(queries(b"".join(DRAWN) + "plain ├雛6n".encode()), [])


class SanitizerTests(SynchronousTestCase):
    """What stays, and what goes."""

    def test_queries(self) -> None:
        """A query leaves nothing behind."""
        for query in QUERIES:
            self.assertEqual(sanitized(b"a" + query + b"b"), b"ab", query)

    def test_drawing(self) -> None:
        """What draws stays as it is."""
        for sequence in DRAWN:
            self.assertEqual(sanitized(sequence + b"x"), sequence + b"x", sequence)

    def test_beyond_the_screen(self) -> None:
        """What acts outside of the screen, or would outlast it, goes."""
        for sequence in (
            *(b"\x07", b"\x00", b"\x11", b"\x13", b"\x7f", b"\x18", b"\x1a"),
            *(b"\x1b]0;title\x07", b"\x1b]2;title\x1b\\", b"\x1bktitle\x1b\\", b"\x1b]8;;x\x07"),
            *(b"\x1b[3J", b"\x1b[03J", b"\x1b[0;3J", b"\x1b[8;50;132t", b"\x1b[5i", b"\x1b[3g"),
            *(b"\x1bH", b"\x1b#8", b"\x1b%@", b"\x1b F", b"\x1b(K", b"\x1bn", b"\x1b\\"),
            *(b"\x1b[2h", b"\x1b[12l", b"\x1b[20h", b"\x1b[?7l", b"\x1b[?3h", b"\x1b[?5h"),
            *(b"\x1b[2 q", b"\x1b[>4;2m", b"\x1b[1;1s", b"\x1b[?1J", b"\x1b[4:3H", b"\x1b[h"),
        ):
            self.assertEqual(sanitized(b"a" + sequence + b"b"), b"ab", sequence)

    def test_modes_together(self) -> None:
        """Of modes that are set together, the harmless ones stay."""
        self.assertEqual(sanitized(b"\x1b[?1;1000;0025;;7h"), b"\x1b[?1h\x1b[?25h")
        self.assertEqual(sanitized(b"\x1b[2;4;20l"), b"\x1b[4l")

    def test_alternate_screen(self) -> None:
        """It is left only when it was entered: else leaving it would move the cursor."""
        for on, off in pairwise(ALTERNATE):
            if on.endswith(b"h"):
                both = b"a" + on + b"b" + off + b"c"
                self.assertEqual(sanitized(b"x" + off + both + off), b"x" + both)

    def test_hard_reset(self) -> None:
        """It becomes a soft one and an empty screen."""
        empty = b"\x1b[!p\x1b[H\x1b[2J"
        self.assertEqual(sanitized(b"a\x1bcb"), b"a" + empty + b"b")
        self.assertEqual(sanitized(b"\x1b[?1049h\x1bc"), b"\x1b[?1049h\x1b[?1049l" + empty)

    def test_c1(self) -> None:
        """A C1 control goes, as a byte and as a character; a byte of another character stays."""
        text = "├ 雛 é \U0001f6db".encode()
        self.assertEqual(sanitized(b"\x9b" + text + b"\xc2\x9b\x85\xc2\x90."), text + b".")
        self.assertEqual(sanitized(b"\xc0\x9b[6n"), b"\xc0[6n")

    def test_latin_1(self) -> None:
        """Other bytes that are no UTF-8 stay."""
        self.assertEqual(sanitized(b"\xe9t\xe9 \xff\xa0"), b"\xe9t\xe9 \xff\xa0")

    def test_spliced(self) -> None:
        """What stood around something that went does not join."""
        self.assertEqual(sanitized(b"\x1b[\x1b[6n6n"), b"6n")
        self.assertEqual(sanitized(b"\x1b\x1b]0;x\x07[6n"), b"[6n")
        self.assertEqual(sanitized(b"\xc2\x1b[6n\x9b6n"), b"\xc26n")

    def test_control_inside(self) -> None:
        """A control inside acts before the sequence; CAN, SUB, ESC and characters above end it."""
        self.assertEqual(sanitized(b"\x1b\n[3\r\x07\x7f1m"), b"\n\r\x1b[31m")
        self.assertEqual(sanitized(b"\x1b[3\x181m\x1b[3\x1a1m"), b"1m1m")
        self.assertEqual(sanitized(b"\x1b[3\x1b[1m"), b"\x1b[1m")
        self.assertEqual(sanitized("\x1b[3é1m".encode()), "é1m".encode())

    def test_strings_end(self) -> None:
        """A control string ends as terminals end it, and with its line at the latest."""
        for end in (b"\x07", b"\x1b\\", b"\x18", b"\x1a"):
            self.assertEqual(sanitized(b"a\x1b]0;t\t\xc2\x9b" + end + b"b"), b"ab", end)
        self.assertEqual(sanitized(b"a\x1bPt\nb\x1b]R\rc"), b"a\nb\rc")
        self.assertEqual(sanitized(b"a\x1b]0;t\x1b[1mb"), b"a\x1b[1mb")

    def test_bounded(self) -> None:
        """Of something that does not end, little is kept, and what follows is shown."""
        for begin in (b"\x1b[", b"\x1b ", b"\x1b]"):
            sanitizer = Sanitizer()
            sanitizer.feed(begin)
            for _ in range(100):
                self.assertEqual(sanitizer.feed(b"!" * 1000), b"")
                held = [held for held in vars(sanitizer).values() if isinstance(held, str)]
                self.assertLess(sum(map(len, held)), 200)
            self.assertEqual(sanitizer.feed(b"m\nb")[-2:], b"\nb")
        for cut in (2, 150, 999):
            sequence = b"\x1b[" + b"0" * 1000 + b"m"
            self.assertEqual(sanitized(sequence[:cut], sequence[cut:] + b"b"), b"b")

    @given(hostile, cuts)
    def test_splits(self, data: bytes, cuts: list[int]) -> None:
        """However the input is split, the result is the same."""
        self.assertEqual(sanitized(*split(data, cuts)), sanitized(data))

    @given(hostile)
    def test_bytewise(self, data: bytes) -> None:
        """Nor does it matter if each byte comes alone."""
        self.assertEqual(sanitized(*split(data, range(len(data)))), sanitized(data))

    @given(hostile)
    def test_no_queries(self, data: bytes) -> None:
        """Nothing is left that a terminal answers."""
        self.assertEqual(queries(sanitized(data)), [])

    @given(st.binary(max_size=500))
    def test_no_queries_in_noise(self, data: bytes) -> None:
        """Nor in arbitrary bytes."""
        self.assertEqual(queries(sanitized(data)), [])

    @given(hostile, hostile)
    def test_nothing_open(self, data: bytes, rest: bytes) -> None:
        """What is shown after it means what it means alone: no sequence is left open."""
        self.assertLessEqual(len(queries(sanitized(data) + rest)), len(queries(rest)))
        self.assertEqual(queries(sanitized(data) + b"6n"), [])
        self.assertEqual(queries(sanitized(data) + b"[6n"), [])

    @given(hostile)
    def test_twice(self, data: bytes) -> None:
        """Done twice it changes nothing more."""
        # The end of the line, since a byte that could begin a character waits for the next.
        once = sanitized(data + b"\n")
        self.assertEqual(sanitized(once), once)

    @given(pictured)
    def test_pictures(self, data: bytes) -> None:
        """Text in any writing, colours and drawing pass unchanged."""
        self.assertEqual(sanitized(data), data)


class JoinTests(SynchronousTestCase):
    """Where what is shown again meets what the guest prints now."""

    def test_untouched(self) -> None:
        """After a complete end, queries and all else pass: the guest wants an answer now."""
        sanitizer = Sanitizer()
        sanitizer.feed(b"$ ")
        live = b"\x1b[6n\x07\x9b\xff\x1b]0;title\x07\x1b["
        self.assertEqual(sanitizer.join(live), live)

    def test_rest_of_sequence(self) -> None:
        """The rest of a sequence completes it, or goes the way of its beginning."""
        for begun, live, joined in (
            (b"\x1b[3", b"1mred\x1b[6n", b"\x1b[31mred\x1b[6n"),
            (b"\x1b[6", b"n\x1b[6n", b"\x1b[6n"),
            (b"\x1b]0;ti", b"tle\x07\x07", b"\x07"),
            (b"\xe2\x94", b"\x9c\x9b", b"\xe2\x94\x9c\x9b"),
        ):
            sanitizer = Sanitizer()
            self.assertEqual(sanitizer.feed(b"a" + begun), b"a")
            self.assertTrue(sanitizer.pending)
            self.assertEqual(sanitizer.join(live), joined)
            self.assertFalse(sanitizer.pending)

    @given(pictured, st.integers(0, 60))
    def test_seamless(self, data: bytes, cut: int) -> None:
        """Wherever it is, the seam is not seen."""
        sanitizer = Sanitizer()
        self.assertEqual(sanitizer.feed(data[:cut]) + sanitizer.join(data[cut:]), data)

    @given(hostile, hostile, cuts)
    def test_splits(self, data: bytes, live: bytes, cuts: list[int]) -> None:
        """However the output is split, it is joined in the same way, and adds no query."""
        first, second = Sanitizer(), Sanitizer()
        shown = first.feed(data)
        second.feed(data)
        joined = first.join(live)
        self.assertEqual(b"".join(map(second.join, split(live, cuts))), joined)
        self.assertLessEqual(len(queries(shown + joined)), len(queries(live)))
        if not first.pending:
            self.assertEqual(first.join(live), live)


class Xterm:
    """As much of xterm as RESET has to do with; and those that do not know DECSTR."""

    def __init__(self, cursor: tuple[int, int], soft_reset: bool = True) -> None:
        self.cursor = cursor
        self.alternate = False
        self.set = {"?7", "?25", "12"}
        self.attributes = self.keyboard = self.region = self.charsets = ""
        self.pushed = {False: 0, True: 0}
        self._soft_reset = soft_reset
        self._saved: dict[bool, tuple[tuple[int, int], bool, str, str]] = {}

    def feed(self, data: bytes) -> None:
        """Obey."""
        for sequence in re.findall(r"\x1b\[.*?[@-~]|\x1b[()].|\x1b?.", data.decode()):
            self._obey(sequence.removeprefix("\x1b"))

    def _obey(self, sequence: str) -> None:
        match sequence[0], sequence[1:-1], sequence[-1]:
            case "7", *_:
                self._save()
            case "8", *_:
                self._restore()
            case (("(" | ")" as which), _, charset):
                self.charsets = self.charsets.replace(which, "") + (which if charset != "B" else "")
            case ("\x0e", *_) | ("=", *_):
                self.set.add(sequence)
            case ("\x0f", *_) | (">", *_):
                self.set -= {"\x0e"} if sequence == "\x0f" else {"="}
            case "[", "!", "p" if self._soft_reset:
                self.set -= {"?6", "4", "?1", "="}
                self.set |= {"?7", "?25"}
                self.region = self.attributes = self.charsets = ""
                self._saved.pop(self.alternate, None)
            case "[", region, "r":
                self.region, self.cursor = region, (1, 1)
            case "[", ">4" | ">4;2" as keys, "m":
                self.keyboard = keys.removeprefix(">4")
            case "[", attributes, "m":
                self.attributes = attributes
            case "[", ">1", "u":
                self.pushed[self.alternate] += 1
            case "[", "<99", "u":
                self.pushed[self.alternate] = 0
            case "[", mode, "h":
                self.set.add(mode)
                self._switched(mode)
            case "[", mode, "l":
                self.set.discard(mode)
                self._switched(mode)

    def _switched(self, mode: str) -> None:
        if mode in ("?6", "?69"):
            self.cursor = (1, 1)
        if mode == "?1049" and mode in self.set:
            self._save()
            self.alternate = True
        elif mode == "?1049":
            self.alternate = False
            self._restore()

    def _save(self) -> None:
        saved = (self.cursor, "?6" in self.set, self.attributes, self.charsets)
        self._saved[self.alternate] = saved

    def _restore(self) -> None:
        nothing = ((1, 1), False, "", "")
        self.cursor, origin, self.attributes, self.charsets = self._saved.get(
            self.alternate, nothing
        )
        self.set.discard("?6")
        if origin:
            self.set.add("?6")


class ResetTests(SynchronousTestCase):
    """What a user's terminal is sent on leaving."""

    def assertSane(self, xterm: Xterm) -> None:
        """It is as if new."""
        for name, value in vars(Xterm(xterm.cursor)).items():
            if not name.startswith("_"):
                self.assertEqual(getattr(xterm, name), value, name)

    def test_nothing_visible(self) -> None:
        """A console that used nothing of it leaves the cursor where it was."""
        for soft_reset in (True, False):
            xterm = Xterm((5, 7), soft_reset)
            xterm.feed(RESET)
            self.assertSane(xterm)
            self.assertEqual(xterm.cursor, (5, 7))

    def test_everything(self) -> None:
        """Whatever the guest did, on either screen, is undone; the first screen's cursor is back.

        Without the alternate screen the cursor stays where the guest left it.
        """
        modes = b"2 3 4 20 ?1 ?5 ?9 ?69 ?1000 ?1001 ?1002 ?1003 ?1004 ?1005 ?1006 ?1015 ?1016"
        modes += b" ?2004 ?2026 ?2031 ?2048"
        mess = b"".join(b"\x1b[%sh" % mode for mode in modes.split())
        mess += b"\x1b[?7l\x1b[?25l\x1b[12l\x1b[3;9r\x1b[31m\x1b(0\x1b)0\x0e\x1b="
        mess += b"\x1b[>4;2m\x1b[>1u\x1b[>1u"
        # The origin mode, which only DECSTR ends.
        for before, soft_reset in ((b"", False), (b"\x1b[?6h", True)):
            xterm = Xterm((5, 7), soft_reset)
            xterm.feed(before + mess)
            left = xterm.cursor
            xterm.feed(RESET)
            self.assertSane(xterm)
            self.assertEqual(xterm.cursor, left)

            xterm = Xterm((5, 7), soft_reset)
            xterm.feed(b"\x1b[>1u\x1b[?1049h" + before + mess)
            xterm.feed(RESET)
            self.assertSane(xterm)
            self.assertEqual(xterm.cursor, (5, 7))

    def test_open_sequences(self) -> None:
        """It ends what the guest began: a string, a sequence, a character."""
        self.assertTrue(RESET.startswith(b"\x18\x1b\\"))

    def test_no_queries(self) -> None:
        """Nothing in it is answered; kitty's and xterm's keys are set, not asked for."""
        self.assertEqual(
            [query for query in queries(RESET) if query not in (b"\x1b[<99u", b"\x1b[>4m")], []
        )
