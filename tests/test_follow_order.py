"""A console that is interrupted, while people come and go, in any order."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as some
from twisted.internet.defer import AlreadyCalledError, CancelledError, Deferred
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from tests.fakes import Guests, console
from tests.test_follow import DOWN, OFF, PAUSED, RUNS, Somebody
from vmconsole.config import Console as Settings
from vmconsole.console.attachment import Attachment, Party
from vmconsole.console.pool import ConsolePool
from vmconsole.errors import (
    ConsoleError,
    ConsoleGone,
    EngineUnreachable,
    HostUnreachable,
)
from vmconsole.interfaces import ConsoleInfo, Role

steps = some.tuples(
    some.sampled_from(
        "come come leave interrupt interrupt end answer answer fire time time may print type hold "
        "release news".split()
    ),
    some.integers(0, 3),
    some.integers(0, 5),
)


class Player:
    """Somebody who comes and goes; ``may`` and ``role`` are what the engine knows of them, and
    ``said`` is what it said last."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.terminal: Somebody | None = None
        self.coming: Deferred[Attachment] | None = None
        self.may = True
        self.role: Role = "operator"
        self.said: tuple[bool, Role] = (True, self.role)
        self.outage = False
        self.gate: Deferred[None] | None = None

    async def locate(self) -> ConsoleInfo | None:
        if self.gate is not None:
            await self.gate
        if self.outage:
            raise EngineUnreachable("no answer")
        self.said = (self.may, self.role)
        return console("vm1", role=self.role) if self.may else None

    def begin(self, attachment: Attachment) -> None:
        self.looked_at = True

    def pause(self, reason: str) -> None:
        assert self.looked_at, "paused twice, or before it began"
        self.looked_at = False

    looked_at = False


