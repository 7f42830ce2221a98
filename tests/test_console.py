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
from vmconsole.config import Console as Settings
from vmconsole.console import console as console_module
from vmconsole.console.attachment import Attachment, Party
from vmconsole.console.pool import ConsolePool
from vmconsole.console.who import describe_all
from vmconsole.errors import ConsoleGone, ConsoleInterrupted, HostUnreachable
from vmconsole.interfaces import IConsoleEndpoints, IConsoleTransport, IEngine, Role

VM1, VM2 = console("vm1"), console("vm2")
ALICE, BOB = Party("alice", "192.0.2.1"), Party("bob", "192.0.2.2")


class Terminal(Protocol):
    """Collects what the guest prints, and why it ended."""

    def __init__(self) -> None:
        self.seen = b""
        self.told: list[str] = []
        self.lost: Failure | None = None

    def begun(self) -> None:
        pass

    def tell(self, text: str, hint: str = "") -> None:
        self.told.append(f"{text} {hint}".rstrip())

    def waiting(self, reason: str) -> None:
        self.told.append(f"waiting: {reason}")

    def interrupted(self, reason: ConsoleInterrupted, patience: float) -> None:
        self.told.append(f"interrupted for {patience:.0f} s: {reason}")

    def resumed(self) -> None:
        self.told.append("resumed")

    def revoked(self, reason: str) -> None:
        self.told.append(f"revoked: {reason}")
        assert self.transport is not None
        self.transport.loseConnection()

    def role_changed(self, role: Role) -> None:
        self.told.append(role)

    def dataReceived(self, data: bytes) -> None:
        self.seen += data

    def connectionLost(self, reason: Any = None) -> None:
        self.lost = reason


class PoolTestCase(SynchronousTestCase):
    """With guests in memory."""

    def setUp(self) -> None:
        self.guests = Guests()
        self.clock = Clock()
        self.make_pool(linger=0.0, backlog=1000)
        self.terminal = Terminal()

    def make_pool(self, **settings: Any) -> None:
        """A pool with these settings."""
        self.pool = ConsolePool(self.guests, self.clock, Settings(**settings))
        self.pool.startService()

    def attach(
        self, info: Any = VM1, party: Party = ALICE, terminal: Terminal | None = None
    ) -> Deferred[Attachment]:
        """Somebody attaches to a console."""
        return Deferred.fromCoroutine(self.pool.attach(info, party, terminal or self.terminal))

    def attached(self, party: Party = ALICE) -> tuple[Attachment, Terminal]:
        """Somebody is attached to vm1, with a terminal of their own."""
        terminal = Terminal()
        return self.successResultOf(self.attach(VM1, party, terminal)), terminal


