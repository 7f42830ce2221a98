"""How many sessions there may be, and for how long nobody may type on one."""

from __future__ import annotations

import struct
from typing import Any

from twisted.conch.error import ConchError
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.logger import Logger, formatEvent
from twisted.trial.unittest import SynchronousTestCase

from tests.fakes import Events, console
from tests.sshpair import ALICE, PTY, ClientChannel, SSHPair
from vmconsole.config import Config, Console, Limits
from vmconsole.ssh.idle import IdleTimer
from vmconsole.ssh.session_counts import SessionCounts

SHORTAGE = 4  # SSH_OPEN_RESOURCE_SHORTAGE, RFC 4254, section 5.1


class LimitsTestCase(SynchronousTestCase):
    """Alice, who may open vm1 and vm2, is logged in."""

    limits = Limits()

    def setUp(self) -> None:
        self.events = Events()
        self.patch(SessionCounts, "_log", Logger("counts", observer=self.events))
        self.pair = SSHPair(Config(console=Console(linger=0.0), limits=self.limits))
        self.pair.engine.vms[ALICE.id] = [console("vm1"), console("vm2")]
        self.pair.login()

    @property
    def total(self) -> int:
        """The sessions that are counted."""
        counts: SessionCounts = self.pair.factory.session_counts
        return counts.total

    def logged(self) -> list[str]:
        """What the log has of refused sessions."""
        return [formatEvent(event) for event in self.events.seen]

    def another(self) -> SSHPair:
        """Alice logs in from elsewhere, too."""
        other = self.pair.beside()
        other.login()
        return other

    def refused(self, pair: SSHPair) -> str:
        """The words with which one more session is refused."""
        reasons: list[ConchError] = []
        channel = ClientChannel()
        channel.openFailed = reasons.append  # type: ignore[method-assign]
        pair.connection.openChannel(channel)
        pair.flush()
        [error] = reasons
        self.assertEqual(error.data, SHORTAGE)
        return bytes(error.value).decode()


class PerUserTests(LimitsTestCase):
    """``limits.sessions_per_user``."""

    limits = Limits(sessions_per_user=2)

    def test_over_all_connections(self) -> None:
        """So many on all connections together, and no more; the user is told how many."""
        self.pair.open()
        other = self.another()
        other.open()
        for pair in (self.pair, other, self.another()):
            self.assertEqual(self.refused(pair), "you have 2 sessions open already")
        self.assertEqual(
            self.logged(),
            ["Refused a session: alice@internal has 2 in all (limits.sessions_per_user)"],
        )

    def test_every_way_out(self) -> None:
        """A session that ends makes room, however it does: its command is done, it is closed
        before or while there is one, its connection is lost, its login is revoked."""
        self.pair.open()
        for _ in range(3):
            self.assertEqual(self.pair.run(b"list").status, 0)
        for start in (self.pair.open, lambda: self.pair.run(b"vm1", pty=True)):
            channel = start()
            self.assertEqual(self.total, 2)
            channel.loseConnection()
            self.pair.flush()
            self.assertTrue(channel.gone)
        other = self.another()
        other.run(b"vm1", pty=True)
        self.assertEqual(self.total, 2)
        other.client_io.loseConnection()
        other.flush()
        self.assertEqual(self.total, 1)
        other = self.another()
        other.run(b"vm1", pty=True)
        other.server.avatar.revoke("The key is gone.")
        other.flush()
        self.assertEqual(self.total, 1)
        self.assertFalse(self.pair.open().open_failed)

    def test_lost_in_the_middle(self) -> None:
        """A connection that is lost takes all of its sessions with it, those that are half closed
        as well."""
        half = self.pair.open()
        self.pair.open()
        half.conn.sendClose = lambda channel: None
        self.pair.server.service.channels[0].loseConnection()
        self.pair.flush()
        self.assertEqual(self.total, 2)
        self.pair.server_io.loseConnection()
        self.pair.flush()
        self.assertEqual(self.total, 0)

    def test_broken_request(self) -> None:
        """A request for a channel that cannot be parsed counts nothing."""
        self.pair.client.sendPacket(90, struct.pack(">L", 7) + b"session" + b"\0\0")
        self.pair.flush()
        self.assertIsNotNone(self.pair.client.disconnected)
        self.assertEqual(self.total, 0)

    def test_cannot_be_opened(self) -> None:
        """A channel that cannot be opened counts nothing."""

        def broken(**_: object) -> None:
            raise RuntimeError("broken")

        self.pair.server.avatar.channelLookup[b"session"] = broken
        self.assertTrue(self.pair.open().open_failed)
        self.assertEqual(len(self.flushLoggedErrors(RuntimeError)), 1)
        self.assertEqual(self.total, 0)

    def test_others(self) -> None:
        """Other users are not concerned."""
        counts = SessionCounts(1, Clock())
        bob = type(ALICE)(id="u-bob", name="bob@internal")
        counts.opened(ALICE)
        self.assertIsNotNone(counts.refusal(ALICE, 0, 8))
        self.assertIsNone(counts.refusal(bob, 0, 8))
        counts.closed(ALICE)
        self.assertIsNone(counts.refusal(ALICE, 0, 8))
        # Nothing is kept of who is gone.
        self.assertEqual(len(counts._open), 0)


