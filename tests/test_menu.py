"""The menu, and which console an answer means."""

from __future__ import annotations

from twisted.internet.testing import StringTransport
from twisted.trial.unittest import SynchronousTestCase

from tests.fakes import console
from vmconsole.console.choice import (
    AmbiguousConsole,
    NoSuchConsole,
    by_id,
    by_name,
    by_text,
)
from vmconsole.console.menu import Menu, MenuProtocol

VMS = [console("db", "11-aa"), console("web1", "22-bb"), console("web2", "33-cc")]


class ChoiceTests(SynchronousTestCase):
    """By id, by name, by a beginning."""

    def test_exact(self) -> None:
        """An id in any case, or a name, finds its VM."""
        self.assertEqual(by_id(VMS, "22-BB").vm_name, "web1")
        self.assertEqual(by_name(VMS, "db").vm_id, "11-aa")

    def test_beginning(self) -> None:
        """The beginning of one name or id will do; of several, they are listed."""
        self.assertEqual(by_text(VMS, "d").vm_name, "db")
        self.assertEqual(by_text(VMS, "33").vm_name, "web2")
        self.assertEqual(by_text(VMS, "22-B").vm_name, "web1")
        with self.assertRaises(AmbiguousConsole) as caught:
            by_text(VMS, "web")
        self.assertIn("web1 [22-bb], web2 [33-cc]", str(caught.exception))

    def test_exact_before_beginning(self) -> None:
        """A name that others begin with means itself."""
        self.assertEqual(by_text([console("web"), *VMS], "web").vm_name, "web")

    def test_same_name_twice(self) -> None:
        """Two VMs of one name are told apart by id only; the text lists the ids."""
        twins = [console("a", "1"), console("a", "2")]
        for find in (by_name, by_text):
            with self.assertRaises(AmbiguousConsole) as caught:
                find(twins, "a")
            self.assertIn("a [1], a [2]", str(caught.exception))

    def test_nothing(self) -> None:
        """An unknown name, and no name at all, are none."""
        for text in ("nope", ""):
            self.assertRaises(NoSuchConsole, by_text, VMS, text)
        self.assertRaises(NoSuchConsole, by_name, VMS, "web")
        self.assertRaises(NoSuchConsole, by_id, VMS, "22")


class MenuTests(SynchronousTestCase):
    """What is shown and what is understood."""

    def test_render(self) -> None:
        """A numbered line for each VM, names escaped."""
        self.assertEqual(
            Menu([console("a\x1b", "1"), console("b", "2")]).render(), "1. a\\x1b [1]\n2. b [2]\n"
        )

    def test_choose(self) -> None:
        """A number of the list, a name, an id, a beginning."""
        menu = Menu(VMS)
        for answer, name in (("1", "db"), ("web1", "web1"), ("33-cc", "web2"), ("d", "db")):
            self.assertEqual(menu.choose(answer).vm_name, name)

    def test_number_out_of_range(self) -> None:
        """0, and a number past the end, are told with what there is."""
        for answer in ("0", "4", "9" * 50):
            with self.assertRaises(NoSuchConsole) as caught:
                Menu(VMS).choose(answer)
            self.assertIn("choose 1 to 3", str(caught.exception))

    def test_name_of_digits(self) -> None:
        """A VM that is called by a number is found by that name."""
        self.assertEqual(Menu([console("a"), console("1", "x")]).choose("1").vm_id, "x")


class MenuProtocolTests(SynchronousTestCase):
    """Keys on a terminal in raw mode."""

    def setUp(self) -> None:
        self.menu = MenuProtocol(Menu(VMS))
        self.transport = StringTransport()
        self.menu.makeConnection(self.transport)
        self.transport.clear()

    def test_echo_and_corrections(self) -> None:
        """Keys echo; backspace and ^U take back; arrow keys do nothing."""
        self.menu.dataReceived(b"zz\x15we\x1b[A\x1bOBX\x7f")
        self.menu.dataReceived(b"b2\r")
        self.assertEqual(self.successResultOf(self.menu.chosen), VMS[2])
        self.assertEqual(self.transport.value(), b"zz\b \b\b \bweX\b \bb2\r\n")

    def test_split_utf8(self) -> None:
        """A character whose bytes come one by one is one character."""
        for byte in "é".encode():
            self.menu.dataReceived(bytes([byte]))
        self.assertEqual(self.transport.value(), "é".encode())

    def test_empty_line(self) -> None:
        """Enter alone asks again."""
        self.menu.dataReceived(b"\r")
        self.assertEqual(self.transport.value(), b"\r\n> ")
        self.assertNoResult(self.menu.chosen)

    def test_endless_line(self) -> None:
        """A line without an end rings the bell, and is not kept."""
        self.menu.dataReceived(b"x" * 100000)
        self.assertLessEqual(len(self.menu._line), 300)

    def test_answer_is_escaped(self) -> None:
        """What comes back in a message cannot act on the terminal."""
        self.menu.dataReceived("\u202e\r".encode())
        self.assertNotIn("\u202e".encode(), self.transport.value())
