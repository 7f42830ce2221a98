"""Consoles, attachments, and the pool of them."""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.error import ConnectionDone
from twisted.internet.interfaces import IConsumer, IPushProducer, ITransport
from twisted.internet.protocol import Protocol
from twisted.internet.task import Clock
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase
from zope.interface.verify import verifyObject

from tests.fakes import Engine, Guests, console
from vmconsole.console.console import Attachment, ConsolePool
from vmconsole.errors import ConsoleBusy, ConsoleGone, HostUnreachable
from vmconsole.interfaces import IConsoleEndpoints, IConsoleTransport, IEngine

VM1, VM2 = console("vm1"), console("vm2")


class Terminal(Protocol):
    """Collects what the guest prints, and why it ended."""

    def __init__(self) -> None:
        self.seen = b""
        self.lost: Failure | None = None

    def dataReceived(self, data: bytes) -> None:
        self.seen += data

    def connectionLost(self, reason: Any = None) -> None:
        self.lost = reason


class PoolTests(SynchronousTestCase):
    """With guests in memory."""

    def setUp(self) -> None:
        self.guests = Guests()
        self.clock = Clock()
        self.pool = ConsolePool(self.guests, self.clock, 1000)
        self.pool.startService()
        self.terminal = Terminal()

    def attach(self, info: Any = VM1) -> Deferred[Attachment]:
        """Alice opens a console."""
        return Deferred.fromCoroutine(self.pool.attach(info, "alice from ::1", self.terminal))

    def test_doubles(self) -> None:
        """The doubles of the tests are what the seams promise."""
        verifyObject(IConsoleEndpoints, self.guests)
        verifyObject(IEngine, Engine())
        self.successResultOf(self.attach())
        verifyObject(IConsoleTransport, self.guests.guest)

    def test_attachment(self) -> None:
        """An attachment is a transport, and a producer; it counts the bytes both ways."""
        attachment = self.successResultOf(self.attach())
        for interface in (ITransport, IConsumer, IPushProducer):
            verifyObject(interface, attachment)
        attachment.writeSequence([b"ab", b"c"])
        self.guests.guest.print(b"12345")
        self.assertEqual((self.guests.guest.typed, self.terminal.seen), (b"abc", b"12345"))
        self.assertEqual((attachment.bytes_in, attachment.bytes_out), (3, 5))

    def test_first_words(self) -> None:
        """What the guest prints the moment that the stream opens is not lost."""

        class Eager(Terminal):
            def connectionMade(terminal) -> None:
                self.guests.guest.print(b"first words")

        self.terminal = Eager()
        self.successResultOf(self.attach())
        self.assertEqual(self.terminal.seen, b"first words")

    def test_busy(self) -> None:
        """The second one is told who has it, also while it is still being opened; another VM is
        no matter."""
        gate: Deferred[None] = Deferred()
        self.guests.answer = gate
        first = self.attach()
        busy = self.failureResultOf(self.attach(), ConsoleBusy)
        self.assertIn("in use by alice from ::1", str(busy.value))
        gate.callback(None)
        self.successResultOf(first)
        self.failureResultOf(self.attach(), ConsoleBusy)
        self.guests.answer = None
        self.successResultOf(self.attach(VM2))

    def test_free_again(self) -> None:
        """A console is free after it was left, after it ended, after it failed to open, and after
        its user gave up."""
        self.successResultOf(self.attach()).loseConnection()
        self.successResultOf(self.attach())
        self.guests.guest.end(ConsoleGone("gone"))
        self.guests.answer = HostUnreachable("no")
        self.failureResultOf(self.attach(), HostUnreachable)
        self.guests.answer = Deferred()
        waiting = self.attach()
        waiting.cancel()
        self.failureResultOf(waiting, CancelledError)
        self.guests.answer = None
        self.successResultOf(self.attach())
        self.assertEqual(len(self.pool), 1)

    def test_no_endpoint(self) -> None:
        """A console to which there is not even a way is free again, too."""
        self.guests.console_endpoint = None  # type: ignore[assignment, method-assign]
        self.failureResultOf(self.attach(), TypeError)
        self.assertEqual(len(self.pool), 0)

    def test_leave(self) -> None:
        """Leaving closes the stream and tells the protocol, once."""
        attachment = self.successResultOf(self.attach())
        attachment.loseConnection()
        attachment.loseConnection()
        self.assertFalse(self.guests.guest.open)
        assert self.terminal.lost is not None
        self.terminal.lost.trap(ConnectionDone)
        attachment.write(b"too late")
        self.assertEqual(self.guests.guest.typed, b"")

    def test_slow_reader(self) -> None:
        """A paused attachment keeps the newest output, in order, and gives it on resumption;
        what it kept is handed over also when the console ends."""
        attachment = self.successResultOf(self.attach())
        attachment.pauseProducing()
        self.guests.guest.print(b"one ")
        self.guests.guest.print(b"two ")
        self.assertEqual(self.terminal.seen, b"")
        attachment.resumeProducing()
        self.assertEqual(self.terminal.seen, b"one two ")
        attachment.pauseProducing()
        self.guests.guest.print(b"three")
        self.guests.guest.end(ConsoleGone("gone"))
        self.assertEqual(self.terminal.seen, b"one two three")

    def test_order_in_a_drain(self) -> None:
        """What is printed while the backlog is handed over comes after it."""

        class Prompting(Terminal):
            def dataReceived(terminal, data: bytes) -> None:
                super().dataReceived(data)
                if len(terminal.seen) == len(data):
                    self.guests.guest.print(b"late")

        self.pool = ConsolePool(self.guests, self.clock, 100000)
        self.terminal = Prompting()
        attachment = self.successResultOf(self.attach())
        attachment.pauseProducing()
        self.guests.guest.print(b"a" * 50000)
        attachment.resumeProducing()
        self.assertEqual(self.terminal.seen, b"a" * 50000 + b"late")

    def test_stop(self) -> None:
        """When the proxy stops, every console is closed and its user told."""
        self.successResultOf(self.attach())
        self.pool.stopService()
        assert self.terminal.lost is not None
        self.assertIsInstance(self.terminal.lost.value, ConsoleGone)
        self.assertFalse(self.guests.guest.open)
        self.assertEqual(len(self.pool), 0)
