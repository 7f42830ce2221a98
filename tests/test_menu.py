"""The menu, and which console an answer means."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, overload

import msgspec
from hypothesis import example, given
from hypothesis import strategies as some
from twisted.internet.defer import CancelledError
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.trial.unittest import SynchronousTestCase

from tests.fakes import console
from vmconsole.console.choice import (
    AmbiguousConsole,
    NoSuchConsole,
    by_id,
    by_name,
    by_text,
    matching,
)
from vmconsole.console.menu import Menu, MenuProtocol, Page
from vmconsole.interfaces import ConsoleInfo

NO_CONSOLE = "no console device: add <console type='pty'/>"


def marked(name: str, problem: str = NO_CONSOLE) -> ConsoleInfo:
    """A VM whose console cannot be opened, as the engine says."""
    return msgspec.structs.replace(console(name), problem=problem)


VMS = [console("db", "11-aa"), console("web1", "22-bb"), console("web2", "33-cc")]
MANY = [console(f"vm{number:05}") for number in range(1, 10001)]
# A line of the list, as it is shown.
LINE = re.compile(r"(\d+)\. (\S+) \[(\S+)\]")
PAGE_UP, PAGE_DOWN = b"\x1b[5~", b"\x1b[6~"

names = some.text("ab1*?[]!-^\\", min_size=1, max_size=6)
texts = some.text("abAB1*?[]!-^\\&~|.", max_size=8)
# Of those that cannot be opened the text is longer than a narrow screen is wide.
problems = some.just("") | some.text("aé語", max_size=90)
listed = some.lists(
    some.builds(marked, some.text("aé語", min_size=1, max_size=90), problems),
    min_size=1,
    max_size=60,
)
rows = some.integers(0, 70)
columns = some.integers(0, 120)


def shown(text: str) -> list[tuple[str, ...]]:
    """The number, the name and the id in each line of a list."""
    return [match.groups() for match in LINE.finditer(text)]


def height(text: str, columns: int) -> int:
    """The rows that ``text`` and a prompt take on a screen."""
    return 1 + sum(max(1, -(-len(line) // (columns or 80))) for line in text.splitlines())


class ChoiceTests(SynchronousTestCase):
    """By id, by name, by a beginning, by a pattern."""

    def test_exact(self) -> None:
        """An id in any case, or a name, finds its VM."""
        self.assertEqual(by_id(VMS, "22-BB").vm_name, "web1")
        self.assertEqual(by_name(VMS, "db").vm_id, "11-aa")

    def test_beginning(self) -> None:
        """The beginning of one name or id will do; of several, they are listed."""
        self.assertEqual(by_text(VMS, "d").vm_name, "db")
        self.assertEqual(by_text(VMS, "33").vm_name, "web2")
        self.assertEqual(by_text(VMS, "22-B").vm_name, "web1")
        self.assertEqual(by_text([*VMS, console("x", "44-DD")], "44-d").vm_name, "x")
        with self.assertRaises(AmbiguousConsole) as caught:
            by_text(VMS, "web")
        self.assertEqual(
            str(caught.exception),
            "web could be web1 [22-bb], web2 [33-cc]. Say which one, by its id.",
        )

    def test_exact_before_beginning(self) -> None:
        """A name that others begin with means itself."""
        self.assertEqual(by_text([console("web"), *VMS], "web").vm_name, "web")

    def test_pattern(self) -> None:
        """A pattern that matches one whole name or id will do; of several, they are listed."""
        for pattern, name in (
            ("*2", "web2"),
            ("w?b1", "web1"),
            ("web[!1]", "web2"),
            ("*-BB", "web1"),
        ):
            self.assertEqual(by_text(VMS, pattern).vm_name, name)
        with self.assertRaises(AmbiguousConsole) as caught:
            by_text(VMS, "w*")
        self.assertIn("w* could be web1 [22-bb], web2 [33-cc]. Say", str(caught.exception))

    def test_pattern_and_case(self) -> None:
        """The case counts in the pattern of a name, and not in that of an id."""
        self.assertRaises(NoSuchConsole, by_text, VMS, "*EB1")
        self.assertEqual(by_text([*VMS, console("WEB1")], "*EB1").vm_name, "WEB1")
        self.assertEqual(by_text([*VMS, console("x", "44-DD")], "4*d").vm_name, "x")

    def test_pattern_is_whole(self) -> None:
        """A pattern that matches a part of a name only, matches it not."""
        for pattern in ("?eb", "[w]eb", "*we"):
            self.assertRaises(NoSuchConsole, by_text, VMS, pattern)

    def test_pattern_is_last(self) -> None:
        """A name with the characters of a pattern means itself, and its beginning means it, also
        where they match others as a pattern."""
        odd = [console("w*"), console("web[12]"), *VMS]
        self.assertEqual(by_text(odd, "w*").vm_name, "w*")
        self.assertEqual(by_text(odd, "web[12]").vm_name, "web[12]")
        self.assertEqual(by_text(odd, "web[1").vm_name, "web[12]")

    def test_endless_pattern(self) -> None:
        """A pattern that nobody would type is none."""
        self.assertEqual(by_text(VMS, "d" + "*" * 127).vm_name, "db")
        self.assertRaises(NoSuchConsole, by_text, VMS, "d" + "*" * 128)

    @given(some.lists(names, unique=True, max_size=8), texts)
    @example(["a", "b"], "[")
    @example(["ab", "a*"], "a*")
    def test_order(self, all_names: list[str], text: str) -> None:
        """Whatever is asked for: the exact id, else the name, else what begins with it, else what
        matches it; one is found, several are ambiguous, none is unknown."""
        vms = [console(name, f"{number}-b") for number, name in enumerate(all_names)]
        found: list[ConsoleInfo] = []
        for means in (
            lambda vm: vm.vm_id == text.lower(),
            lambda vm: vm.vm_name == text,
            lambda vm: text and (vm.vm_name.startswith(text) or vm.vm_id.startswith(text.lower())),
            lambda vm: (
                re.search(r"[*?\[]", text)
                and (fnmatchcase(vm.vm_name, text) or fnmatchcase(vm.vm_id, text.lower()))
            ),
        ):
            found = found or [vm for vm in vms if means(vm)]
        if len(found) == 1:
            self.assertEqual(by_text(vms, text), found[0])
        else:
            self.assertRaises(AmbiguousConsole if found else NoSuchConsole, by_text, vms, text)

    def test_ambiguous_among_many(self) -> None:
        """Ten are listed; of the others, how many there are."""
        for text in ("vm000", "vm000*"):
            with self.assertRaises(AmbiguousConsole) as caught:
                by_text(MANY[:10], text)
            self.assertIn("vm00010 [id-vm00010]. Say", str(caught.exception))
        for text in ("vm000", "*vm000*"):
            with self.assertRaises(AmbiguousConsole) as caught:
                by_text(MANY[:47], text)
            self.assertIn(
                "vm00009 [id-vm00009], vm00010 [id-vm00010], ... and 37 more. Say which one",
                str(caught.exception),
            )
            self.assertNotIn("vm00011", str(caught.exception))

    def test_same_name_twice(self) -> None:
        """Two VMs of one name are told apart by id only; the text lists the ids."""
        twins = [console("a", "1"), console("a", "2")]
        for find in (by_name, by_text):
            with self.assertRaises(AmbiguousConsole) as caught:
                find(twins, "a")
            self.assertIn("a [1], a [2]", str(caught.exception))

    def test_nothing(self) -> None:
        """An unknown name, and no name at all, are none."""
        for text in ("nope", "", "nope*"):
            self.assertRaises(NoSuchConsole, by_text, VMS, text)
        self.assertRaises(NoSuchConsole, by_name, VMS, "web")
        self.assertRaises(NoSuchConsole, by_id, VMS, "22")

    def test_matching(self) -> None:
        """A filter finds a part of a name or an id, a pattern a whole one, both in any case."""
        for text, numbers in (
            ("EB", [1, 2]),
            ("B", [0, 1, 2]),
            ("-c", [2]),
            ("WEB?", [1, 2]),
            ("*-[AB]*", [0, 1]),
            ("eb?", []),
            ("nope", []),
        ):
            self.assertEqual(matching(VMS, text), [VMS[number] for number in numbers], text)
        for text in ("straße", "straße*", "ID-", "id-*"):
            self.assertEqual(len(matching([console("STRASSE", "Id-1")], text)), 1, text)


class MenuTests(SynchronousTestCase):
    """What is shown and what is understood."""

    def test_short(self) -> None:
        """A list that fits is a numbered line for each VM, names escaped, and nothing else."""
        self.assertEqual(
            Menu([console("a\x1b", "1"), console("b", "2")]).page(0, 24, 80),
            Page(0, 2, "1. a\\x1b [1]\n2. b [2]\n"),
        )

    def test_just_fits(self) -> None:
        """A list with the prompt below it may fill the screen; one VM more, and it pages."""
        self.assertEqual(Menu(MANY[:23]).page(0, 24, 80).end, 23)
        self.assertNotIn("q: leave", Menu(MANY[:23]).page(0, 24, 80).text)
        page = Menu(MANY[:24]).page(0, 24, 80)
        self.assertEqual(page.end, 22)
        self.assertTrue(
            page.text.endswith(
                "\n22. vm00022 [id-vm00022]\n"
                "1-22 of 24. Which VM? Enter: more, -: back, /text: filter, q: leave\n"
            )
        )

    def test_end(self) -> None:
        """The last page says that it is the last; behind it comes the first."""
        page = Menu(MANY).page(9980, 24, 80)
        self.assertEqual(
            page.text.splitlines()[-1],
            "9981-10000 of 10000. Which VM? Enter: top, -: back, /text: filter, q: leave",
        )
        self.assertEqual(Menu(MANY).page(page.end, 24, 80), Menu(MANY).page(0, 24, 80))

    def test_unknown_size(self) -> None:
        """A screen without rows or columns is taken for one of 24x80."""
        menu = Menu([console("x" * 100), *MANY])
        for size in ((0, 0), (24, 0), (0, 80)):
            self.assertEqual(menu.page(0, *size), menu.page(0, 24, 80))
        self.assertEqual(menu.page(0, 24, 80).end, 20)

    def test_long_names(self) -> None:
        """A VM whose line is longer than the screen is wide counts as the rows that it takes."""
        vms = [console("x" * 100, "i"), *MANY]
        self.assertEqual(shown(Menu(vms).page(0, 10, 80).text)[-1][0], "7")
        self.assertEqual(shown(Menu(vms).page(0, 10, 108).text)[-1][0], "8")

    def test_marked(self) -> None:
        """A VM whose console cannot be opened stands in its place, with the reason, escaped and
        of bounded length; the line counts as the rows that it takes."""
        vms = [console("a"), marked("b"), marked("c", "no\x1b[2J"), *MANY]
        self.assertEqual(
            Menu(vms).page(0, 10, 80).text.splitlines()[:4],
            [
                "1. a [id-a]",
                f"2. b [id-b] ({NO_CONSOLE})",
                "3. c [id-c] (no\\x1b[2J)",
                "4. vm00001 [id-vm00001]",
            ],
        )
        self.assertEqual(Menu(vms).page(0, 10, 80).end, 8)
        self.assertEqual(Menu(vms).page(0, 10, 50).end, 6)
        self.assertIn(
            "(" + "x" * 256 + "...)\n", Menu([marked("a", "x" * 999)]).page(0, 9, 80).text
        )

    def test_marked_is_chosen(self) -> None:
        """Such a VM can be chosen as any other: what the engine knows may be old. A filter does
        not look at the reason, nor does an answer."""
        menu = Menu([console("a"), marked("b"), console("c")])
        for answer in ("2", "b", "id-b"):
            self.assertEqual(menu.choose(answer), marked("b"))
        self.assertEqual(menu.filtered("b").choose("1"), marked("b"))
        for text in ("pty", "no console", "*pty*"):
            self.assertRaises(NoSuchConsole, menu.filtered, text)
            self.assertRaises(NoSuchConsole, menu.choose, text)

    @given(listed, rows, columns, some.booleans())
    @example([console("aaa")] * 9, 0, 14, True)
    def test_pages(self, vms: list[ConsoleInfo], rows: int, columns: int, filter: bool) -> None:
        """From page to page every VM comes once and in order, with its number; each page fits the
        screen, unless a single VM does not; and the page before leads back without a gap."""
        menu = Menu(vms).filtered("id-" if filter else "")
        numbers: list[str] = []
        at = 0
        while True:
            page = menu.page(at, rows, columns)
            numbers += [line[0] for line in shown(page.text)]
            for each in (page, menu.page_before(page.first, rows, columns)):
                self.assertEqual(len(shown(each.text)), each.end - each.first)
                if each.end - each.first > 1:
                    self.assertLessEqual(height(each.text, columns), rows or 24)
            before = menu.page_before(page.first, rows, columns)
            if page.first:
                self.assertLess(before.first, page.first)
            self.assertGreaterEqual(before.end, page.first or len(vms))
            at = page.end
            if at == len(vms):
                break
        self.assertEqual(numbers, [str(number) for number in range(1, len(vms) + 1)])

    def test_endless_screen(self) -> None:
        """However large a client says that its screen is, a page has its bounds."""
        huge = 2**32 - 1
        self.assertLess(Menu(MANY).page(0, huge, huge).end, 200)
        long = [console("x" * 300, f"{number}" + "y" * 300) for number in range(1000)]
        self.assertLess(Menu(long).page(0, huge, huge).end, 100)

    def test_tiny_screen(self) -> None:
        """However small it is, a page has a VM."""
        for size in ((1, 1), (2, 80), (24, 1)):
            self.assertEqual(Menu(MANY).page(5, *size).end, 6)
            self.assertEqual(Menu(MANY).page_before(5, *size).first, 4)

    def test_many(self) -> None:
        """A page of 10,000 VMs looks at some screens of them, wherever it is."""
        counted = Counted(MANY)
        for menu in (Menu(counted), Menu(MANY, "vm", counted)):
            for first in (0, 22, 5000, 9980):
                for turn in (menu.page, menu.page_before):
                    counted.touched = 0
                    self.assertGreaterEqual(len(shown(turn(first, 24, 80).text)), 20)
                    self.assertLess(counted.touched, 3 * 24)

    def test_choose(self) -> None:
        """A number of the list, a name, an id, a beginning, a pattern."""
        menu = Menu(VMS)
        for answer, name in (
            ("1", "db"),
            ("web1", "web1"),
            ("33-cc", "web2"),
            ("d", "db"),
            ("*2", "web2"),
        ):
            self.assertEqual(menu.choose(answer).vm_name, name)
        self.assertEqual(Menu(MANY).choose("9999"), MANY[9998])

    def test_number_out_of_range(self) -> None:
        """0, and a number past the end, are told with what there is."""
        for answer in ("0", "4", "9" * 50):
            with self.assertRaises(NoSuchConsole) as caught:
                Menu(VMS).choose(answer)
            self.assertIn("choose 1 to 3", str(caught.exception))

    def test_name_of_digits(self) -> None:
        """A VM that is called by a number is found by that name; with a filter, if it is shown."""
        vms = [console("a"), console("1", "x"), console("b")]
        self.assertEqual(Menu(vms).choose("1").vm_id, "x")
        self.assertEqual(Menu(vms).filtered("b").choose("1").vm_name, "b")
        self.assertRaises(AmbiguousConsole, Menu([*vms, console("1")]).choose, "1")

    def test_filter(self) -> None:
        """A filter's page says what it is, and how to be rid of it, also when all of it fits."""
        self.assertEqual(
            Menu(VMS).filtered("EB").page(0, 24, 80).text,
            "1. web1 [22-bb]\n2. web2 [33-cc]\n1-2 of 2 matching EB. Which VM? /: all, q: leave\n",
        )
        self.assertEqual(
            Menu(MANY).filtered("vm09").page(22, 24, 80).text.splitlines()[-1],
            "23-44 of 1000 matching vm09. Which VM? Enter: more, -: back, /: all, q: leave",
        )
        self.assertIn("matching " + "x" * 40 + "...", Menu(MANY, "x" * 99).page(0, 24, 80).text)

    def test_filter_anew(self) -> None:
        """A filter looks at all VMs, not at what the last one left; an empty one ends it."""
        menu = Menu(VMS).filtered("db")
        self.assertIn("1-1 of 1", menu.page(0, 24, 80).text)
        self.assertIn("1-2 of 2", menu.filtered("web").page(0, 24, 80).text)
        self.assertEqual(menu.filtered("").page(0, 24, 80), Menu(VMS).page(0, 24, 80))

    def test_filter_without_a_match(self) -> None:
        """What matches nothing is told, escaped."""
        with self.assertRaises(NoSuchConsole) as caught:
            Menu(VMS).filtered("n\x1b")
        self.assertEqual(str(caught.exception), "None of your VMs matches n\\x1b.")

    def test_choose_in_a_filtered_list(self) -> None:
        """A number is that of the filtered list; a name means what it means without a filter."""
        menu = Menu(VMS).filtered("web")
        self.assertEqual(menu.choose("1").vm_name, "web1")
        self.assertEqual(menu.choose("db").vm_name, "db")
        with self.assertRaises(NoSuchConsole) as caught:
            menu.choose("3")
        self.assertIn("choose 1 to 2", str(caught.exception))

    @given(some.lists(names, unique=True, min_size=1, max_size=30), some.text("ab1-", max_size=2))
    def test_numbers(self, all_names: list[str], text: str) -> None:
        """The number that is shown beside a VM chooses it, with and without a filter, unless it is
        the name of one that is shown."""
        vms = [console(name, f"a-{name}") for name in all_names]
        try:
            menu = Menu(vms).filtered(text)
        except NoSuchConsole:
            return
        lines = shown(menu.page(0, 100, 80).text)
        self.assertTrue(lines)
        called = {vm.vm_name for vm in vms}
        for number, _, shown_id in lines:
            if number not in called:
                self.assertEqual(menu.choose(number).vm_id, shown_id.replace("\\\\", "\\"))