class Play:
    """What happens, and what has to hold after each of it."""

    def __init__(self, test: SynchronousTestCase, linger: float, follow: float) -> None:
        self.test = test
        self.clock = Clock()
        self.guests = Guests()
        self.pool = ConsolePool(self.guests, self.clock, Settings(linger=linger, follow=follow))
        self.players = [Player(name) for name in ("alice", "bob", "carol", "vera")]
        self.gates: list[Deferred[None]] = []
        self.printed = 0
        self.held: Any = None

    def do(self, what: str, who: Player, number: int) -> None:
        """One step."""
        getattr(self, f"do_{what}")(who, number)

    def do_come(self, who: Player, number: int) -> None:
        if who.coming is not None and not who.coming.called:
            return
        if who.terminal is not None and who.terminal.transport and not who.terminal.lost:
            return
        if not who.may:
            return
        who.terminal, who.looked_at, who.said = Somebody(), False, (True, who.role)
        party = Party(who.name, "192.0.2.1", who.role, watch=number == 5, access=who)
        info = console("vm1", role=who.role)
        who.coming = who.terminal.coming = Deferred.fromCoroutine(
            self.pool.attach(info, party, who.terminal, number == 1, number in (2, 3))
        )
        who.coming.addErrback(lambda failure: failure.trap(ConsoleError, CancelledError))

    def do_leave(self, who: Player, number: int) -> None:
        if who.terminal is None or who.coming is None:
            return
        if who.terminal.transport is not None:
            who.terminal.transport.loseConnection()
        else:
            who.coming.cancel()

    def do_interrupt(self, who: Player, number: int) -> None:
        for guest in list(self.guests.opened):
            if guest.open:
                guest.unsent = number
                guest.end(OFF)

    def do_end(self, who: Player, number: int) -> None:
        if number == 5:
            for guest in list(self.guests.opened):
                guest.end(ConsoleGone("gone"))

    def do_answer(self, who: Player, number: int) -> None:
        if number == 0:
            self.guests.answer = DOWN
        elif number == 1:
            self.guests.answer = Deferred()
            self.gates.append(self.guests.answer)
        elif number == 2 and who.gate is None:
            who.gate = Deferred()
        else:
            self.guests.answer = None

    def do_fire(self, who: Player, number: int) -> None:
        gates, self.gates = self.gates, []
        if gates:
            self.guests.answer = None if number % 2 else DOWN
        for gate in gates:
            if number % 2:
                gate.callback(None)
            else:
                gate.errback(DOWN)
            # Nobody may wait for it any more.
            gate.addErrback(lambda failure: failure.trap(HostUnreachable, AlreadyCalledError))
        gate, who.gate = who.gate, None
        if gate is not None:
            gate.callback(None)

    def do_time(self, who: Player, number: int) -> None:
        self.clock.advance((0.1, 0.25, 1, 5, 60, 301)[number])

    def do_may(self, who: Player, number: int) -> None:
        who.outage = number == 4
        who.may = number > 1
        who.role = "viewer" if number == 3 else "operator"

    def do_print(self, who: Player, number: int) -> None:
        for guest in list(self.guests.opened):
            if guest.open:
                guest.print(b"x" * number)

    def do_type(self, who: Player, number: int) -> None:
        if who.terminal is not None and who.terminal.transport is not None:
            who.terminal.transport.write(b"k")

    def do_hold(self, who: Player, number: int) -> None:
        found = self.pool.find("id-vm1")
        if found is not None and found.is_open and not found.is_input_held:
            self.held = (found, found.hold_input())

    def do_release(self, who: Player, number: int) -> None:
        if self.held is not None:
            (console, held), self.held = self.held, None
            release: Any = console.release_input
            release(*([] if held is None else [held]), b"h")

    def do_news(self, who: Player, number: int) -> None:
        self.pool.guest_changed("id-vm1", RUNS if number % 2 else PAUSED)

    def check(self) -> None:
        """At most one stream is open; who is on it is looked at, and nobody else; the stream is
        closed, or lingers, when nobody is on it; nobody waits without somebody who tries."""
        test = self.test
        test.assertLessEqual(sum(guest.open for guest in self.guests.opened), 1)
        found = self.pool.find("id-vm1")
        here = {} if found is None else {each.party.access: each for each in found.attachments}
        for who in self.players:
            attachment = here.get(who)
            is_on = attachment is not None and attachment.has_begun
            if attachment is not None:
                assert found is not None and who.terminal is not None
                test.assertEqual(who.looked_at, is_on and found.is_open)
                test.assertIsNone(who.terminal.lost)
                if found.is_open:
                    test.assertTrue(is_on)
                if attachment.has_keyboard:
                    test.assertEqual(attachment.role, "operator")
                if who.looked_at:
                    test.assertEqual((True, attachment.role), who.said)
            elif who.terminal is not None and who.coming is not None:
                test.assertTrue(who.coming.called)
        if found is not None and not found.is_open:
            test.assertTrue(found.attachments)
            waiting = self.clock.getDelayedCalls() or self.gates
            test.assertTrue(waiting or any(each.gate for each in self.players))

    def finish(self) -> None:
        """All leave: nothing is left."""
        for who in self.players:
            self.do_leave(who, 0)
            self.check()
        self.clock.advance(1)
        self.clock.advance(60)
        self.test.assertEqual(len(self.pool), 0)
        self.test.assertEqual(self.clock.getDelayedCalls(), [])
        self.test.assertFalse(any(guest.open for guest in self.guests.opened))
        self.test.assertEqual(self.test.flushLoggedErrors(), [])
        for who in self.players:
            if who.gate is not None:
                who.gate.callback(None)


class AnyOrderTests(SynchronousTestCase):
    """Whatever happens, in whatever order."""

    @given(
        some.lists(steps, max_size=40),
        some.sampled_from([0.0, 60.0]),
        some.sampled_from([0.0, 10.0, 300.0]),
    )
    def test_invariants(
        self, happens: list[tuple[str, int, int]], linger: float, follow: float
    ) -> None:
        """See Play: while it is open only those are on it who may be, as what they may be;
        everybody else waits for a try, or has been told; in the end nothing is left."""
        play = Play(self, linger, follow)
        for what, who, number in happens:
            play.do(what, play.players[who], number)
            play.check()
        play.finish()