class PerConnectionTests(LimitsTestCase):
    """``limits.sessions_per_connection``: what a ControlMaster of OpenSSH shares."""

    def test_eight(self) -> None:
        """Eight sessions work on one connection. The ninth is refused, which is logged once, and
        one that leaves ends no other."""
        consoles = [self.pair.run(b"vm1", pty=True) for _ in range(8)]
        for _ in range(5):
            self.assertEqual(
                self.refused(self.pair), "you have 8 sessions open on this connection already"
            )
        self.assertEqual(
            self.logged(),
            [
                "Refused a session: alice@internal has 8 on a connection "
                "(limits.sessions_per_connection)"
            ],
        )
        left = consoles.pop(3)
        self.pair.type(left, b"\x1d.")
        self.assertEqual((left.status, left.gone), (0, True))
        self.pair.guests.guest.print(b"still here")
        self.pair.flush()
        for channel in consoles:
            self.assertTrue(channel.output.endswith(b"still here"))
        self.pair.type(consoles[0], b"typed")
        self.assertEqual(self.pair.guests.guest.typed, b"typed")
        self.assertEqual(self.pair.run(b"list").status, 0)

    def test_no_limit_by_default(self) -> None:
        """A user may have any number of connections with as many."""
        for _ in range(4):
            other = self.another()
            for _ in range(8):
                self.assertFalse(other.open().open_failed)
        self.assertEqual(self.total, 32)


class IdleTests(LimitsTestCase):
    """``limits.idle``, ten minutes here."""

    limits = Limits(idle=600.0)

    warning = (
        b"\r\n[vmconsole: You typed nothing for 9 minutes: this session ends in 60 seconds, unless "
        b"you press a key.]\r\n"
    )

    def setUp(self) -> None:
        super().setUp()
        self.setUpConsole()

    def setUpConsole(self) -> None:
        """Alice is on vm1."""
        self.channel = self.pair.run(b"vm1", pty=True)
        self.begun = self.pair.clock.seconds()

    def at(self, seconds: float) -> None:
        """So long after that."""
        self.pair.advance(self.begun + seconds - self.pair.clock.seconds())

    def test_warned_and_ended(self) -> None:
        """A minute before, the user is warned; then the console is left as one is left otherwise:
        with a line, status 0, and the reason in the audit."""
        self.pair.guests.guest.print(b"login: ")
        self.at(539)
        self.assertNotIn(b"You typed nothing", self.channel.output)
        self.at(540)
        self.assertTrue(self.channel.output.endswith(b"login: " + self.warning))
        self.at(599)
        self.assertFalse(self.channel.gone)
        self.at(601)
        self.assertIn(b"[vmconsole: You typed nothing for 10 minutes.]", self.channel.output)
        self.assertEqual((self.channel.status, self.channel.gone), (0, True))
        self.assertFalse(self.pair.guests.guest.open)
        [detached] = self.pair.events.named("detached")
        self.assertEqual(detached["reason"], "You typed nothing for 10 minutes.")
        self.assertIsNone(self.pair.client.disconnected)

    def test_output_does_not_count(self) -> None:
        """What the guest prints keeps nobody on it."""
        for minute in range(1, 11):
            self.at(minute * 60.0)
            self.pair.guests.guest.print(b"tick\r\n")
        self.at(601)
        self.assertTrue(self.channel.gone)

    def test_a_key(self) -> None:
        """Any key begins the period anew, also after the warning, and then there is another."""
        self.at(540)
        self.pair.type(self.channel, b"x")
        self.at(1079)
        self.assertEqual(self.channel.output.count(b"You typed nothing"), 1)
        self.at(1080.5)
        self.assertEqual(self.channel.output.count(b"You typed nothing"), 2)
        self.at(1139)
        self.assertFalse(self.channel.gone)
        self.at(1141)
        self.assertTrue(self.channel.gone)

    def test_break(self) -> None:
        """So does BREAK, which is no key (RFC 4335)."""
        self.at(500)
        self.pair.connection.sendRequest(self.channel, b"break", struct.pack(">L", 500))
        self.pair.flush()
        self.at(1000)
        self.assertFalse(self.channel.gone)

    def test_input_that_goes_nowhere(self) -> None:
        """Keys of somebody who only watches count."""
        watcher = self.pair.run(b"watch vm2", pty=True)
        self.at(500)
        self.pair.type(watcher, b"x")
        self.at(700)
        self.assertTrue(self.channel.gone)
        self.assertFalse(watcher.gone)

    def test_menu(self) -> None:
        """In the menu it is the same, with status 1."""
        menu = self.pair.run(pty=True)
        self.at(540.5)
        self.assertIn(b"[vmconsole: You typed nothing for 9 minutes", menu.output)
        self.at(610)
        self.assertIn(b"You typed nothing for 10 minutes.", menu.error)
        self.assertEqual((menu.status, menu.gone), (1, True))

    def test_from_menu_to_console(self) -> None:
        """The answer to the menu counts, and the console goes on with the same period."""
        menu = self.pair.run(pty=True)
        self.at(300)
        self.pair.type(menu, b"2\r")
        self.assertEqual(self.pair.guests.asked[-1], ("vm2", "open"))
        self.at(890)
        self.assertFalse(menu.gone)
        self.at(910)
        self.assertTrue(menu.gone)

    def test_connecting(self) -> None:
        """Somebody who waits for a console that does not open is sent away, too."""
        self.pair.guests.answer = Deferred()
        waiting = self.pair.run(b"vm2", pty=True)
        self.at(610)
        self.assertIn(b"You typed nothing", waiting.error)
        self.assertEqual((waiting.status, self.pair.guests.cancelled), (1, 1))

    def test_no_terminal(self) -> None:
        """What has no terminal runs for ever: ``log --follow`` into a file."""
        log = self.pair.run(b"log vm1 --follow")
        other = self.pair.open()
        self.at(3600)
        self.assertFalse(log.gone or other.gone)

    def test_follow_on_a_terminal(self) -> None:
        """``log --follow`` on a terminal is a session like others; the audit has the reason."""
        log = self.pair.run(b"log vm2 --follow", pty=True)
        self.at(610)
        self.assertTrue(log.gone)
        self.assertIn(b"You typed nothing", log.error)
        self.assertEqual(
            [event["reason"] for event in self.pair.events.named("detached")],
            ["You typed nothing for 10 minutes."] * 2,
        )

    def test_no_command(self) -> None:
        """A terminal on which nothing was started ends as well; asking twice for one changes
        nothing."""
        channel = self.pair.open()
        for _ in range(2):
            self.pair.connection.sendRequest(channel, b"pty-req", PTY)
            self.pair.flush()
        # Another one is on vm1.
        self.assertEqual(len(self.idle_timers()), 2)
        self.at(610)
        self.assertEqual((channel.status, channel.gone), (1, True))

    def test_client_that_does_not_read(self) -> None:
        """A client that takes nothing ends all the same."""
        stalled = self.pair.run(b"vm2", pty=True, window=10, reads_no_more=True)
        self.pair.guests.guest.print(b"x" * 1000)
        self.at(610)
        self.assertFalse(self.pair.guests.guest.open)
        self.at(620)
        self.assertTrue(stalled.gone)

    def test_no_timer_is_left(self) -> None:
        """A session that is over leaves no timer behind, however it ended."""
        done = self.pair.run(b"list", pty=True)
        self.assertTrue(done.gone)
        self.channel.loseConnection()
        self.pair.run(b"vm2", pty=True)
        self.assertEqual(len(self.idle_timers()), 1)
        self.pair.client_io.loseConnection()
        self.pair.flush()
        self.assertEqual(self.idle_timers(), [])

    def idle_timers(self) -> list[Any]:
        """Those that look for idle users."""
        return [
            call
            for call in self.pair.clock.getDelayedCalls()
            if isinstance(getattr(call.func, "__self__", None), IdleTimer)
        ]