class Counted(Sequence[ConsoleInfo]):
    """Counts how many VMs are looked at."""

    def __init__(self, consoles: Sequence[ConsoleInfo]) -> None:
        self._consoles = consoles
        self.touched = 0

    def __len__(self) -> int:
        return len(self._consoles)

    @overload
    def __getitem__(self, place: int) -> ConsoleInfo: ...

    @overload
    def __getitem__(self, place: slice) -> Sequence[ConsoleInfo]: ...

    def __getitem__(self, place: Any) -> Any:
        found = self._consoles[place]
        self.touched += len(found) if isinstance(place, slice) else 1
        return found


class Terminal(StringTransport):
    """A user's channel that takes ``room`` bytes, and more whenever the test does."""

    room = 1 << 30

    def write(self, data: bytes) -> None:
        super().write(data)
        if self.producer is not None and len(self.value()) > self.room:
            self.producer.pauseProducing()

    def taken(self) -> str:
        """What was shown since the last time; then the user takes more."""
        text: str = self.value().decode().replace("\r\n", "\n")
        self.clear()
        if self.producer is not None:
            self.producer.resumeProducing()
        return text


class MenuTestCase(SynchronousTestCase):
    """A menu on a terminal in raw mode."""

    def show(self, vms: Sequence[ConsoleInfo], **options: Any) -> str:
        """Begin, with these VMs; the result is what is shown."""
        self.menu = MenuProtocol(Menu(vms), **options)
        self.transport = Terminal()
        self.menu.makeConnection(self.transport)
        return self.transport.taken()

    def type(self, keys: bytes) -> str:
        """The user types; the result is what is shown then."""
        self.menu.dataReceived(keys)
        return self.transport.taken()

    def numbers(self, keys: bytes) -> tuple[str, str]:
        """The first and the last number of the list that is shown for ``keys``."""
        lines = shown(self.type(keys))
        return (lines[0][0], lines[-1][0])