class PoolTests(PoolTestCase):
    """One console, or several."""

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

    def test_first_words_for_two(self) -> None:
        """Of two who wait for a console the second gets them once it is attached, too, and once."""

        class Eager(Terminal):
            def connectionMade(terminal) -> None:
                self.guests.guest.print(b"first words")

            def begun(terminal) -> None:
                terminal.transport.replay(b"")  # type: ignore[union-attr]

        gate: Deferred[None] = Deferred()
        self.guests.answer = gate
        first, second = Eager(), Terminal()
        second.begun = lambda: second.transport.replay(b"")  # type: ignore
        for terminal in (first, second):
            self.attach(VM1, ALICE, terminal)
        gate.callback(None)
        self.assertEqual(second.seen, b"\x1b[mfirst words")

    def test_shared(self) -> None:
        """Everybody who is attached to a console gets its output; one stream is open."""
        (_, first), (_, second) = self.attached(), self.attached(BOB)
        self.guests.guest.print(b"login: ")
        self.assertEqual((first.seen, second.seen), (b"login: ", b"login: "))
        self.assertEqual((len(self.guests.opened), len(self.pool)), (1, 1))
        self.successResultOf(self.attach(VM2))
        self.assertEqual(len(self.guests.opened), 2)

    def test_one_types(self) -> None:
        """Only who has the keyboard types into the guest: the first, until they leave."""
        (first, _), (second, told) = self.attached(), self.attached(BOB)
        second.write(b"no")
        first.write(b"a")
        first.loseConnection()
        second.write(b"b")
        self.assertEqual(self.guests.guest.typed, b"ab")
        self.assertEqual(
            told.told,
            [
                "You watch. alice from 192.0.2.1 has the keyboard, held for 0 seconds, idle for 0 "
                "seconds. {key} t asks for the keyboard.",
                "alice from 192.0.2.1 left. You have the keyboard.",
            ],
        )
        self.assertEqual((first.bytes_in, second.bytes_in), (1, 1))

    def test_opened_together(self) -> None:
        """Who comes while a console is being opened waits for the same stream; the first who
        gives up does not spoil it for the second, the last one ends it."""
        gate: Deferred[None] = Deferred()
        self.guests.answer = gate
        first, second = self.attach(), self.attach(VM1, BOB, Terminal())
        first.cancel()
        self.failureResultOf(first, CancelledError)
        self.assertEqual(self.guests.cancelled, 0)
        gate.callback(None)
        attachment = self.successResultOf(second)
        self.assertTrue(attachment.has_keyboard)
        attachment.loseConnection()
        self.guests.answer = Deferred()
        both = [self.attach(), self.attach(VM1, BOB, Terminal())]
        for each in both:
            each.cancel()
            self.failureResultOf(each, CancelledError)
        self.assertEqual((self.guests.cancelled, len(self.pool)), (1, 0))

    def test_failed_together(self) -> None:
        """A console that cannot be opened fails for all who wait for it."""
        gate: Deferred[None] = Deferred()
        self.guests.answer = gate
        both = [self.attach(), self.attach(VM1, BOB, Terminal())]
        gate.errback(HostUnreachable("no"))
        for each in both:
            self.failureResultOf(each, HostUnreachable)
        self.assertEqual(len(self.pool), 0)

    def test_linger(self) -> None:
        """After the last one left the stream stays open for a while, and what the guest prints
        meanwhile is kept; somebody who comes back stops the clock."""
        self.make_pool(linger=60.0)
        first, _ = self.attached()
        self.guests.guest.print(b"one\n")
        first.loseConnection()
        self.clock.advance(59)
        self.guests.guest.print(b"two\n")
        second, terminal = self.attached(BOB)
        self.assertTrue(second.has_keyboard)
        self.assertTrue(second.replay(b"Before: "))
        self.assertEqual(terminal.seen, b"Before: \x1b[mone\ntwo\n")
        self.assertEqual(terminal.told, [])
        self.clock.advance(120)
        self.assertTrue(self.guests.guest.open)
        second.loseConnection()
        self.clock.advance(60)
        self.assertFalse(self.guests.guest.open)
        self.assertEqual((len(self.pool), len(self.guests.opened)), (0, 1))

    def test_no_linger_when_stuck(self) -> None:
        """A guest that takes no input is closed soon: what waits for it would be typed for
        somebody else. Its host is asked whether it took what was typed last."""
        for unsent in (5, 0):
            self.make_pool(linger=60.0)
            first, _ = self.attached()
            guest = self.guests.guest
            guest.unsent = 5
            first.loseConnection()
            self.assertEqual((guest.open, guest.confirmations), (True, 1))
            guest.unsent = unsent
            self.clock.advance(1)
            self.assertEqual(guest.open, not unsent)

    def test_gathered(self) -> None:
        """Output goes on at once, some 30 times in 4 ms; what comes sooner is gathered, and so is
        all that follows until the guest pauses."""
        _, terminal = self.attached()
        pieces: list[bytes] = []
        terminal.dataReceived = pieces.append  # type: ignore[method-assign]
        for _ in range(2):
            for _ in range(40):
                self.guests.guest.print(b"x")
            self.assertEqual(pieces, [b"x"] * 32)
            for _ in range(3):
                pieces.clear()
                self.clock.advance(0.0041)
                self.assertEqual(pieces, [b"x" * 8])
                for _ in range(8):
                    self.guests.guest.print(b"x")
            self.clock.advance(0.0041)
            pieces.clear()
            self.clock.advance(0.01)

    def test_keystrokes(self) -> None:
        """Echoes that come one after the other, however fast somebody types, never wait."""
        _, terminal = self.attached()
        for count in range(1, 1000):
            self.guests.guest.print(b"x")
            self.assertEqual(len(terminal.seen), count)
            self.clock.advance(0.0003)

    def test_gathered_at_the_end(self) -> None:
        """What is gathered is not lost when the console ends, and comes before the end."""
        self.patch(console_module, "_AT_ONCE", 1)
        _, terminal = self.attached()
        for word in (b"last ", b"words"):
            self.guests.guest.print(word)
        self.guests.guest.end(ConsoleGone("gone"))
        self.assertEqual(terminal.seen, b"last words")
        self.assertEqual(self.clock.getDelayedCalls(), [])

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
        failure = self.failureResultOf(self.attach(), ConsoleGone)
        self.assertIn("this is its own fault", str(failure.value))
        self.assertEqual(len(self.flushLoggedErrors(TypeError)), 1)
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
        self.clock.advance(1)
        self.assertEqual(self.terminal.seen, b"")
        attachment.resumeProducing()
        self.assertEqual(self.terminal.seen, b"one two ")
        attachment.pauseProducing()
        self.clock.advance(1)
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

        self.make_pool(linger=0.0, backlog=100000)
        self.terminal = Prompting()
        attachment = self.successResultOf(self.attach())
        attachment.pauseProducing()
        self.guests.guest.print(b"a" * 50000)
        self.clock.advance(1)
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


