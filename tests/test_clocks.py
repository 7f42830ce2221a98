"""Timers when the machine's clock is set, and what goes by the time of day."""

from __future__ import annotations

from datetime import UTC, datetime

from twisted.internet.selectreactor import SelectReactor
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from vmconsole.clocks import make_steady, posix_clock, posix_now, posix_of, utc_now

HOUR = 3600.0


class Machine:
    """Its two clocks, in seconds."""

    def __init__(self) -> None:
        self.uptime = 50.0
        self.day = 1_800_000_000.0

    def passes(self, seconds: float) -> None:
        """Time passes."""
        self.uptime += seconds
        self.day += seconds


class SteadyTests(SynchronousTestCase):
    """One of Twisted's own reactors, which nobody runs."""

    def setUp(self) -> None:
        self.machine = Machine()
        self.reactor = SelectReactor()
        self.addCleanup(self.reactor.waker.connectionLost, None)
        self.reactor.seconds = lambda: self.machine.day
        self.fired: list[str] = []
        self.later(5, "early")
        make_steady(self.reactor, lambda: self.machine.uptime, lambda: self.machine.day)

    def later(self, seconds: float, name: str) -> None:
        """Set a timer."""
        self.reactor.callLater(seconds, self.fired.append, name)

    def test_set_back_and_forward(self) -> None:
        """A timer is due after its seconds, and no sooner, whatever the clock was set to
        meanwhile; also one that was set before the reactor was made steady."""
        for step in (-HOUR, HOUR, 100_000 * HOUR):
            with self.subTest(step=step):
                self.fired.clear()
                self.later(10, "late")
                self.machine.day += step
                self.reactor.runUntilCurrent()
                self.assertEqual(self.fired, [])
                for seconds in (5, 5):
                    timeout = self.reactor.timeout()
                    assert timeout is not None
                    self.assertLessEqual(timeout, 10)
                    self.machine.passes(seconds)
                    self.reactor.runUntilCurrent()
                self.assertEqual(self.fired[-1], "late")
                self.assertIsNone(self.reactor.timeout())
        self.assertEqual(self.fired, ["late"])

    def test_timer_of_before(self) -> None:
        """A timer that was set before is due when it would have been."""
        self.machine.day -= HOUR
        self.machine.passes(4.9)
        self.reactor.runUntilCurrent()
        self.assertEqual(self.fired, [])
        self.machine.passes(0.2)
        self.reactor.runUntilCurrent()
        self.assertEqual(self.fired, ["early"])

    def test_time_of_day(self) -> None:
        """The time of day is the machine's, as soon as it is set; the reactor's seconds are not."""
        before = self.reactor.seconds()
        self.assertEqual(before, posix_now(self.reactor))
        self.machine.passes(10)
        self.machine.day += HOUR
        self.assertEqual(posix_now(self.reactor), self.machine.day)
        self.assertEqual(posix_clock(self.reactor)(), self.machine.day)
        self.assertEqual(utc_now(self.reactor), datetime.fromtimestamp(self.machine.day, UTC))
        self.assertEqual(self.reactor.seconds() - before, 10)

    def test_moment_of_the_past(self) -> None:
        """A moment by the reactor's seconds is told as the time that it is by the clock now."""
        moment = self.reactor.seconds()
        self.machine.passes(10)
        self.machine.day += HOUR
        self.assertEqual(posix_of(self.reactor, moment), self.machine.day - 10)

    def test_other_clocks(self) -> None:
        """A clock that tells no two times apart has one."""
        clock = Clock()
        clock.advance(7)
        self.assertEqual((posix_now(clock), posix_of(clock, 3)), (7, 3))
        self.assertEqual(utc_now(clock), datetime.fromtimestamp(7, UTC))