class MenuProtocolTests(MenuTestCase):
    """Keys, and what is shown then."""

    def setUp(self) -> None:
        self.show(VMS)

    def test_short(self) -> None:
        """A list that fits is shown with a prompt."""
        self.assertEqual(self.show(VMS), "1. db [11-aa]\n2. web1 [22-bb]\n3. web2 [33-cc]\n> ")
        self.menu.dataReceived(b"/\r")
        self.assertEqual(self.transport.value().count(b"\n"), self.transport.value().count(b"\r\n"))

    def test_echo_and_corrections(self) -> None:
        """Keys echo; backspace and ^U take back; arrow keys do nothing."""
        self.menu.dataReceived(b"zz\x15we\x1b[A\x1bOBX\x7f")
        self.menu.dataReceived(b"b2\r")
        self.assertEqual(self.successResultOf(self.menu.chosen), VMS[2])
        self.assertEqual(self.transport.value(), b"zz\b \b\b \bweX\b \bb2\r\n")

    def test_nothing_to_take_back(self) -> None:
        """On an empty line backspace and ^U show nothing, and the prompt stays."""
        self.assertEqual(self.type(b"\x7f\x08\x15"), "")

    def test_odd_sequences(self) -> None:
        """Keys that send longer sequences do nothing; one that is cut off takes no Enter, Ctrl-C
        or letter that is not its own with it."""
        self.assertEqual(self.type(b"\x1b[15;2~\x1b[1;5A\x1b[5;5~\x1bx\x1b\x1b[A\x1b[55555~"), "")
        self.assertEqual(self.type(b"\x1b\r\x1b[\r\x1b[5\xc3\xa9"), "\n> \n> é")
        self.assertEqual(self.type(b"\x15\x1b[\r5~"), "\b \b\n> 5~")
        self.type(b"\x15")
        self.menu.dataReceived(b"\x1b[\x03")
        self.assertIsNone(self.successResultOf(self.menu.chosen))

    def test_spaces(self) -> None:
        """Spaces around an answer mean nothing."""
        self.menu.dataReceived(b" web2 \r")
        self.assertEqual(self.successResultOf(self.menu.chosen), VMS[2])

    def test_split_utf8(self) -> None:
        """A character whose bytes come one by one is one character."""
        for byte in "é".encode():
            self.menu.dataReceived(bytes([byte]))
        self.assertEqual(self.transport.value(), "é".encode())

    def test_leave(self) -> None:
        """q, Ctrl-C, Ctrl-D, the end of input and a closed channel choose nothing; the channel is
        free for another producer then."""
        for leave in (
            lambda: self.menu.dataReceived(b"q\r"),
            lambda: self.menu.dataReceived(b"\x03"),
            lambda: self.menu.dataReceived(b"\x04"),
            lambda: self.menu.readConnectionLost(),
            lambda: self.menu.connectionLost(),
        ):
            self.show(MANY)
            self.assertIsNotNone(self.transport.producer)
            leave()
            self.assertIsNone(self.successResultOf(self.menu.chosen))
            self.assertIsNone(self.transport.producer)

    def test_lost_after_the_answer(self) -> None:
        """A channel that closes behind the answer, or takes no output any more, changes nothing."""
        self.menu.dataReceived(b"1\r")
        self.menu.connectionLost()
        self.assertEqual(self.successResultOf(self.menu.chosen), VMS[0])
        self.show(VMS)
        self.menu.stopProducing()
        self.menu.dataReceived(b"\r")
        self.assertEqual(self.transport.value(), b"")
        self.menu.connectionLost()
        self.assertIsNone(self.successResultOf(self.menu.chosen))

    def test_cancelled(self) -> None:
        """Who no longer wants to know what is chosen ends the menu: nothing is shown any more."""
        self.show(MANY)
        self.menu.chosen.cancel()
        self.failureResultOf(self.menu.chosen, CancelledError)
        self.assertIsNone(self.transport.producer)
        self.assertEqual(self.type(b"\r\r1\r"), "")

    def test_typed_ahead(self) -> None:
        """What is typed behind the answer is kept as it came."""
        self.menu.dataReceived(b"1\rroot\r\x0c\xff\xfe\x80")
        self.assertEqual(self.menu.rest, b"root\r\x0c\xff\xfe\x80")

    def test_empty_line(self) -> None:
        """Where there is no other page, Enter alone, ``-`` and the page keys ask again."""
        self.assertEqual(self.type(b"\r-\r"), "\n> -\n> ")
        self.assertEqual(self.type(PAGE_DOWN + PAGE_UP), "\n> \n> ")
        self.type(b"/web\r")
        self.assertEqual(self.type(b"\r"), "\n> ")
        self.assertNoResult(self.menu.chosen)

    def test_pages(self) -> None:
        """Enter and PageDown show the next page, ``-`` and PageUp the one before; they go round."""
        self.assertEqual(shown(self.show(MANY))[-1][0], "22")
        self.assertEqual(self.numbers(b"\r"), ("23", "44"))
        self.assertEqual(self.numbers(PAGE_DOWN), ("45", "66"))
        self.assertEqual(self.numbers(b"-\r"), ("23", "44"))
        self.assertEqual(self.numbers(PAGE_UP), ("1", "22"))
        self.assertEqual(self.numbers(b"-\r"), ("9979", "10000"))
        self.assertEqual(self.numbers(b"\r"), ("1", "22"))

    def test_prompt_below_the_page(self) -> None:
        """A page ends with what can be typed, and the prompt; what was typed stays there."""
        self.show(MANY)
        self.assertRegex(self.type(b"\r"), r"^\n23\. (.*\n){22}23-44 of 10000\. .*: leave\n> $")
        for key in (PAGE_DOWN, PAGE_UP, b"\x0c"):
            self.assertRegex(self.type(b"4" + key), r"^4\n\d+\. (.*\n)+.*: leave\n> 4+$")
        self.menu.dataReceived(b"\r")
        self.assertEqual(self.successResultOf(self.menu.chosen), MANY[443])

    def test_redraw(self) -> None:
        """Ctrl-L shows the same page again, also of a list that fits."""
        self.assertEqual(self.numbers(b"\x0c"), ("1", "3"))
        self.show(MANY)
        self.type(b"\r")
        self.assertEqual(self.numbers(b"\x0c"), ("23", "44"))

    def test_any_number(self) -> None:
        """A number of another page chooses its VM, too."""
        self.show(MANY)
        self.menu.dataReceived(b"9999\r")
        self.assertEqual(self.successResultOf(self.menu.chosen), MANY[9998])

    def test_filter(self) -> None:
        """``/text`` lists what matches, one as well; ``/`` alone all again, from the start."""
        self.show(MANY)
        self.type(b"\r")
        text = self.type(b"/ 0999 \r")
        self.assertEqual([line[:2] for line in shown(text)][-1], ("11", "vm09999"))
        self.assertIn("1-11 of 11 matching 0999. ", text)
        self.assertTrue(text.endswith(": leave\n> "), text)
        self.assertIn(
            "\n1. vm00777 [id-vm00777]\n1-1 of 1 matching VM00777. ", self.type(b"/VM00777\r")
        )
        self.assertNoResult(self.menu.chosen)
        self.assertEqual(self.numbers(b"/\r"), ("1", "22"))
        self.type(b"/099?8\r")
        self.menu.dataReceived(b"/*99?8\r2\r")
        self.assertEqual(self.successResultOf(self.menu.chosen).vm_name, "vm09918")  # type: ignore[union-attr]

    def test_filter_without_a_match(self) -> None:
        """A filter that matches nothing says so; the list, its page and its numbers stay."""
        self.show(MANY)
        self.type(b"/vm09\r\r")
        self.assertEqual(self.type(b"/zz\r"), "/zz\nNone of your VMs matches zz.\n> ")
        self.assertEqual(self.numbers(b"\r"), ("45", "66"))
        self.menu.dataReceived(b"1\r")
        self.assertEqual(self.successResultOf(self.menu.chosen), MANY[8999])

    def test_wrong_answer(self) -> None:
        """A wrong answer is told in a line, and asked again; the page is not repeated."""
        self.show(MANY)
        self.assertEqual(self.type(b"10001\r"), "10001\nThere is no 10001: choose 1 to 10000.\n> ")
        self.assertRegex(
            self.type(b"vm*\r"), r"^vm\*\nvm\* could be .* \.\.\. and 9990 more\..*\n> $"
        )
        self.assertEqual(self.numbers(b"\r"), ("23", "44"))

    def test_size(self) -> None:
        """A page is as large as the screen was at the start, or is since it changed; a change
        alone shows nothing."""
        self.assertEqual(len(shown(self.show(MANY, rows=10, columns=200))), 8)
        self.menu.resized(12, 200)
        self.assertEqual(self.transport.taken(), "")
        self.assertEqual(self.numbers(b"\r"), ("9", "18"))
        self.menu.resized(0, 0)
        self.assertEqual(self.numbers(b"\r"), ("19", "40"))

    def test_size_of_a_short_list(self) -> None:
        """A list pages once it does not fit any more, and does not once it fits."""
        self.show(MANY[:10])
        self.menu.resized(6, 80)
        self.assertEqual(self.numbers(b"\r"), ("1", "4"))
        self.menu.resized(24, 80)
        text = self.type(b"\r")
        self.assertEqual(len(shown(text)), 10)
        self.assertNotIn("leave", text)

    def test_endless_line(self) -> None:
        """A line without an end rings the bell, and is not kept."""
        self.menu.dataReceived(b"x" * 100000)
        self.assertLessEqual(len(self.menu._line), 300)
        self.menu.dataReceived(b"\r\x1b[" + b"5" * 100000)
        self.assertLessEqual(len(self.menu._escape), 10)

    def test_answer_is_escaped(self) -> None:
        """What comes back in a message cannot act on the terminal."""
        for keys in ("\u202e\r", "/\u202e\r", "/x\\\r"):
            self.menu.dataReceived(keys.encode())
            self.assertNotIn("\u202e".encode(), self.transport.value())
        self.assertIn(b"matches x\\\\.", self.transport.value())

    @given(
        some.lists(
            some.binary(max_size=20)
            | some.sampled_from(
                [b"\r", b"-\r", b"/", b"/a\r", b"\x0c", b"\x1b", PAGE_UP, PAGE_DOWN]
            )
            | some.builds(lambda text: b"/" + text.encode() + b"\r", texts),
            max_size=30,
        ),
        some.sampled_from([0, 1, 3, 24, 2**32 - 1]),
        some.sampled_from([0, 1, 10, 80, 2**32 - 1]),
        some.sampled_from([1, 1000, 1 << 30]),
    )
    def test_any_input(self, chunks: list[bytes], rows: int, columns: int, room: int) -> None:
        """Whatever is typed, on whatever screen: no error, and for each key an answer of at most a
        page; the same answers, when the client takes them late."""
        vms = [
            console(name) for name in ("a", "-", "q", "*b", "語", "\x1b[2J", *map(str, range(90)))
        ]
        page = len(self.show(vms, rows=2**32 - 1, columns=2**32 - 1)) + 200
        first = self.show(vms, rows=rows, columns=columns)
        self.transport.room = room
        output = ""
        for chunk in chunks:
            self.menu.dataReceived(chunk)
            output += self.transport.taken()
        for _ in range(1000):
            output += self.transport.taken()
        if not self.menu.chosen.called:
            self.assertEqual(self.menu._waiting, b"")
        typed = b"".join(chunks)
        keys = len(re.findall(rb"[\r\n\x0c~]", typed))
        self.assertLessEqual(len(first), page)
        self.assertLessEqual(len(output), keys * (page + 2 * 300) + 4 * len(typed))
        late = self.menu.chosen
        self.show(vms, rows=rows, columns=columns)
        self.assertEqual(self.type(typed), output)
        self.assertEqual(self.menu.chosen.called, late.called)
        if late.called:
            self.assertEqual(self.successResultOf(self.menu.chosen), self.successResultOf(late))


