"""``log VM``: what a guest printed, for scripts."""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import Deferred

from tests.fakes import console
from tests.test_sharing import BOB, QUERY, SharingTestCase
from vmconsole.config import Console as Settings
from vmconsole.console.terminal import RESET
from vmconsole.errors import ConsoleBusy, ConsoleGone


class LogTests(SharingTestCase):
    """``log VM``."""

    def follow(self, line: bytes = b"log vm1 --follow", **options: Any) -> Any:
        """Bob follows a console."""
        channel = self.bob.run(line, **options)
        self.flush()
        self.assertIsNone(channel.status, channel.error)
        return channel

    def test_log(self) -> None:
        """It prints what is kept, or the last bytes of that, without a pty; raw as it is, else
        without what a terminal would answer; the console is not touched."""
        self.on(self.alice)
        raw = QUERY + b"one\r\n\xfftwo"
        self.guests.guest.print(raw)
        for line, output in (
            (b"log vm1", b"one\r\n\xfftwo"),
            (b"log vm1 --raw", raw),
            (b"log vm1 --bytes 4 --raw", raw[-4:]),
            (b"log vm1 --bytes 3", b"two"),
            (b"log vm1 --bytes 0", b""),
            (b"log id-vm1 --raw --bytes 999999999999999999999999", raw),
        ):
            log = self.bob.run(line)
            self.assertEqual((log.output, log.error, log.status), (output, b"", 0))
        self.assertEqual(len(self.guests.guest.protocol.attachments), 1)

    def test_on_a_terminal(self) -> None:
        """On a terminal nothing of it acts: no query comes whose answer would go to the user's own
        shell, and at the end the terminal is set back."""
        self.on(self.alice)
        self.guests.guest.print(QUERY + b"one\x1b[31m")
        log = self.bob.run(b"log vm1", pty=True)
        self.assertEqual(log.output, b"one\x1b[31m" + RESET)
        log = self.follow(pty=True)
        for piece in (b"two\x1b[", b"6n", b"three"):
            self.guests.guest.print(piece)
            self.passes(1)
        self.type(log, b"\x03")
        self.assertEqual(log.output, b"one\x1b[31mtwothree" + RESET)

    def test_makes_no_sense(self) -> None:
        """A number of bytes that is none, and a VM that is missing, are errors; a VM of somebody
        else is none."""
        for line, status in (
            (b"log vm1 --bytes -1", 2),
            (b"log vm1 --bytes many", 2),
            (b"log", 2),
            (b"log vm9", 1),
        ):
            log = self.bob.run(line)
            self.assertEqual((log.status, log.output), (status, b""), line)
            self.assertTrue(log.error.startswith(b"ERROR: "))

    def test_not_open(self) -> None:
        """Of a console that nobody has open nothing is kept; of one that is being opened, nothing
        yet. Neither is opened."""
        self.assertEqual(self.bob.run(b"log vm1").status, 1)
        self.assertEqual(self.guests.asked, [])
        self.guests.answer = Deferred()
        self.on(self.alice)
        log = self.bob.run(b"log vm1")
        self.assertEqual((log.output, log.status), (b"", 0))

    def test_follow(self) -> None:
        """``--follow`` goes on with what comes, raw as it is, with no line of ours; Alice keeps the
        keyboard, and Bob's leaving is none of her business."""
        alice = self.on(self.alice)
        self.guests.guest.print(b"one ")
        self.guests.guest.print(b"two ")
        log = self.follow(b"log vm1 --bytes 6 --follow --raw")
        harmless = self.follow(b"log vm1 --bytes 6 --follow")
        self.guests.guest.print(QUERY)
        self.passes(1)
        self.type(log, b"lost")
        self.type(alice, b"\x1dt\x1dr")
        self.assertEqual(log.output, b"e two " + QUERY)
        self.assertEqual(harmless.output, b"e two ")
        self.lines(alice)
        self.bob.connection.sendClose(log)
        self.bob.connection.sendClose(harmless)
        self.flush()
        self.assertTrue(log.gone)
        self.assertEqual(self.lines(alice), [])
        self.assertEqual((len(self.guests.guest.protocol.attachments), self.typed), (1, b""))

    def test_follow_opens(self) -> None:
        """It opens a console that is not open, and has no keyboard: who comes later does."""
        log = self.follow()
        self.guests.guest.print(b"boot")
        alice = self.on(self.alice)
        self.type(alice, b"x\x1d.")
        self.assertEqual((log.output, self.typed), (b"boot", b"x"))
        self.assertTrue(self.guests.guest.open)

    def test_ctrl_c(self) -> None:
        """Ctrl-C on a terminal ends it, with 0; with the console when nobody else is there."""
        log = self.follow(pty=True)
        self.type(log, b"\x03")
        self.assertEqual((log.status, log.error), (0, b""))
        self.assertFalse(self.guests.guest.open)
        [detached] = self.alice.events.named("detached")
        self.assertEqual(detached["reason"], "The reader left.")
        self.assertEqual(len(self.alice.events.named("attached")), 1)

    def test_ctrl_c_while_connecting(self) -> None:
        """So it does while the console is being opened, and before it is even asked for."""
        self.guests.answer = Deferred()
        log = self.follow(pty=True)
        self.type(log, b"\x03")
        self.assertEqual((log.status, log.output), (0, b""))
        self.assertEqual((self.guests.cancelled, len(self.pool)), (1, 0))
        gate: Deferred[None] = Deferred()
        self.engine.consoles_gate = gate
        self.passes(10)
        log = self.follow(pty=True)
        self.type(log, b"\x03")
        gate.callback(None)
        self.flush()
        self.assertEqual(log.status, 0)
        self.assertEqual(len(self.guests.asked), 1)

    def test_end_of_input(self) -> None:
        """The end of its input, as a script's, does not end it."""
        log = self.follow()
        self.bob.connection.sendEOF(log)
        self.passes(60)
        self.guests.guest.print(b"on")
        self.flush()
        self.assertEqual((log.output, log.status), (b"on", None))

    def test_console_ends(self) -> None:
        """When the console ends all that was printed is there, and the reason is an error."""
        log = self.follow()
        for word in (b"last ", b"words"):
            self.guests.guest.print(word)
        self.guests.guest.end(ConsoleGone("vm1 was shut off."))
        self.flush()
        self.assertEqual(log.output, b"last words")
        self.assertEqual((log.error, log.status), (b"ERROR: vm1 was shut off.\n", 1))

    def test_cannot_open(self) -> None:
        """A console that cannot be opened is an error, and audited."""
        self.guests.answer = ConsoleBusy("In use.")
        log = self.bob.run(b"log vm1 --follow")
        self.assertEqual((log.error, log.status), (b"ERROR: In use.\n", 1))
        [failed] = self.alice.events.named("attach_failed")
        self.assertEqual(failed["reason"], "In use.")

    def test_closed_while_connecting(self) -> None:
        """A channel that is closed while the console is being opened leaves nothing behind."""
        self.guests.answer = Deferred()
        log = self.follow()
        self.bob.connection.sendClose(log)
        self.flush()
        self.assertEqual((self.guests.cancelled, len(self.pool)), (1, 0))

    def test_slow_reader(self) -> None:
        """A reader who is slow gets what the backlog holds; the gap is said."""
        self.settings = Settings(linger=0.0, backlog=1000)
        self.setUp()
        log = self.follow(window=100, reads_no_more=True)
        for number in range(200):
            self.guests.guest.print(b"%04d\n" % number * 10)
            self.passes(0.1)
        [attachment] = self.guests.guest.protocol.attachments
        self.assertLessEqual(len(attachment._backlog), 1000)
        self.bob.connection.grant(log, 1 << 20)
        self.flush()
        self.assertLess(len(log.output), 1300)
        self.assertIn(b" bytes dropped]\r\n", log.output)
        self.assertTrue(log.output.endswith(b"0199\n" * 10))

    def test_permission_ends(self) -> None:
        """When the VM is no longer the reader's it ends, and says why."""
        self.looks_again()
        log = self.follow()
        self.engine.vms[BOB.id] = [console("vm2")]
        for _ in range(30):
            self.passes(1.5)
        self.assertEqual(log.error, b"ERROR: You no longer have access to vm1.\n")
        self.assertEqual(log.status, 1)
