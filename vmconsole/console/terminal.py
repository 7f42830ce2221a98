"""Terminal output: what of it is harmless to show again, and how a terminal is set back. Pure.

The sequences are those of ECMA-48 and of xterm's "Control Sequences" (ctlseqs).
"""

from __future__ import annotations

import codecs
import re

# What shows itself, and the controls that move the cursor or shift the character set (8 to 15).
# The others are dropped: BEL rings, ENQ is answered, and the C1 controls (as a character U+0080
# to U+009F, or as a byte that is part of no character) begin what some terminals obey.
_TEXT = "[^\x00-\x07\x10-\x1f\x7f-\x9f\udc80-\udc9f]"
# Save and restore the cursor, IND, NEL, RI, the keypad; ASCII, UK and line drawing as G0 and G1.
_ESCAPE = r"[78DEM=>]|[()][0AB]"
# Colours; cursor movement, inserting, deleting, repeating, scrolling and its region; DECSTR;
# erasing, but for the terminal's past lines (3); scrolling down, which with more parameters would
# track the mouse; saving and restoring the cursor, which with parameters is something else.
_CONTROL = (
    r"\[(?:[0-9:;]{0,100}m|[0-9;]{0,100}(?:[@ABCDEFGHIKLMPSXZ`abdefr]|!p)|[012]?J|[0-9]{0,5}T|[su])"
)
# Inserting, application cursor keys, visible and saved cursor, bracketed paste: nothing is sent
# for them until the user types. With mouse modes a hand on the mouse would type; 1004 and 2048
# are answered at once; 7 off, which firmware leaves behind, would cut long lines.
_MODE = r"\[(?:4|\?(?:1|25|1048|2004))[hl]"
_SEQUENCE = re.compile(f"\x1b(?:{_CONTROL}|{_MODE}|{_ESCAPE})")
# Modes that are set together, or that matter on their own.
_SWITCH = re.compile(r"\x1b\[(\??)([0-9;]{1,100})([hl])")
_ALTERNATE = frozenset(["?47", "?1047", "?1049"])
_HARD_RESET = "\x1bc"
# Longer than any of these: nor is more than this ever held.
_LONGEST = 128

# Most output is a run of these; the rest takes a loop for each character.
_KEPT = re.compile(f"(?:{_TEXT}+|{_SEQUENCE.pattern})+")
_DROPPED = re.compile(
    "(?:[\x00-\x07\x10-\x1a\x1c-\x1f\x7f-\x9f\udc80-\udc9f]|\x1b(?=\x1b)"
    rf"|(?!{_SEQUENCE.pattern})\x1b\[[0-?]{{0,100}}[ -/]{{0,2}}[@-gijkm-~])+"
)

# DCS, SOS, OSC, PM, APC, and the title of screen and tmux. A string ends with its line at the
# latest, which it does on no terminal: one that is never ended, such as the Linux console's OSC R
# which `reset` sends, must not swallow what follows.
_STRINGS = "PX]^_k"
_END_OF_STRING = re.compile("[\x07\n\r\x18\x1a\x1b]")