class SlowReaderTests(MenuTestCase):
    """A client that takes no output."""

    def setUp(self) -> None:
        self.show(MANY)
        self.transport.room = 100

    def test_pages_do_not_pile_up(self) -> None:
        """While it takes none, a screenful of output waits at most, whatever is typed; its input is
        held back, and answered when it takes more."""
        for key in (b"\r", b"\x0c", PAGE_DOWN, b"/vm\r", b"vm\r", b"x\r"):
            self.setUp()
            for _ in range(10):
                self.menu.dataReceived(key * 10)
            self.assertLess(len(self.transport.value()), 2000)
            self.assertEqual(self.transport.producerState, "paused")
            shown_pages = 0
            while self.menu._waiting:
                self.assertLess(len(self.transport.taken()), 2000)
                shown_pages += 1
            self.assertGreater(shown_pages, 40)
            self.assertEqual(self.transport.producerState, "producing")

    def test_end_of_input(self) -> None:
        """What was typed before the end of the input is answered first; when that took all, the
        menu is left at once."""
        self.menu.dataReceived(b"\r\r9\r")
        self.menu.readConnectionLost()
        self.assertNoResult(self.menu.chosen)
        self.transport.taken()
        self.transport.taken()
        self.assertEqual(self.successResultOf(self.menu.chosen), MANY[8])
        self.setUp()
        self.menu.dataReceived(b"\r")
        self.menu.readConnectionLost()
        self.assertIsNone(self.successResultOf(self.menu.chosen))

    def test_end_of_input_behind_a_page(self) -> None:
        """Without an answer before it, the end of the input leaves once all has been shown."""
        self.menu.dataReceived(b"\r\r")
        self.menu.readConnectionLost()
        self.assertNoResult(self.menu.chosen)
        self.transport.taken()
        self.assertIsNone(self.successResultOf(self.menu.chosen))

    def test_answer_waits(self) -> None:
        """A choice behind pages that wait is made once they are shown; what is typed ahead of the
        console stays in order."""
        self.menu.dataReceived(b"\r\r/vm09\r")
        self.menu.dataReceived(b"2\rroot\r")
        for _ in range(3):
            self.assertNoResult(self.menu.chosen)
            self.transport.taken()
        self.assertEqual(self.successResultOf(self.menu.chosen), MANY[9000])
        self.assertEqual(self.menu.rest, b"root\r")

    def test_takes_at_once(self) -> None:
        """A client that takes each answer while it is being written gets them all, in order."""

        class Quick(StringTransport):
            def write(self, data: bytes) -> None:
                super().write(data)
                if self.producer is not None:
                    self.producer.pauseProducing()
                    self.producer.resumeProducing()

        self.menu = MenuProtocol(Menu(VMS))
        self.menu.makeConnection(transport := Quick())
        transport.clear()
        self.menu.dataReceived(b"\r\rdb\rroot")
        self.assertEqual(transport.value(), b"\r\n> \r\n> db\r\n")
        self.assertEqual(self.menu.rest, b"root")


