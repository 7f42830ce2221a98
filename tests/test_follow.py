"""A console that is interrupted, and opened again: who is on it stays."""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import Deferred

from tests.fakes import console
from tests.test_console import VM1, PoolTestCase, Terminal, Typing
from vmconsole.console.attachment import Attachment, Party
from vmconsole.errors import (
    ConsoleError,
    ConsoleGone,
    EngineError,
    EngineUnreachable,
    GuestStopped,
    HostUnreachable,
)
from vmconsole.interfaces import ConsoleInfo, GuestNews, Role

OFF = GuestStopped("vm1 was shut off.")
DOWN = HostUnreachable("node1 does not answer.")
AWAY = "interrupted for 300 s: vm1 was shut off."
NO_ACCESS = "revoked: You no longer have access to vm1."
# Seconds after the interruption at which it is tried.
TRIES = [0, 0.25, 0.75, 1.75, 3, 4.5, 6.25, 8.25, 10.75, 13.75, 17.25, 21.5]
HERE, VIEWED, THERE = VM1, console("vm1", role="viewer"), console("vm1", host="node2")

PAUSED, RUNS = GuestNews(False, "was paused"), GuestNews(True)
PHASES = ("pause", "locate", "connect")

Answer = ConsoleInfo | EngineError | Deferred[ConsoleInfo | None] | None


class Access:
    """An IAccess whose answers a test sets: the ``next`` ones, and then ``answer``."""

    def __init__(self, answer: Answer = HERE, *following: Answer) -> None:
        self.answer = answer
        self.next = list(following)
        self.events: list[str] = []
        self.asked = 0

    async def locate(self) -> ConsoleInfo | None:
        self.asked += 1
        answer = self.next.pop(0) if self.next else self.answer
        if isinstance(answer, Deferred):
            return await answer
        if isinstance(answer, EngineError):
            raise answer
        return answer

    def begin(self, attachment: Attachment) -> None:
        self.events.append(f"begin on {attachment.console.info.host}")

    def pause(self, reason: str) -> None:
        self.events.append(f"pause: {reason}")


class Somebody(Terminal):
    """Who may not go on leaves, also who only waits."""

    coming: Deferred[Attachment]

    def revoked(self, reason: str) -> None:
        if self.transport is not None:
            super().revoked(reason)
        else:
            self.told.append(f"revoked: {reason}")
            self.coming.cancel()


class FollowTestCase(PoolTestCase):
    """Consoles that are followed for 300 seconds."""

    def setUp(self) -> None:
        super().setUp()
        self.tried: list[float] = []
        endpoint = self.guests.console_endpoint

        def console_endpoint(console: ConsoleInfo, force: bool = False) -> Any:
            self.tried.append(self.clock.seconds())
            return endpoint(console, force)

        self.guests.console_endpoint = console_endpoint  # type: ignore[method-assign]

    def tearDown(self) -> None:
        """When the last one has left nothing is left."""
        for opened in self.pool:
            for attachment in list(opened.attachments):
                if attachment.has_begun:
                    attachment.loseConnection()
                else:
                    attachment.opened.cancel()
        self.assertNothingLeft()

    def assertNothingLeft(self) -> None:
        """No console, no stream, nothing that waits, and nothing went wrong."""
        self.assertEqual(len(self.pool), 0)
        self.assertFalse(any(guest.open for guest in self.guests.opened))
        self.assertEqual(self.clock.getDelayedCalls(), [])
        self.assertEqual(self.flushLoggedErrors(), [])

    def comes(
        self,
        name: str = "alice",
        access: Access | None = None,
        role: Role = "operator",
        info: ConsoleInfo = VM1,
        **options: Any,
    ) -> tuple[Deferred[Attachment], Terminal]:
        """Somebody wants to attach."""
        terminal = Somebody()
        party = Party(name, "192.0.2.1", role, access=access)
        attaching = self.pool.attach(info, party, terminal, **options)
        terminal.coming = Deferred.fromCoroutine(attaching)
        return terminal.coming, terminal

    def on(
        self, name: str = "alice", access: Access | None = None, role: Role = "operator"
    ) -> tuple[Attachment, Terminal]:
        """Somebody is attached; what they were told is of no interest."""
        attaching, terminal = self.comes(name, access, role)
        attachment = self.successResultOf(attaching)
        terminal.told.clear()
        return attachment, terminal

    def away(self, answer: ConsoleError | Deferred[None] = DOWN) -> None:
        """The stream ends, and cannot be opened again for now."""
        self.guests.answer = answer
        self.tried.clear()
        self.guests.guest.end(OFF)

    def fresh(self) -> Access:
        """Another pool, whose consoles can be opened; what the engine says of somebody."""
        self.make_pool(linger=0.0)
        self.guests.answer = None
        return Access()

    def phase(self, phase: str, access: Access) -> None:
        """It is away, and this is under way."""
        if phase == "locate":
            access.answer = Deferred()
        self.away(Deferred() if phase == "connect" else DOWN)

    def passes(self, seconds: float) -> None:
        """Time passes, a quarter of a second at a time."""
        for _ in range(int(seconds * 4)):
            self.clock.advance(0.25)