class GatheredTests(PoolTestCase):
    """Output that waits some milliseconds, when something else happens meanwhile."""

    def gathered(self) -> tuple[Attachment, Terminal]:
        """Alice has seen "one "; "two " is still gathered."""
        self.patch(console_module, "_AT_ONCE", 1)
        attachment, terminal = self.attached()
        for word in (b"one ", b"two "):
            self.guests.guest.print(word)
        self.assertEqual(terminal.seen, b"one ")
        return attachment, terminal

    def test_somebody_comes(self) -> None:
        """Who comes sees nothing twice, and the others miss nothing."""
        _, terminal = self.gathered()
        newcomer, late = self.attached(BOB)
        newcomer.replay(b"")
        self.clock.advance(1)
        self.guests.guest.print(b"three")
        self.assertEqual(terminal.seen, b"one two three")
        self.assertEqual(late.seen, b"\x1b[mone two three")
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_replay(self) -> None:
        """What is shown again is so once, and after what was gathered; twice, it is there twice."""
        attachment, terminal = self.gathered()
        attachment.replay(b"1:")
        attachment.replay(b"2:")
        self.clock.advance(1)
        again = b"\x1b[mone two "
        self.assertEqual(terminal.seen, b"one two 1:" + again + b"2:" + again)

    def test_end(self) -> None:
        """When the proxy ends a console, the last words come first."""
        _, terminal = self.gathered()
        self.pool.stopService()
        self.assertEqual(terminal.seen, b"one two ")
        self.assertEqual(self.clock.getDelayedCalls(), [])


QUERY = b"\x1b[6n"


