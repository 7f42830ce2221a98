"""Who comes to a console that is away, who waits for one, and what the engine says meanwhile."""

from __future__ import annotations

from twisted.internet.defer import CancelledError, Deferred

from tests.test_follow import (
    AWAY,
    DOWN,
    HERE,
    NO_ACCESS,
    OFF,
    PHASES,
    THERE,
    TRIES,
    VIEWED,
    Access,
    FollowTestCase,
)
from vmconsole.errors import (
    ConsoleBusy,
    ConsoleError,
    ConsoleTaken,
    ConsoleUnavailable,
    EngineError,
    EngineUnreachable,
    HostUnreachable,
)
from vmconsole.interfaces import ConsoleInfo


class NewcomerTests(FollowTestCase):
    """Somebody comes while the console is away."""

    def test_one_try(self) -> None:
        """Who comes has it tried at once, where they were told that it stands, and is told the
        error; those who wait are not, and are tried for as before."""
        (_, terminal) = self.on()
        self.away()
        self.passes(3)
        self.guests.answer = ConsoleUnavailable("vm1 is off.")
        coming, second = self.comes("bob", info=THERE)
        self.assertEqual(str(self.failureResultOf(coming, ConsoleError).value), "vm1 is off.")
        self.assertEqual((self.tried[-1], second.told, second.lost), (3, [], None))
        self.assertEqual(terminal.told, [AWAY])
        self.guests.answer = None
        self.passes(5)
        self.assertEqual(terminal.told, [AWAY, "resumed"])

    def test_where(self) -> None:
        """The newcomer's place serves when the engine says nothing of the others'; these still
        may go on when it lists them at the second look only."""
        access = Access()
        _, terminal = self.on(access=access)
        access.answer = None
        self.guests.guest.end(OFF)
        access.next = [None, HERE]
        coming, _ = self.comes("bob", info=THERE, access=Access(THERE))
        self.successResultOf(coming)
        self.assertEqual(self.guests.places[-1].host, "node2")
        self.assertEqual(terminal.told, [AWAY, "resumed"])

    def test_opens(self) -> None:
        """When it can be opened by then all are on it; who was there first keeps the keyboard."""
        alice, terminal = self.on()
        self.away()
        self.guests.answer = None
        coming, second = self.comes("bob")
        bob = self.successResultOf(coming)
        self.assertEqual(terminal.told, [AWAY, "resumed"])
        self.assertTrue(alice.has_keyboard)
        self.assertIn("You watch.", second.told[0])
        self.passes(1)
        self.guests.guest.end(OFF)
        self.assertEqual(second.told[1:], [AWAY, "resumed"])
        alice.loseConnection()
        bob.write(b"b")
        self.assertEqual(self.guests.guest.typed, b"b")

    def test_during_a_try(self) -> None:
        """Who comes during a try waits for that one."""
        for opens in (True, False):
            self.fresh()
            _, terminal = self.on()
            gate: Deferred[None] = Deferred()
            self.away(gate)
            coming, _ = self.comes("bob")
            self.assertNoResult(coming)
            self.assertEqual(len(self.tried), 1)
            if opens:
                gate.callback(None)
                self.successResultOf(coming)
                self.assertEqual(terminal.told, [AWAY, "resumed"])
            else:
                self.guests.answer = DOWN
                gate.errback(DOWN)
                self.failureResultOf(coming, HostUnreachable)
                self.assertEqual((terminal.told, len(self.tried)), ([AWAY], 1))
            self.pool.stopService()

    def test_force_during_a_try(self) -> None:
        """With force they wait for another one, with force, if that one fails; and after that
        nobody forces it again."""
        _, terminal = self.on()
        gate: Deferred[None] = Deferred()
        self.away(gate)
        forced, _ = self.comes("bob", force=True)
        waiting, _ = self.comes("carol")
        self.guests.answer = None
        gate.errback(ConsoleBusy("In use."))
        self.successResultOf(forced), self.successResultOf(waiting)
        self.assertEqual(terminal.told, [AWAY, "resumed"])
        self.assertEqual(self.tried, [0, 0])
        self.passes(1)
        self.guests.guest.end(ConsoleTaken("Taken by force."))
        self.assertEqual([how for _, how in self.guests.asked], ["open", "open", "force", "open"])

    def test_force_fails(self) -> None:
        """When that fails, too, it is their error, and no other try has force."""
        self.on()
        gate: Deferred[None] = Deferred()
        self.away(gate)
        forced, _ = self.comes("bob", force=True)
        self.guests.answer = DOWN
        gate.errback(ConsoleBusy("In use."))
        self.failureResultOf(forced, HostUnreachable)
        self.passes(5)
        asked = [how for _, how in self.guests.asked]
        self.assertEqual(asked[:3], ["open", "open", "force"])
        self.assertEqual(set(asked[3:]), {"open"})

    def test_force_not_needed(self) -> None:
        """When the try without it succeeds it is not forced, nor at the next interruption, and
        where they were told that it stood is forgotten by then."""
        access = Access()
        alice, _ = self.on(access=access)
        gate: Deferred[None] = Deferred()
        self.away(gate)
        forced, _ = self.comes("bob", access=access, force=True)
        gate.callback(None)
        self.successResultOf(forced)
        self.passes(1)
        access.answer = None
        self.away()
        self.passes(1)
        self.assertEqual([how for _, how in self.guests.asked], ["open", "open"])
        self.assertEqual(alice.console.is_open, False)
        access.answer = HERE
        self.passes(5)
        self.assertEqual({how for _, how in self.guests.asked}, {"open"})

    def test_force_while_it_is_open(self) -> None:
        """Who came with force when it was open has forced nothing, and does not later."""
        self.on()
        self.successResultOf(self.comes("bob", force=True)[0])
        self.away(ConsoleBusy("In use."))
        self.passes(5)
        self.assertEqual({how for _, how in self.guests.asked}, {"open"})

    def test_force_during_a_try_with_force(self) -> None:
        """Of two who come with force the second waits for the try of the first."""
        gate: Deferred[None] = Deferred()
        self.guests.answer = gate
        first, second = (self.comes(name, force=True)[0] for name in ("alice", "bob"))
        gate.errback(DOWN)
        for each in (first, second):
            self.failureResultOf(each, HostUnreachable)
        self.assertEqual([how for _, how in self.guests.asked], ["force"])

    def test_force_in_a_pause(self) -> None:
        """Who comes with force in a pause has it tried so at once, and once."""
        self.on()
        self.away(ConsoleBusy("In use."))
        self.failureResultOf(self.comes("bob", force=True)[0], ConsoleBusy)
        self.passes(1)
        self.assertEqual(
            [how for _, how in self.guests.asked][:4], ["open", "open", "force", "open"]
        )

    def test_gives_up(self) -> None:
        """Who gives up during a try leaves the others alone."""
        _, terminal = self.on()
        gate: Deferred[None] = Deferred()
        self.away(gate)
        coming, _ = self.comes("bob", force=True)
        coming.cancel()
        self.failureResultOf(coming, CancelledError)
        self.guests.answer = None
        gate.callback(None)
        self.assertEqual(terminal.told, [AWAY, "resumed"])


