"""Keepalives and new keys by the server; key exchanges in turn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twisted.conch.ssh.common import NS, getNS
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from tests.fakes import console
from tests.sshpair import ALICE, ALICE_KEY, SSHPair
from vmconsole.config import SSH, Config
from vmconsole.config import Console as ConsoleSettings
from vmconsole.ssh.handshakes import ExchangeBudget, Handshakes
from vmconsole.ssh.upkeep import EXCHANGE_SECONDS

KEEPALIVE = NS(b"keepalive@openssh.com") + b"\x01"


def pair_with(**settings: Any) -> SSHPair:
    """Alice is logged in, and what she leaves is closed at once."""
    pair = SSHPair(Config(ssh=SSH(**settings), console=ConsoleSettings(linger=0.0)))
    pair.engine.vms[ALICE.id] = [console("vm1")]
    pair.login()
    return pair


class KeepaliveTests(SynchronousTestCase):
    """Whether the client still lives."""

    def setUp(self) -> None:
        self.pair = pair_with(keepalive=7.0)
        self.asked: list[bytes] = []
        self.answers = True
        connection: Any = self.pair.connection
        answer = connection.ssh_GLOBAL_REQUEST

        def asked(packet: bytes) -> None:
            self.asked.append(packet)
            if self.answers:
                answer(packet)

        connection.ssh_GLOBAL_REQUEST = asked

    def test_silence(self) -> None:
        """A client that says nothing is asked every ``keepalive`` seconds; its failure is an
        answer, and the connection goes on for ever."""
        for _ in range(20):
            self.pair.advance(7)
        self.assertGreaterEqual(len(self.asked), 10)
        self.assertEqual({getNS(packet)[0] for packet in self.asked}, {b"keepalive@openssh.com"})
        self.assertIsNone(self.pair.client.disconnected)

    def test_missed(self) -> None:
        """Three missed answers end the connection, with a word, and free its console."""
        self.pair.run(b"vm1", pty=True)
        self.answers = False
        self.pair.advance(7)
        for _ in range(3):
            self.pair.advance(7)
            self.assertIsNone(self.pair.client.disconnected)
        self.assertEqual(len(self.asked), 3)
        self.assertEqual(self.pair.events.named("detached"), [])
        self.pair.advance(7)
        self.assertEqual(self.pair.client.disconnected, (11, b"the client does not answer"))
        self.assertEqual(len(self.pair.events.named("detached")), 1)
        self.assertEqual(self.pair.timers(), [])

    def test_no_timer_is_left(self) -> None:
        """A client that goes leaves no timer behind, also in the middle of a key exchange."""
        self.pair = pair_with(keepalive=7.0, rekey_seconds=100.0)
        self.pair.server.sendKexInit()
        self.pair.server_io.loseConnection()
        self.pair.flush()
        self.assertEqual(self.pair.timers(), [])

    def test_anything_is_an_answer(self) -> None:
        """A client that types is not asked; one that answers late counts anew."""
        channel = self.pair.run(b"vm1", pty=True)
        for _ in range(10):
            self.pair.advance(6.5)
            self.pair.type(channel, b"x")
        self.assertEqual(self.asked, [])
        self.answers = False
        for _ in range(10):
            self.pair.advance(7)
            self.pair.advance(7)
            self.pair.type(channel, b"x")
        self.assertIsNone(self.pair.client.disconnected)

    def test_never_answered(self) -> None:
        """A client that answers no keepalive, but sends other things, makes no pile of them."""
        channel = self.pair.run(b"vm1", pty=True)
        self.answers = False
        for _ in range(50):
            self.pair.advance(7)
            self.pair.advance(7)
            self.pair.type(channel, b"x")
        self.assertIsNone(self.pair.client.disconnected)
        self.assertLessEqual(len(self.pair.server.service.deferreds["global"]), 4)

    def test_during_a_key_exchange(self) -> None:
        """While a client takes its time for a key exchange it is not asked: it could not hear
        that."""
        self.pair.client.ssh_KEXINIT = lambda packet: None
        self.pair.server.sendKexInit()
        for _ in range(20):
            self.pair.advance(7)
        self.assertIsNone(self.pair.client.disconnected)
        self.assertEqual(len(self.pair.server._blocked), 0)

    def test_not_before_the_login(self) -> None:
        """Before the login there is the grace period alone."""
        pair = SSHPair(Config(ssh=SSH(keepalive=1.0)))
        numbers: list[int] = []
        pair.client.dispatchMessage = lambda number, payload: numbers.append(number)
        for _ in range(20):
            pair.advance(1)
        self.assertEqual(numbers, [])

    def test_slow_reader(self) -> None:
        """A client that takes waiting output is alive, though its answers are not read yet."""
        self.answers = False
        for _ in range(20):
            self.pair.server.pauseProducing()
            self.pair.advance(7)
            self.pair.server.resumeProducing()
        self.assertIsNone(self.pair.client.disconnected)


class RekeyTests(SynchronousTestCase):
    """New keys, by the server's wish."""

    def test_by_age(self) -> None:
        """After ``rekey_seconds``, again and again; a client's own exchange counts."""
        pair = pair_with(rekey_seconds=100.0)
        self.assertEqual(pair.server.exchanges, 1)
        pair.advance(99)
        self.assertEqual(pair.server.exchanges, 1)
        pair.advance(1)
        self.assertEqual(pair.server.exchanges, 2)
        pair.advance(60)
        pair.client.sendKexInit()
        pair.flush()
        self.assertEqual(pair.server.exchanges, 3)
        pair.advance(60)
        self.assertEqual(pair.server.exchanges, 3)
        pair.advance(40)
        self.assertEqual(pair.server.exchanges, 4)

    def test_by_volume(self) -> None:
        """After ``rekey_bytes``, both ways together; the console's output is whole."""
        pair = pair_with(rekey_bytes=1048576)
        channel = pair.run(b"vm1", pty=True, window=1 << 31)
        printed = b"".join(b"%07d\n" % number for number in range(8192))
        for _ in range(40):
            pair.guests.guest.print(printed)
            pair.flush()
        self.assertEqual(pair.server.exchanges, 1 + 40 * 65536 // 1048576)
        self.assertTrue(channel.output.endswith(printed * 40))

    def test_by_volume_of_input(self) -> None:
        """What the client sends counts, though nothing answers it."""
        pair = pair_with(rekey_bytes=1048576)
        for _ in range(40):
            pair.client.sendIgnore(bytes(30000))
            pair.flush()
        self.assertEqual(pair.server.exchanges, 2)

    def test_by_packets(self) -> None:
        """Long before the sequence numbers come round, however large ``rekey_bytes`` is."""
        pair = pair_with(rekey_bytes=1 << 60)
        pair.server.packets_keyed = 1 << 31
        pair.run(b"list")
        self.assertEqual(pair.server.exchanges, 2)
        self.assertLess(pair.server.packets_keyed, 100)

    def test_client_does_not_do_its_part(self) -> None:
        """A client that does not answer our KEXINIT is ended after some minutes, though it goes
        on to send other things."""
        pair = pair_with(rekey_seconds=100.0)
        pair.client.ssh_KEXINIT = lambda packet: None
        channel = pair.run(b"vm1", pty=True)
        pair.advance(100)
        for _ in range(10):
            pair.type(channel, b"x")
            pair.advance(EXCHANGE_SECONDS / 10 - 0.1)
        self.assertIsNone(pair.client.disconnected)
        pair.advance(1)
        self.assertEqual(pair.client.disconnected, (11, b"no key exchange within the time limit"))

    def test_done_in_time(self) -> None:
        """An exchange that is done has no limit any more."""
        pair = pair_with(rekey_seconds=100 * EXCHANGE_SECONDS)
        pair.server.sendKexInit()
        pair.flush()
        pair.advance(EXCHANGE_SECONDS + 1)
        self.assertEqual(pair.server.exchanges, 2)
        self.assertIsNone(pair.client.disconnected)

    def test_begun_before_the_login(self) -> None:
        """A key exchange that was begun while the engine was asked has its limit, too."""
        pair = SSHPair(Config(ssh=SSH(keepalive=1e9)))
        answer: Deferred[None] = Deferred()
        pair.engine.keys_gate = answer
        pair.auth.sign(b"vmproxy", ALICE_KEY)
        pair.client.ssh_KEXINIT = lambda packet: None
        pair.client.sendKexInit()
        pair.flush()
        answer.callback(None)
        pair.flush()
        self.assertEqual(len(pair.events.named("login_accepted")), 1)
        pair.advance(EXCHANGE_SECONDS + 1)
        self.assertEqual(pair.client.disconnected, (11, b"no key exchange within the time limit"))


class HandshakeTests(SynchronousTestCase):
    """The costly parts, one in each turn of the reactor."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.handshakes = Handshakes(self.clock)
        self.done: list[str] = []

    def work(self, name: str) -> Callable[[], None]:
        """Something that notes that it was done."""
        return lambda: self.done.append(name)

    def turn(self) -> None:
        """The reactor goes round: what is due is called, and what that asks for is not."""
        for call in [self.clock.calls.pop(0) for _ in self.clock.calls]:
            call.func()

    def test_one_a_turn(self) -> None:
        """The first is done at once, and each other one in a turn of its own, in order."""
        for name in "abc":
            self.handshakes.run(self.work(name), logged_in=False)
        self.assertEqual((self.done, len(self.handshakes)), (["a"], 2))
        self.turn()
        self.assertEqual(self.done, ["a", "b"])
        self.turn()
        self.turn()
        self.assertEqual((self.done, self.clock.getDelayedCalls()), (["a", "b", "c"], []))
        self.handshakes.run(self.work("d"), logged_in=False)
        self.assertEqual(self.done[-1], "d")

    def test_users_first(self) -> None:
        """Who is logged in does not wait for strangers."""
        for name in "abc":
            self.handshakes.run(self.work(name), logged_in=False)
        self.handshakes.run(self.work("user"), logged_in=True)
        self.turn()
        self.assertEqual(self.done, ["a", "user"])

    def test_failure(self) -> None:
        """One that fails keeps none from its turn."""

        def fail() -> None:
            raise ZeroDivisionError

        self.assertRaises(ZeroDivisionError, self.handshakes.run, fail, False)
        self.handshakes.run(self.work("b"), logged_in=False)
        self.turn()
        self.assertEqual(self.done, ["b"])

    def test_budget(self) -> None:
        """A client may begin an exchange after each half MiB, or eight at once and two a second
        from then on."""
        budget = ExchangeBudget(self.clock)
        self.assertEqual([budget.delay(524288) for _ in range(100)], [0.0] * 100)
        self.assertEqual([budget.delay(0) for _ in range(8)], [0.0] * 8)
        self.assertEqual([budget.delay(0) for _ in range(3)], [0.5, 1.0, 1.5])
        self.clock.advance(1000)
        self.assertEqual([budget.delay(0) for _ in range(9)], [0.0] * 8 + [0.5])