class QueryTests(PoolTestCase):
    """What a guest asks of a terminal reaches that of the holder alone: the others would answer,
    too, into nowhere."""

    def setUp(self) -> None:
        super().setUp()
        self.alice, self.alices = self.attached()
        self.bob, self.bobs = self.attached(BOB)
        for each in (self.alice, self.bob):
            each.replay(b"")

    def prints(self, data: bytes) -> tuple[bytes, bytes]:
        """The guest prints; what Alice and Bob see of it."""
        for terminal in (self.alices, self.bobs):
            terminal.seen = b""
        self.guests.guest.print(data)
        self.clock.advance(1)
        return self.alices.seen, self.bobs.seen

    def give(self) -> None:
        """Alice gives the keyboard to Bob; what the terminals see then is of interest."""
        for terminal in (self.alices, self.bobs):
            terminal.seen = b""
        self.bob.console.keyboard.ask(self.bob)
        self.bob.console.keyboard.ask(self.alice)
        self.assertTrue(self.bob.has_keyboard)

    def test_watcher(self) -> None:
        """Who watches gets no query, however it is split; who has the keyboard gets it."""
        self.assertEqual(self.prints(b"a" + QUERY + b"b"), (b"a" + QUERY + b"b", b"ab"))
        for byte in QUERY:
            self.assertEqual(self.prints(bytes([byte])), (bytes([byte]), b""))

    def test_passes_on(self) -> None:
        """With the keyboard the queries pass to the other; it is seen at once."""
        self.give()
        self.assertEqual(self.prints(b"a" + QUERY), (b"a", b"a" + QUERY))
        self.bob.loseConnection()
        self.assertTrue(self.alice.has_keyboard)
        self.assertEqual(self.prints(b"a" + QUERY)[0], b"a" + QUERY)

    def test_passes_within_a_query(self) -> None:
        """When it passes in the middle of a query neither terminal gets that as a whole, nor the
        rest of it as text; that of the old holder is told to give up what has begun."""
        self.prints(b"\x1b[6")
        self.give()
        self.assertEqual((self.alices.seen, self.bobs.seen), (b"\x18\x1b\\", b""))
        self.assertEqual(self.prints(b"nrest"), (b"rest", b"rest"))
        self.assertEqual(self.prints(QUERY), (b"", QUERY))

    def test_passes_within_a_colour(self) -> None:
        """A harmless sequence in whose middle it passes is whole for both."""
        self.prints(b"\x1b[3")
        self.give()
        self.assertEqual(self.prints(b"1mred"), (b"\x1b[31mred", b"\x1b[31mred"))

    def test_passes_between(self) -> None:
        """Between two sequences nothing is added."""
        self.prints(b"text")
        self.give()
        self.assertEqual((self.alices.seen, self.bobs.seen), (b"", b""))

    def test_passes_while_gathering(self) -> None:
        """What was printed before belongs to who had the keyboard then."""
        self.patch(console_module, "_AT_ONCE", 1)
        self.prints(b"x")
        self.guests.guest.print(b"1")
        self.guests.guest.print(QUERY)
        self.give()
        self.assertEqual((self.alices.seen, self.bobs.seen), (QUERY, b""))

    def test_slow_holder(self) -> None:
        """Of what a slow holder has not seen yet when it passes, no query is left."""
        self.alice.pauseProducing()
        self.prints(b"one" + QUERY + b"two\x1b[3")
        self.give()
        self.prints(b"1mred")
        self.alice.resumeProducing()
        self.assertEqual(self.alices.seen, b"\x18\x1b\\onetwo\x1b[31mred")
        self.assertEqual(self.prints(QUERY + b"on"), (b"on", QUERY + b"on"))

    def test_replay_of_the_holder(self) -> None:
        """After a replay the holder gets queries as before."""
        self.prints(b"a" + QUERY + b"\x1b[")
        self.alices.seen = b""
        self.alice.replay(b"")
        self.assertEqual(self.alices.seen, b"\x1b[ma")
        self.assertEqual(self.prints(b"6nb" + QUERY)[0], b"b" + QUERY)

    def test_raw(self) -> None:
        """What is no terminal gets all as it is: it never asked for a replay."""
        _, tail = self.attached(Party("carol", "192.0.2.3", watch=True))
        self.prints(QUERY)
        self.assertEqual(tail.seen, QUERY)

    def test_slow_watcher_of_nothing(self) -> None:
        """Output of which nothing is left takes no room in the backlog of a slow watcher."""
        self.bob.pauseProducing()
        for _ in range(100):
            self.prints(QUERY)
        self.assertEqual(len(self.bob._backlog._pieces), 0)


class Typing:
    """A user's channel, which is held back."""

    def __init__(self, events: list[str], name: str) -> None:
        self.events = events
        self.name = name

    def pauseProducing(self) -> None:
        self.events.append(f"{self.name} waits")

    def resumeProducing(self) -> None:
        self.events.append(f"{self.name} goes on")

    def stopProducing(self) -> None:
        self.events.append(f"{self.name} stops")