class PatientTests(FollowTestCase):
    """Who waits for as long as it takes."""

    def test_waits(self) -> None:
        """They are told each error, and are on it once it can be opened, after hours; from then on
        they wait for no longer than others do."""
        self.guests.answer = ConsoleUnavailable("vm1 is off.")
        coming, terminal = self.comes(patient=True, access=(access := Access()))
        self.assertEqual(terminal.told, ["waiting: vm1 is off."])
        self.assertEqual(access.asked, 0)
        self.passes(24)
        self.assertEqual(self.tried, TRIES)
        self.assertEqual(access.asked, len(TRIES) - 1)
        self.assertEqual(access.events, [])
        self.passes(3600)
        self.assertNoResult(coming)
        self.guests.answer = None
        self.passes(5)
        self.assertTrue(self.successResultOf(coming).has_keyboard)
        terminal.told.clear()
        self.away()
        self.passes(300)
        self.assertIn("did not come back", terminal.told[-1])
        self.assertNothingLeft()

    def test_others(self) -> None:
        """They outlast those who wait for a console to come back; who came without patience waits
        for one try."""
        access = Access()
        _, terminal = self.on(access=access)
        self.away()
        coming, patient = self.comes("bob", patient=True)
        self.assertEqual(patient.told, [f"waiting: {DOWN}"])
        self.passes(300)
        self.assertIn("did not come back", terminal.told[-1])
        self.failureResultOf(self.comes("carol")[0], HostUnreachable)
        self.assertNoResult(coming)
        self.guests.answer = None
        self.passes(5)
        self.successResultOf(coming)

    def test_gives_up(self) -> None:
        """When the last of them gives up the tries end, whatever is under way."""
        for phase in PHASES:
            access = self.fresh()
            self.guests.answer = DOWN
            coming, _ = self.comes(patient=True, access=access)
            if phase == "locate":
                access.answer = Deferred()
            if phase == "connect":
                self.guests.answer = Deferred()
            self.clock.advance(0.25)
            coming.cancel()
            self.failureResultOf(coming, CancelledError)
            self.assertNothingLeft()

    def test_permission_ends(self) -> None:
        """Whose permission is gone by the time that it opens, for somebody who just came, is not
        let in: they waited, and the engine is asked about them, too."""
        self.guests.answer = DOWN
        access = Access()
        coming, terminal = self.comes("bob", access, patient=True)
        self.passes(60)
        access.answer = None
        self.guests.answer = None
        self.successResultOf(self.comes()[0])
        self.guests.guest.print(b"secret")
        self.assertEqual((terminal.told[-1:], terminal.seen), ([NO_ACCESS], b""))
        self.failureResultOf(coming, CancelledError)

    def test_follow_is_off(self) -> None:
        """``follow = 0`` is about consoles that were open: one still can wait for one."""
        self.make_pool(linger=0.0, follow=0.0)
        self.guests.answer = DOWN
        coming, terminal = self.comes(patient=True)
        self.passes(60)
        self.guests.answer = None
        self.passes(5)
        self.successResultOf(coming)
        self.guests.guest.end(OFF)
        self.assertIsNotNone(terminal.lost)