class BackTests(FollowTestCase):
    """The console comes back."""

    def test_at_once(self) -> None:
        """The first try comes at once; output and keys go on, as they were."""
        access = Access()
        alice, terminal = self.on(access=access)
        self.guests.guest.print(b"one ")
        alice.write(b"a")
        first = self.guests.guest
        first.end(OFF)
        self.assertEqual(terminal.told, [AWAY, "resumed"])
        self.assertEqual(access.events, ["begin on node1", f"pause: {OFF}", "begin on node1"])
        self.guests.guest.print(b"two")
        alice.write(b"b")
        self.assertEqual((terminal.seen, terminal.lost), (b"one two", None))
        self.assertEqual((first.typed, self.guests.guest.typed), (b"a", b"b"))
        self.assertEqual((alice.bytes_in, alice.bytes_out, len(self.pool)), (2, 7, 1))
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_tries(self) -> None:
        """The next ones come after 0.25, 0.5, 1, 2 and 4 seconds, and then every 5; the engine is
        asked before each. Nobody is told of them."""
        access = Access()
        _, terminal = self.on(access=access)
        self.away()
        self.passes(24)
        self.assertEqual(self.tried, TRIES)
        self.assertEqual(access.asked, len(TRIES))
        self.assertEqual(terminal.told, [AWAY])
        self.guests.answer = None
        self.passes(5)
        self.assertEqual(terminal.told, [AWAY, "resumed"])
        self.passes(600)
        self.assertEqual((len(self.tried), terminal.lost), (len(TRIES) + 1, None))

    def test_interrupted_again(self) -> None:
        """Each interruption has its whole patience, and begins with fast tries."""
        _, terminal = self.on()
        self.away()
        self.passes(299)
        self.guests.answer = None
        self.passes(1)
        self.assertEqual(terminal.told, [AWAY, "resumed"])
        self.passes(1)
        began = self.clock.seconds()
        self.away()
        self.passes(299)
        self.assertEqual([when - began for when in self.tried[: len(TRIES)]], TRIES)
        self.assertEqual(terminal.told, [AWAY, "resumed", AWAY])
        self.passes(1)
        self.assertEqual(len(terminal.told), 4)

    def test_elsewhere(self) -> None:
        """It is opened where the engine says that it stands now, and the next time, too."""
        access = Access()
        alice, _ = self.on(access=access)
        access.answer = THERE
        self.guests.guest.end(OFF)
        self.assertEqual([place.host for place in self.guests.places], ["node1", "node2"])
        self.assertEqual((alice.console.info.host, access.events[-1]), ("node2", "begin on node2"))
        access.answer = EngineUnreachable("no answer")
        self.guests.guest.end(OFF)
        self.assertEqual(self.guests.places[-1].host, "node2")

    def test_nowhere(self) -> None:
        """While the engine does not say where it stands it is not opened anywhere, and nobody is
        told that they may not."""
        access = Access()
        _, terminal = self.on(access=access)
        access.answer = None
        self.guests.guest.end(OFF)
        self.passes(299.75)
        self.assertEqual((len(self.guests.places), terminal.told), (1, [AWAY]))
        self.passes(0.25)
        self.assertEqual(
            terminal.told[1:],
            [
                "revoked: vm1 did not come back within 5 minutes. vm1 is not there: not running, "
                "or gone."
            ],
        )

    def test_keyboard_and_watchers(self) -> None:
        """Who had the keyboard has it, who watched watches, who asked for it still asks."""
        (alice, _), (bob, told) = self.on(), self.on("bob")
        bob.console.keyboard.ask(bob)
        told.told.clear()
        self.guests.guest.end(OFF)
        self.assertEqual(told.told, [AWAY, "resumed"])
        bob.write(b"b")
        alice.write(b"a")
        self.assertEqual(self.guests.guest.typed, b"a")
        bob.console.keyboard.ask(alice)
        bob.write(b"b")
        self.assertEqual(self.guests.guest.typed, b"ab")

    def test_keyboard_meanwhile(self) -> None:
        """The keyboard passes also while the console is away."""
        (alice, _), (bob, told) = self.on(), self.on("bob")
        self.away()
        alice.loseConnection()
        self.assertIn("You have the keyboard.", told.told[-1])
        bob.write(b"lost")
        self.guests.answer = None
        self.passes(1)
        bob.write(b"b")
        self.assertEqual([guest.typed for guest in self.guests.opened], [b"", b"b"])

    def test_scrollback(self) -> None:
        """What was printed before is kept, for who comes later, too."""
        self.on()
        self.guests.guest.print(b"one ")
        self.guests.guest.end(OFF)
        self.guests.guest.print(b"two")
        bob, terminal = self.on("bob")
        bob.replay(b"")
        # Between the two the modes are set back that the guest had set before it stopped.
        self.assertRegex(terminal.seen, rb"\A\x1b\[mone \x1b7\x1b\[!p[^\n]*\x1b\[mtwo\Z")

    def test_gathered(self) -> None:
        """What is gathered when it is interrupted comes before the news of that."""
        _, terminal = self.on()
        terminal.interrupted = (  # type: ignore[method-assign]
            lambda reason, patience: terminal.told.append(terminal.seen.decode())
        )
        for _ in range(40):
            self.guests.guest.print(b"x")
        self.assertEqual(len(terminal.seen), 32)
        self.guests.guest.end(OFF)
        self.assertEqual(terminal.told[0], "x" * 40)

    def test_paused(self) -> None:
        """That the guest was paused, and that it runs again, everybody on it is told, once; what
        happens to a guest whose console nobody has open is nobody's business."""
        (_, alices), (_, bobs) = self.on(), self.on("bob")
        for news in (RUNS, PAUSED, RUNS, RUNS):
            for vm_id in ("id-vm1", "id-vm2"):
                self.pool.guest_changed(vm_id, news)
        for terminal in (alices, bobs):
            self.assertEqual(terminal.told, ["vm1 was paused.", "vm1 runs again."])

    def test_news(self) -> None:
        """While it is away, news that the guest runs bring a try at once, and fast ones after it;
        that it was paused does not, and is not told. Back, it is not told that it runs again."""
        _, terminal = self.on()
        self.pool.guest_changed("id-vm1", PAUSED)
        self.away()
        self.passes(10)
        self.tried.clear()
        self.pool.guest_changed("id-vm1", PAUSED)
        self.assertEqual(self.tried, [])
        self.pool.guest_changed("id-vm1", RUNS)
        self.passes(2)
        self.assertEqual(self.tried, [10, 10.25, 10.75, 11.75])
        self.guests.answer = None
        self.passes(2)
        self.pool.guest_changed("id-vm1", RUNS)
        self.assertEqual(terminal.told, ["vm1 was paused.", AWAY, "resumed"])

    def test_news_for_who_waits(self) -> None:
        """So they do for who waits for it to run at all, and who is not told of a pause."""
        self.guests.answer = DOWN
        _, terminal = self.comes(patient=True)
        self.passes(60)
        self.guests.answer, told = Deferred(), list(terminal.told)
        self.pool.guest_changed("id-vm1", RUNS)
        self.pool.guest_changed("id-vm1", PAUSED)
        self.pool.guest_changed("id-vm1", RUNS)
        self.assertEqual((self.tried[-1], terminal.told), (60, told))

    def test_half_a_sequence(self) -> None:
        """A sequence that the old stream left unfinished takes nothing from what the new one
        prints, neither from who has the keyboard nor from who watches."""
        (alice, alices), (bob, bobs) = self.on(), self.on("bob")
        self.guests.guest.print(b"\x1b]0;title")
        for attachment, terminal in ((alice, alices), (bob, bobs)):
            attachment.replay(b"")
            terminal.seen = b""
        self.guests.guest.end(OFF)
        self.guests.guest.print(b"login\x1b[6n: ")
        self.assertEqual((alices.seen, bobs.seen), (b"login\x1b[6n: ", b"login: "))

    def test_slow_reader(self) -> None:
        """What a slow reader has not taken is kept over it."""
        alice, terminal = self.on()
        alice.pauseProducing()
        self.guests.guest.print(b"one ")
        self.guests.guest.end(OFF)
        self.guests.guest.print(b"two")
        alice.resumeProducing()
        self.assertEqual(terminal.seen, b"one two")

    def test_lost(self) -> None:
        """It is known how much of what was typed the host had not confirmed, each time."""
        alice, _ = self.on()
        for unsent in (5, 0):
            self.guests.guest.unsent = unsent
            self.away()
            self.assertEqual((alice.console.lost, alice.unsent), (unsent, 0))
            self.guests.answer = None
            self.passes(1)

    def test_held_back(self) -> None:
        """A guest that takes no input holds up nobody any more once it is away, nor after."""
        events: list[str] = []
        alice, _ = self.on()
        alice.registerProducer(Typing(events, "alice"), True)  # type: ignore[arg-type]
        self.guests.guest.producer.pauseProducing()
        self.away()
        self.assertEqual(events, ["alice waits", "alice goes on"])
        self.guests.answer = None
        self.passes(1)
        bob, _ = self.on("bob")
        bob.registerProducer(Typing(events, "bob"), True)  # type: ignore[arg-type]
        self.assertEqual(events[2:], [])

    def test_break_in_flight(self) -> None:
        """When the stream ends between BREAK and its key, neither the key nor what waited for it
        is typed into the next one, and all of it counts as lost; nobody is held up, and BREAK can
        be sent anew before the old one is done."""
        events: list[str] = []
        alice, _ = self.on()
        alice.registerProducer(Typing(events, "alice"), True)  # type: ignore[arg-type]
        held: Any = alice.console.hold_input()
        alice.write(b"rm")
        self.guests.guest.end(OFF)
        self.assertEqual((alice.console.lost, events[-1]), (2, "alice goes on"))
        alice.write(b"new ")
        self.assertEqual(self.guests.guest.typed, b"new ")
        self._release(alice, held, b"h")
        self.assertEqual(self.guests.guest.typed, b"new ")
        alice.write(b"on")
        self.assertEqual(self.guests.guest.typed, b"new on")

    def _release(self, alice: Attachment, held: Any, first: bytes) -> None:
        release: Any = alice.console.release_input
        if held is None:
            release(first)
        else:
            release(held, first)