class HeldTests(PoolTestCase):
    """Input that is held: by the guest, or while a SysRq is under way."""

    def setUp(self) -> None:
        super().setUp()
        self.events: list[str] = []
        self.alice, _ = self.attached()
        self.bob, _ = self.attached(BOB)
        self.console = self.alice.console
        self.alice.registerProducer(Typing(self.events, "alice"), True)  # type: ignore[arg-type]

    def taken(self) -> list[str]:
        """What happened since the last time."""
        events = list(self.events)
        self.events.clear()
        return events

    def test_guest(self) -> None:
        """While the guest takes no input all who may come to type wait, also who comes then, and
        the keyboard passes all the same."""
        self.console.pauseProducing()
        self.bob.registerProducer(Typing(self.events, "bob"), True)  # type: ignore[arg-type]
        self.assertEqual(self.taken(), ["alice waits", "bob waits"])
        self.alice.write(b"a")
        self.alice.loseConnection()
        self.bob.write(b"b")
        self.assertEqual(self.guests.guest.typed, b"ab")
        self.console.resumeProducing()
        self.assertEqual(self.taken(), ["bob goes on"])

    def test_sysrq(self) -> None:
        """What is typed between BREAK and its key comes after the key, whoever typed it: also when
        the keyboard has passed, and when its old holder is gone."""
        held = self.console.hold_input()
        self.bob.registerProducer(Typing(self.events, "bob"), True)  # type: ignore[arg-type]
        self.assertEqual(self.taken(), ["alice waits", "bob waits"])
        self.alice.write(b"from alice ")
        self.alice.loseConnection()
        self.bob.write(b"from bob")
        self.assertEqual((self.guests.guest.typed, self.bob.unsent), (b"", 19))
        self.console.release_input(held, b"h")
        self.assertEqual(self.guests.guest.typed, b"hfrom alice from bob")
        self.assertEqual((self.taken(), self.bob.unsent), (["bob goes on"], 0))

    def test_both(self) -> None:
        """Who types goes on only when neither holds any more."""
        held = self.console.hold_input()
        self.console.pauseProducing()
        self.bob.registerProducer(Typing(self.events, "bob"), True)  # type: ignore[arg-type]
        self.taken()
        self.console.resumeProducing()
        self.assertEqual(self.taken(), [])
        self.console.pauseProducing()
        self.console.release_input(held, b"h")
        self.assertNotIn("alice goes on", self.taken())
        self.console.resumeProducing()
        self.assertEqual(self.taken(), ["alice goes on", "bob goes on"])

    def test_ended_meanwhile(self) -> None:
        """A console that ends meanwhile gets no key."""
        held = self.console.hold_input()
        self.guests.guest.end(ConsoleGone("gone"))
        self.console.release_input(held, b"h")
        self.assertEqual(self.guests.guest.typed, b"")