class Turns(Clock):
    """A clock on which each call comes in a turn of its own, as on the reactor."""

    def callLater(self, delay: float, *args: Any, **kwargs: Any) -> Any:
        return super().callLater(max(delay, 1), *args, **kwargs)


class PasteTests(MenuTestCase):
    """A text that is pasted, or typed by a program, into a menu with many VMs."""

    def setUp(self) -> None:
        self.clock = Turns()
        self.show(MANY, clock=self.clock)

    def answers(self) -> int:
        """How many answers were shown since the last time."""
        return self.transport.taken().count("\n> ")

    def test_turns(self) -> None:
        """After some answers that look through all VMs the input waits until everybody else had a
        turn; all of it is answered, and then the console's part is not touched."""
        self.menu.dataReceived(b"/vm00001\r" + b"x\r" * 20 + b"/vm\r" * 20 + b"7\rroot\r")
        self.assertEqual(self.transport.producerState, "paused")
        counts = [self.answers()]
        while self.clock.getDelayedCalls():
            self.clock.advance(1)
            counts.append(self.answers())
        self.assertEqual(sum(counts), 41)
        self.assertLess(len(counts), 20)
        self.assertLess(max(counts), 10)
        self.assertEqual(self.successResultOf(self.menu.chosen), MANY[6])
        self.assertEqual(self.menu.rest, b"root\r")

    def test_goes_on(self) -> None:
        """When all is answered the input flows again; keys and pages alone cost no turn."""
        self.menu.dataReceived(b"x\r" * 20)
        while self.clock.getDelayedCalls():
            self.clock.advance(1)
        self.assertEqual(self.transport.producerState, "producing")
        self.menu.dataReceived(b"abc\x15\r" * 20 + PAGE_DOWN * 20)
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_short_list(self) -> None:
        """With few VMs hundreds of answers cost no turn, but thousands do."""
        self.show(VMS, clock=self.clock)
        self.menu.dataReceived(b"x\r" * 300)
        self.assertEqual(self.answers(), 300)
        self.menu.dataReceived(b"x\r" * 5000)
        counts = [self.answers()]
        while self.clock.getDelayedCalls():
            self.clock.advance(1)
            counts.append(self.answers())
        self.assertEqual(sum(counts), 5000)
        self.assertLess(max(counts), 500)

    def test_junk(self) -> None:
        """What is no answer at all is echoed together, a piece in each turn."""
        self.show(VMS, clock=self.clock)
        self.answers()
        written: list[bytes] = []
        self.patch(self.transport, "write", written.append)
        self.menu.dataReceived(b"x" * 30000)
        self.assertLess(sum(map(len, written)), 7000)
        turns = 0
        while self.clock.getDelayedCalls():
            self.clock.advance(1)
            turns += 1
        self.assertEqual(sum(map(len, written)), 30000)
        self.assertLess(turns, 10)
        self.assertLess(len(written), 20)

    def test_leaves_meanwhile(self) -> None:
        """Who goes while the input waits leaves no call behind."""
        for cancel in (False, True):
            self.setUp()
            self.menu.dataReceived(b"x\r" * 20)
            self.assertEqual(len(self.clock.getDelayedCalls()), 1)
            if cancel:
                self.menu.chosen.cancel()
                self.failureResultOf(self.menu.chosen, CancelledError)
            else:
                self.menu.connectionLost()
            self.assertEqual(self.clock.getDelayedCalls(), [])