class PermissionTests(FollowTestCase):
    """What the engine says when it is about to come back."""

    def setUp(self) -> None:
        super().setUp()
        self.access = Access()
        self.alice, self.alices = self.on()
        self.bob, self.bobs = self.on("bob", self.access)

    def test_gone(self) -> None:
        """Whose permission is gone at two looks is told so, and sees nothing of it; the others go
        on."""
        self.access.answer = None
        self.guests.guest.end(OFF)
        self.assertEqual(self.bobs.told, [AWAY, NO_ACCESS])
        self.assertEqual(self.access.asked, 2)
        self.guests.guest.print(b"secret")
        self.assertEqual((self.alices.seen, self.bobs.seen), (b"secret", b""))
        self.assertEqual(self.alices.told, [AWAY, "resumed"])
        self.assertEqual(self.access.events, ["begin on node1", f"pause: {OFF}"])

    def test_gone_with_the_keyboard(self) -> None:
        """If they had the keyboard it passes on, and nothing of theirs is typed."""
        access = Access()
        carol, _ = self.on("carol", access)
        carol.console.keyboard.ask(carol)
        carol.console.keyboard.ask(carol)
        self.assertTrue(carol.has_keyboard)
        access.answer = None
        self.guests.guest.end(OFF)
        carol.write(b"c")
        self.alice.write(b"a")
        self.assertEqual(self.guests.guest.typed, b"a")

    def test_missing_once(self) -> None:
        """Missing at the first look, and there at the second, they go on, with the role that they
        have then."""
        self.access.next = [None, VIEWED]
        self.guests.guest.end(OFF)
        self.assertEqual(self.bobs.told, [AWAY, "viewer", "resumed"])

    def test_asked_before_it_is_opened(self) -> None:
        """Both looks come before the stream is opened: from then on it would print for them."""
        gate: Deferred[ConsoleInfo | None] = Deferred()
        self.access.next = [None, gate]
        self.guests.guest.end(OFF)
        self.assertEqual(len(self.guests.opened), 1)
        gate.callback(None)
        self.assertEqual((len(self.guests.opened), self.bobs.told), (2, [AWAY, NO_ACCESS]))

    def test_role(self) -> None:
        """A role that changed meanwhile holds before anything else is seen or typed."""
        carol, told = self.on("carol", access := Access(VIEWED), role="viewer")
        self.access.answer, access.answer = VIEWED, HERE
        self.guests.guest.end(OFF)
        self.assertEqual(self.bobs.told, [AWAY, "viewer", "resumed"])
        self.assertEqual(told.told[:2], [AWAY, "operator"])
        self.alice.loseConnection()
        self.assertTrue(carol.has_keyboard)
        self.assertFalse(self.bob.has_keyboard)

    def test_no_answer(self) -> None:
        """An engine that gives no answer, or none of use, about some, or about all, keeps nobody
        from going on."""
        self.bob.console.keyboard.ask(self.bob)
        for error in (EngineUnreachable("no answer"), EngineError("500")):
            self.access.answer = error
            self.bobs.told.clear()
            self.guests.guest.end(OFF)
            self.assertEqual(self.bobs.told, [AWAY, "resumed"])
            self.passes(1)
        self.alice.loseConnection()
        self.guests.guest.end(OFF)
        self.assertEqual(self.bobs.told[-1], "resumed")

    def test_no_answer_and_the_role(self) -> None:
        """Nor does it make an operator of a viewer, or the other way round, whoever opened it."""
        viewer, told = self.on("vera", Access(EngineError("500")), role="viewer")
        self.guests.guest.end(OFF)
        self.assertEqual((viewer.role, told.told), ("viewer", [AWAY, "resumed"]))
        for attachment in (self.alice, self.bob):
            attachment.loseConnection()
        viewer.write(b"v")
        self.assertEqual(self.guests.guest.typed, b"")

    def test_no_answer_after_a_viewer(self) -> None:
        """The same where a viewer opened it."""
        for attachment in (self.alice, self.bob):
            attachment.loseConnection()
        coming, _ = self.comes("vera", Access(VIEWED), "viewer", VIEWED)
        self.successResultOf(coming)
        bob, told = self.on("bob", Access(EngineError("500")))
        self.guests.guest.end(OFF)
        self.assertEqual((bob.role, told.told), ("operator", [AWAY, "resumed"]))

    def test_leaves_meanwhile(self) -> None:
        """Who leaves while the engine is asked about them is not told anything more."""
        gate: Deferred[ConsoleInfo | None] = Deferred()
        self.access.next = [gate]
        self.access.answer = None
        self.guests.guest.end(OFF)
        self.bob.loseConnection()
        gate.callback(None)
        self.assertEqual(self.bobs.told, [AWAY])
        self.assertEqual(self.alices.told, [AWAY, "resumed"])

    def test_nobody_may(self) -> None:
        """When none who waited may go on the stream is closed, unless somebody just came."""
        self.alice.loseConnection()
        for somebody in (True, False):
            if not somebody:
                self.bob, self.bobs = self.on("bob", self.access)
            self.bobs.told.clear()
            self.access.next, self.access.answer = [HERE, None, HERE], None
            self.away()
            self.guests.answer = None
            if somebody:
                self.access.next = []
                coming, _ = self.comes("carol")
                carol = self.successResultOf(coming)
                self.assertTrue(self.guests.guest.open)
                carol.loseConnection()
            else:
                other, _ = self.comes("carol", info=HERE)
                self.successResultOf(other).loseConnection()
                self.bob.loseConnection()
            self.assertEqual(self.bobs.told[0], AWAY)
            self.assertNothingLeft()
            self.access.answer = HERE

    def test_broken(self) -> None:
        """What goes wrong in the proxy itself ends it for all, with a line, and is logged."""

        async def locate() -> ConsoleInfo | None:
            raise ZeroDivisionError

        self.access.locate = locate  # type: ignore[method-assign]
        self.guests.guest.end(OFF)
        for terminal in (self.alices, self.bobs):
            assert terminal.lost is not None
            self.assertIn("this is its own fault", str(terminal.lost.value))
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        self.assertNothingLeft()