class SharedTests(PoolTestCase):
    """Several on one console."""

    def test_request_ends_with_the_console(self) -> None:
        """A request that waits when the console ends is forgotten: nobody is told anything more,
        and nothing is left that would pass the keyboard."""
        for end in (
            lambda: self.guests.guest.end(ConsoleGone("gone")),
            lambda: self.pool.stopService(),
        ):
            self.make_pool(linger=0.0)
            (alice, _), (bob, terminal) = self.attached(), self.attached(BOB)
            bob.console.keyboard.ask(bob)
            told = list(terminal.told)
            end()
            self.clock.advance(100)
            self.assertEqual(terminal.told, told)
            self.assertEqual(self.clock.getDelayedCalls(), [])
            self.assertEqual((len(self.pool), alice.console.attachments), (0, []))

    def test_role(self) -> None:
        """Who may only watch from now on types into nothing, and the next one does; back, they
        wait for it as anybody does."""
        (alice, _), (bob, _) = self.attached(), self.attached(BOB)
        alice.change_role("viewer")
        alice.write(b"a")
        bob.write(b"b")
        alice.change_role("operator")
        alice.write(b"a")
        self.assertEqual(self.guests.guest.typed, b"b")
        bob.loseConnection()
        alice.write(b"a")
        self.assertEqual(self.guests.guest.typed, b"ba")
        self.assertEqual(alice.bytes_in, 1)

    def test_linger_and_a_viewer(self) -> None:
        """On a console that lingers, one who wants the keyboard has it; one who does not, not."""
        self.make_pool(linger=60.0)
        self.attached()[0].loseConnection()
        watcher, terminal = self.attached(Party("bob", "192.0.2.2", watch=True))
        self.assertFalse(watcher.has_keyboard)
        self.assertIn("Nobody has the keyboard.", terminal.told[0])
        watcher.loseConnection()
        self.assertTrue(self.attached()[0].has_keyboard)
        self.assertEqual(len(self.guests.opened), 1)

    def test_no_linger_when_held(self) -> None:
        """What is held for a guest counts as what it has not taken."""
        self.make_pool(linger=60.0)
        alice, _ = self.attached()
        held = alice.console.hold_input()
        alice.write(b"rm -rf")
        alice.loseConnection()
        alice.console.release_input(held, b"h")
        self.assertEqual((self.guests.guest.open, self.guests.guest.typed), (False, b""))

    def test_leaves_at_once(self) -> None:
        """Who leaves the moment that the console opens leaves nothing behind."""

        class Leaving(Terminal):
            def connectionMade(terminal) -> None:
                assert terminal.transport is not None
                terminal.transport.loseConnection()

        self.terminal = Leaving()
        self.attached(BOB)
        attachment = self.successResultOf(self.attach())
        self.assertEqual(len(attachment.console.attachments), 1)
        self.assertFalse(attachment.has_keyboard)
        self.assertEqual(self.terminal.told, [])

    def test_gone_in_a_burst(self) -> None:
        """Who is made to leave by what another sees gets nothing after the end."""
        bob, terminal = self.attached(BOB)

        class Ending(Terminal):
            def dataReceived(ending, data: bytes) -> None:
                bob.loseConnection()

        # Its turn comes first.
        _, ending = self.attached(ALICE), Ending()
        self.successResultOf(self.attach(VM1, ALICE, ending))
        bob.console.attachments.reverse()
        self.guests.guest.print(b"x")
        self.assertEqual(terminal.seen, b"")

    def test_told_in_turn(self) -> None:
        """What is shown beside the output waits its turn with a slow reader, and is bounded."""
        attachment, terminal = self.attached()
        attachment.pauseProducing()
        self.guests.guest.print(b"before ")
        attachment.show(b"[line]")
        self.clock.advance(1)
        self.guests.guest.print(b" after")
        self.assertTrue(attachment.is_behind)
        attachment.resumeProducing()
        self.assertEqual(terminal.seen, b"before [line] after")
        self.assertEqual(attachment.bytes_out, 13)
        attachment.pauseProducing()
        for _ in range(1000):
            attachment.show(b"[line]")
        self.assertLessEqual(len(attachment._backlog), 1000)

    def test_who(self) -> None:
        """Everybody who is attached, the holder first: from where, since when, what they do."""
        gate: Deferred[None] = Deferred()
        self.guests.answer = gate
        waiting = self.attach(VM1, Party("vera", "192.0.2.9", role="viewer"), Terminal())
        console = self.pool.find("id-vm1")
        assert console is not None
        self.assertEqual(
            list(describe_all(console, self.clock.seconds())),
            ["vera from 192.0.2.9: here for 0 seconds, waits for it to open"],
        )
        gate.callback(None)
        self.successResultOf(waiting)
        self.clock.advance(150)
        alice, _ = self.attached()
        self.clock.advance(10)
        self.attached(BOB)
        alice.write(b"x")
        self.clock.advance(5)
        self.assertEqual(
            list(describe_all(console, self.clock.seconds())),
            [
                "alice from 192.0.2.1: here for 15 seconds, has the keyboard, idle for 5 seconds",
                "vera from 192.0.2.9: here for 2 minutes, may only watch",
                "bob from 192.0.2.2: here for 5 seconds, watches",
            ],
        )
