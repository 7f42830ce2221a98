"""Work that waits, a part in each turn of the reactor."""

from __future__ import annotations

from functools import partial

from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from tests.sshpair import SSHPair
from vmconsole.ssh.turns import Turns


def turn(clock: Clock) -> None:
    """What is due now, and not what that makes due: ``advance`` would do both."""
    for call in clock.getDelayedCalls():
        if call.active() and call.getTime() <= clock.seconds():
            made = partial(call.func, *call.args, **call.kw)
            call.cancel()
            made()


class TurnsTests(SynchronousTestCase):
    """Calls that wait."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.turns = Turns(self.clock)
        self.made: list[str] = []

    def make(self, name: str) -> None:
        """A call that has more to do goes to the end."""
        self.made.append(name)
        if name.endswith("+"):
            self.turns.add(lambda: self.make(name[:-1]))

    def test_one_a_turn(self) -> None:
        """None at once, one in each turn, in order; whoever has more to do waits for the others,
        and no timer is left."""
        for name in ("a++", "b", "c"):
            self.turns.add(lambda name=name: self.make(name))
        for expected in ([], ["a++"], ["b"], ["c"], ["a+"], ["a"]):
            self.assertEqual(self.made, expected)
            self.made.clear()
            turn(self.clock)
        self.assertEqual((self.made, self.clock.getDelayedCalls()), ([], []))

    def test_failure(self) -> None:
        """A call that fails takes no other's turn."""
        self.turns.add(lambda: 1 // 0)
        self.turns.add(lambda: self.make("b"))
        self.assertRaises(ZeroDivisionError, turn, self.clock)
        turn(self.clock)
        self.assertEqual(self.made, ["b"])


class ConnectionTests(SynchronousTestCase):
    """Connections of one server."""

    def test_many(self) -> None:
        """Of connections that have more packets than a turn takes one goes on in each turn."""
        first = SSHPair()
        pairs = [first, first.beside(), first.beside()]
        for pair in pairs:
            while pair.auth.transport is None:
                pair.clock.advance(0.1)
                pair.pump.flush()
            pair.login()
        for pair in pairs:
            for _ in range(500):
                pair.client.sendIgnore(b"")
            pair.pump.flush()
        self.assertEqual([pair.server._resting for pair in pairs], [True] * 3)
        before = [pair.server.incomingPacketSequence for pair in pairs]
        went_on = []
        for _ in range(3):
            turn(first.clock)
            now = [pair.server.incomingPacketSequence for pair in pairs]
            went_on.append([more > less for less, more in zip(before, now, strict=True)])
            before = now
        expected = [[at == turn for at in range(3)] for turn in range(3)]
        self.assertEqual(went_on, expected)