class EndTests(FollowTestCase):
    """It does not come back."""

    def test_deadline(self) -> None:
        """After ``follow`` seconds, and a last try, it is over, with the last error."""
        self.make_pool(linger=0.0, follow=10.0)
        _, terminal = self.on()
        self.away()
        self.passes(9.75)
        self.assertEqual(terminal.told, ["interrupted for 10 s: vm1 was shut off."])
        self.passes(0.25)
        self.assertEqual(
            terminal.told[1:],
            ["revoked: vm1 did not come back within 10 seconds. node1 does not answer."],
        )
        self.assertEqual(self.tried, [0, 0.25, 0.75, 1.75, 3, 4.5, 6.25, 8.25, 10])
        self.assertNothingLeft()

    def test_a_try_at_the_deadline(self) -> None:
        """One that is under way then is waited for: it is over when that fails, with its error."""
        for opens in (True, False):
            self.make_pool(linger=0.0, follow=10.0)
            self.guests.answer = None
            _, terminal = self.on()
            gate: Deferred[None] = Deferred()
            self.away(gate)
            self.passes(60)
            self.assertEqual((len(terminal.told), self.tried), (1, [self.clock.seconds() - 60]))
            self.guests.answer = None
            if opens:
                gate.callback(None)
                self.assertEqual(terminal.told[1:], ["resumed"])
                self.pool.stopService()
            else:
                gate.errback(DOWN)
                self.assertEqual(
                    terminal.told[1:],
                    [f"revoked: vm1 did not come back within 10 seconds. {DOWN}"],
                )

    def test_at_once(self) -> None:
        """With ``follow = 0``, and for what is over for good, it is over at once."""
        gone = ConsoleGone("vm1 has another console now.")
        for reason, follow in ((OFF, 0.0), (gone, 300.0)):
            self.make_pool(linger=0.0, follow=follow)
            access = Access()
            _, terminal = self.on(access=access)
            self.guests.guest.end(reason)
            assert terminal.lost is not None
            self.assertIs(terminal.lost.value, reason)
            self.assertEqual((terminal.told, access.events), ([], ["begin on node1"]))
            self.assertNothingLeft()
        self.assertEqual(len(self.guests.opened), 2)

    def test_stopped(self) -> None:
        """A proxy that is stopped ends it for all who wait, whatever is under way."""
        for phase in PHASES:
            access = self.fresh()
            _, terminal = self.on(access=access)
            self.phase(phase, access)
            waiting, _ = self.comes("bob", patient=True)
            self.pool.stopService()
            assert terminal.lost is not None
            self.assertEqual(str(terminal.lost.value), "The proxy is being stopped.", phase)
            error = self.failureResultOf(waiting, ConsoleGone).value
            self.assertEqual(str(error), "The proxy is being stopped.")
            self.assertNothingLeft()

    def test_the_last_one_leaves(self) -> None:
        """When nobody waits any more the tries end, whatever is under way; what was asked of the
        host is given up."""
        for phase in PHASES:
            access = self.fresh()
            (alice, terminal), (bob, _) = self.on(access=access), self.on("bob")
            self.phase(phase, access)
            cancelled = self.guests.cancelled
            alice.loseConnection()
            self.assertEqual((len(self.pool), self.guests.cancelled), (1, cancelled))
            bob.loseConnection()
            self.assertNothingLeft()
            self.assertEqual(self.guests.cancelled - cancelled, phase == "connect")
            self.assertIsNotNone(terminal.lost)
            tried = len(self.tried)
            self.passes(60)
            self.assertEqual(len(self.tried), tried)
            self.guests.answer = None
            self.on()
            self.pool.stopService()

    def test_two_are_asked_about(self) -> None:
        """Also when the engine is being asked about several, and the last to leave was not the
        last to come."""
        accesses = [Access(), Access()]
        attachments = [self.on(access=access)[0] for access in accesses]
        for access in accesses:
            access.answer = Deferred()
        self.away()
        for attachment in reversed(attachments):
            attachment.loseConnection()
        self.assertNothingLeft()

    def test_leaves_when_told(self) -> None:
        """Who leaves the moment that they are told of it, or that it is back, leaves nothing."""
        for moment in ("interrupted", "resumed"):
            alice, terminal = self.on()
            setattr(terminal, moment, lambda *_, alice=alice: alice.loseConnection())
            self.guests.guest.end(OFF)
            self.assertNothingLeft()

    def test_lingering(self) -> None:
        """Of a console that nobody is on an interruption is the end; so is the end of its time,
        and of that nobody is told."""
        self.make_pool(linger=60.0)
        alice, terminal = self.on()
        alice.loseConnection()
        self.clock.advance(30)
        self.guests.guest.end(OFF)
        self.assertEqual((len(self.guests.places), terminal.told), (1, []))
        self.assertNothingLeft()
        alice, terminal = self.on()
        self.guests.guest.end(OFF)
        alice.loseConnection()
        self.assertTrue(self.guests.guest.open)
        self.clock.advance(1)
        self.clock.advance(59)
        self.assertNothingLeft()

    def test_no_linger_while_away(self) -> None:
        """A console that is away does not wait for somebody to come back to it."""
        self.make_pool(linger=60.0)
        alice, _ = self.on()
        self.away()
        alice.loseConnection()
        self.assertNothingLeft()

    def test_leaves_by_the_last_words(self) -> None:
        """Who leaves by the last words of the stream leaves nothing that lingers."""
        self.make_pool(linger=60.0)
        alice, terminal = self.on()
        for _ in range(40):
            self.guests.guest.print(b"x")
        terminal.dataReceived = lambda data: alice.loseConnection()  # type: ignore[method-assign]
        self.guests.guest.end(OFF)
        self.assertNothingLeft()

    def test_ends_while_it_begins(self) -> None:
        """A stream that ends when one of two has begun, and cannot be opened again: the second,
        who just came, is told why; the first waits."""
        alice, terminal = self.on()
        gate: Deferred[None] = Deferred()
        self.away(gate)
        coming, second = self.comes("bob")

        def resumed() -> None:
            self.guests.answer = DOWN
            self.guests.guest.end(OFF)

        terminal.resumed = resumed  # type: ignore[method-assign]
        gate.callback(None)
        self.failureResultOf(coming, ConsoleError)
        self.assertEqual((second.told, second.lost), ([], None))
        self.assertEqual(terminal.told, [AWAY, AWAY])
        self.assertEqual(alice.console.attachments, [alice])

    def test_opens_and_ends(self) -> None:
        """A stream that ends as soon as it is open, again and again, is not opened without a
        pause in between, and not for ever."""
        _, terminal = self.on()

        def resumed() -> None:
            if len(self.tried) < 1000:
                self.guests.guest.end(OFF)

        terminal.resumed = resumed  # type: ignore[method-assign]
        self.guests.guest.end(OFF)
        self.assertLess(len(self.tried), 10)
        self.passes(60)
        self.assertLess(len(self.tried), 250)