class Sanitizer:
    """Passes on what draws on the screen, and drops everything else that a terminal obeys.

    For output that is shown again, later: nothing in what it returns makes a terminal answer, and
    answers would be typed into the guest. Only what is known to be harmless is let through, and
    only as a whole: so after any result the terminal is between two sequences, and nothing that
    was dropped can join its neighbours into something new. Text, colours (SGR), cursor, erasing,
    scrolling, line drawing and the alternate screen stay; queries, reports, control strings (OSC
    with titles and colours, DCS, APC, PM, SOS), the bell, window operations, printing, tab stops,
    and the terminal's own memory of past lines do not.

    However the input is split, the result is the same. Text is taken as UTF-8; other bytes above
    0x9f stay as they are.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._sequence = ""
        self._in_string = False
        self._alternate = False

    @property
    def pending(self) -> bool:
        """True in the middle of a sequence or of a character."""
        return bool(self._sequence or self._in_string or self._decoder.getstate()[0])

    def feed(self, data: bytes) -> bytes:
        """What is harmless in ``data``; of a sequence that is not complete, nothing yet."""
        text = self._decoder.decode(data)
        kept: list[str] = []
        at = 0
        while at < len(text):
            if self._in_string:
                end = _END_OF_STRING.search(text, at)
                self._in_string = end is None
                at = end.start() if end else len(text)
            elif self._sequence:
                kept.append(self._continue(text[at]))
                at += 1
            elif run := _KEPT.match(text, at):
                kept.append(run[0])
                at = run.end()
            elif run := _DROPPED.match(text, at):
                at = run.end()
            else:
                self._sequence = text[at]
                at += 1
        return "".join(kept).encode("utf-8", "surrogateescape")

    def join(self, data: bytes) -> bytes:
        """The guest's output right after what was shown again, which is ``data``, as it came.

        Only the sequence or character that was begun in what was shown again is still sanitized,
        to its end, so that neither is its rest shown as text, nor is a query completed.
        """
        joined = bytearray()
        at = 0
        while self.pending and at < len(data):
            joined += self.feed(data[at : at + 1])
            at += 1
        return bytes(joined) + data[at:]

    def _continue(self, char: str) -> str:
        """One more character of a sequence; what is kept because of it."""
        if "\x20" <= char <= "\x7e":
            return self._complete(self._sequence + char)
        # Terminals obey a control inside of a sequence at once, and then go on with that.
        if char == "\x1b":
            self._sequence = char
        elif char in "\x18\x1a" or char > "\x7f":
            self._sequence = ""
        return char if _KEPT.match(char) else ""

    def _complete(self, sequence: str) -> str:
        """What is kept of a sequence if its last character completes it."""
        self._sequence = ""
        if len(sequence) == 2 and sequence[1] in _STRINGS:
            self._in_string = True
        elif sequence == "\x1b[" or sequence[-1] < ("@" if sequence[1] == "[" else "0"):
            self._sequence = sequence[:_LONGEST]
        elif _SEQUENCE.fullmatch(sequence):
            return sequence
        elif switch := _SWITCH.fullmatch(sequence):
            mark, modes, kind = switch.groups()
            return "".join(self._switch(mark + mode.lstrip("0"), kind) for mode in modes.split(";"))
        elif sequence == _HARD_RESET:
            # It would also forget the terminal's past lines, its title and its tab stops.
            return self._switch("?1049", "l") + "\x1b[!p\x1b[H\x1b[2J"
        return ""

    def give_up(self) -> None:
        """What was begun is never ended."""
        self._decoder.reset()
        self._sequence, self._in_string = "", False

    def _switch(self, mode: str, kind: str) -> str:
        sequence = f"\x1b[{mode}{kind}"
        harmless = _SEQUENCE.fullmatch(sequence) is not None
        if mode in _ALTERNATE:
            # Off while it is not on, the rest of a program whose beginning was cut off, would
            # move the cursor all the same.
            harmless = self._alternate or kind == "h"
            self._alternate = kind == "h"
        return sequence if harmless else ""


def _modes(mark: str, kind: str, *modes: int) -> bytes:
    return "".join(f"\x1b[{mark}{mode}{kind}" for mode in modes).encode()


_KITTY_KEYBOARD_OFF = b"\x1b[<99u"

# Ends a sequence that a terminal has begun: CAN, and ST where CAN does not.
GIVE_UP = b"\x18\x1b\\"

RESET = b"".join(
    [
        GIVE_UP,
        # Synchronized output, which holds back all that follows; each screen's own keyboard modes.
        _modes("?", "l", 2026),
        _KITTY_KEYBOARD_OFF,
        # The alternate screen. xterm restores the saved cursor even if that is not on: hence 7,
        # which each screen keeps for itself.
        b"\x1b7",
        _modes("?", "l", 1049),
        _KITTY_KEYBOARD_OFF,
        # DECSTR, which alone ends the origin mode and leaves the cursor where it is. It forgets
        # the saved cursor, so it comes before 7; what else it does is said again, for those that
        # do not know it.
        b"\x1b[!p",
        # Left and right margins, top and bottom margins: these move the cursor.
        b"\x1b7",
        _modes("?", "l", 69),
        b"\x1b[r\x1b8",
        # A locked keyboard, controls that are shown, inserting, Enter as CR LF; local echo.
        _modes("", "l", 2, 3, 4, 20),
        _modes("", "h", 12),
        # Cursor keys, reverse screen, keypad; the mouse and the focus; bracketed paste, reports of
        # colours and of the size; modifyOtherKeys.
        _modes("?", "l", 1, 5),
        b"\x1b>",
        _modes("?", "l", 9, 1000, 1001, 1002, 1003, 1004, 1005, 1006, 1015, 1016),
        _modes("?", "l", 2004, 2031, 2048),
        b"\x1b[>4m",
        # Autowrap, a visible cursor, ASCII. Attributes last: 8 restores them too, and old consoles
        # take modifyOtherKeys for an underline.
        _modes("?", "h", 7, 25),
        b"\x1b(B\x1b)B\x0f\x1b[m",
    ]
)
"""Sets a user's terminal back, whatever the guest did to it; else it changes nothing visible.

What a terminal without DECSTR (tmux) keeps is the origin mode, which means nothing by then: its
region is the whole screen.
"""