class ShortPeriodTests(SynchronousTestCase):
    """The timer itself."""

    def test_notice(self) -> None:
        """The warning comes a minute before, of less than ten minutes a tenth."""
        for limit, warned_at, text in (
            (3600.0, 3540.0, "You typed nothing for 59 minutes: this session ends in 60 seconds"),
            (300.0, 270.0, "You typed nothing for 4 minutes: this session ends in 30 seconds"),
            (5.0, 4.5, "You typed nothing for 4 seconds: this session ends in 1 second"),
        ):
            clock = Clock()
            told: list[tuple[float, str]] = []

            def tell(text: str, clock: Clock = clock, told: Any = told) -> None:
                told.append((clock.seconds(), text))

            IdleTimer(clock, limit, tell, tell)
            clock.advance(warned_at - 0.25)
            self.assertEqual(told, [])
            clock.advance(0.25)
            clock.advance(limit - warned_at - 0.25)
            self.assertEqual(len(told), 1)
            clock.advance(0.25)
            [(at, warning), (end, _)] = told
            self.assertEqual((at, end), (warned_at, limit))
            self.assertIn(text, warning)

    def test_keys_cost_nothing(self) -> None:
        """However much is typed, there is one timer, and it does not move."""
        clock = Clock()
        idle = IdleTimer(clock, 600.0, lambda text: None, lambda text: None)
        [timer] = clock.getDelayedCalls()
        due = timer.getTime()
        clock.advance(1)
        for _ in range(100):
            idle.typed()
        self.assertEqual([call.getTime() for call in clock.getDelayedCalls()], [due])
        idle.stop()
        idle.stop()
        self.assertEqual(clock.getDelayedCalls(), [])


class NeverTests(LimitsTestCase):
    """Without ``limits.idle``."""

    def test_never(self) -> None:
        """A session may be idle for ever."""
        channel = self.pair.run(b"vm1", pty=True)
        for _ in range(50):
            self.pair.advance(3600)
        self.assertFalse(channel.gone)
        self.assertNotIn(b"You typed nothing", channel.output)
