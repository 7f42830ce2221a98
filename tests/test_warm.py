"""Consoles that are held open with nobody on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.logger import Logger, formatEvent
from twisted.trial.unittest import SynchronousTestCase
from zope.interface.verify import verifyObject

from tests.fakes import Engine, Events, Guests, console
from tests.sshpair import ALICE, SSHPair
from tests.test_console import Terminal
from vmconsole.config import Console as Settings
from vmconsole.console.attachment import Attachment, Party
from vmconsole.console.pool import ConsolePool
from vmconsole.console.warm import WarmConsoles
from vmconsole.console.who import describe_all
from vmconsole.engine.last_answer import Lifetimes
from vmconsole.engine.permissions import Permissions
from vmconsole.errors import (
    ConsoleBusy,
    ConsoleGone,
    EngineError,
    EngineUnreachable,
    GuestStopped,
    HostUnreachable,
    StoreError,
)
from vmconsole.interfaces import AuthorizedKey, GuestNews, IGuestObserver, KeyList

OFF = GuestStopped("web1 was shut off.")
DOWN = HostUnreachable("node1 does not answer.")
PAUSED, RUNS = GuestNews(False, "is paused"), GuestNews(True)


def key(user_id: str) -> AuthorizedKey:
    """A user's key."""
    return AuthorizedKey(user_id, user_id, f"{user_id}'s key".encode())


class TimedEngine(Engine):
    """Notes when a round begins: each asks for the keys, and nothing else here does."""

    def __init__(self, clock: Clock, *keys: AuthorizedKey) -> None:
        super().__init__(*keys)
        self.rounds: list[float] = []
        self.times: list[float] = []
        self._clock = clock

    async def authorized_keys(self) -> KeyList:
        self.rounds.append(self._clock.seconds())
        return await super().authorized_keys()

    async def consoles(self, user_id: str) -> Any:
        self.times.append(self._clock.seconds())
        return await super().consoles(user_id)


class WarmTestCase(SynchronousTestCase):
    """Alice and Bob may open web1; what begins with ``web`` is kept warm."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.guests = Guests()
        self.engine = TimedEngine(self.clock, key("alice"), key("bob"))
        self.engine.vms = {"alice": [console("web1")], "bob": [console("web1")]}
        self.events = Events()
        self.patch(WarmConsoles, "_log", Logger(observer=self.events))
        self.make()

    def make(self, patterns: Sequence[str] = ("web*",), **settings: Any) -> None:
        """A pool, and who keeps its consoles warm."""
        self.permissions = Permissions(
            self.engine, self.clock, Lifetimes(5.0, 300.0), 15.0, placed_only=True
        )
        self.pool = ConsolePool(self.guests, self.clock, Settings(**{"linger": 0.0, **settings}))
        self.warm = WarmConsoles(self.permissions, self.pool, self.clock, patterns)

    def start(self) -> None:
        """Start them; the first round is over."""
        self.pool.startService()
        self.warm.startService()
        self.passes(0.1)

    def tearDown(self) -> None:
        """Once that it is stopped nothing is left, and nothing went wrong."""
        if self.warm.running:
            self.warm.stopService()
        for opened in self.pool:
            for attachment in list(opened.attachments):
                attachment.loseConnection()
        self.assertNothingLeft()

    def assertNothingLeft(self, why: str = "") -> None:
        """No console, no stream, nothing that waits, and nothing went wrong."""
        self.assertEqual(len(self.pool), 0, why)
        self.assertFalse(any(guest.open for guest in self.guests.opened), why)
        self.assertEqual(self.clock.getDelayedCalls(), [], why)
        self.assertEqual(self.flushLoggedErrors(), [], why)
        self.assertEqual([each for each in self.events.seen if "log_failure" in each], [], why)

    def passes(self, seconds: float) -> None:
        """Time passes, in steps of at most 10 ms: what begins in one does not end in it."""
        end = self.clock.seconds() + seconds
        while (left := end - self.clock.seconds()) > 1e-9:
            self.clock.advance(min(0.01, left))

    def rounds(self) -> list[float]:
        """When rounds began since the last time."""
        rounds, self.engine.rounds = self.engine.rounds, []
        return rounds

    def assertRounds(self, *expected: float) -> None:
        """Rounds began at these times since the last time; each takes a moment."""
        rounds = self.rounds()
        self.assertEqual(len(rounds), len(expected), rounds)
        for when, should in zip(rounds, expected, strict=True):
            self.assertApproximates(when, should, 0.1, f"{rounds}")

    def names(self) -> list[str]:
        """The VMs whose consoles are open, or tried for."""
        return sorted(each.info.vm_name for each in self.pool)

    def logged(self) -> list[str]:
        """What was logged since the last time."""
        seen, self.events.seen[:] = [formatEvent(each) for each in self.events.seen], []
        return seen

    def comes(self, name: str = "carol") -> tuple[Attachment, Terminal]:
        """A user attaches to web1."""
        terminal = Terminal()
        attaching = self.pool.attach(console("web1"), Party(name, "192.0.2.1"), terminal)
        return self.successResultOf(Deferred.fromCoroutine(attaching)), terminal


class OpenTests(WarmTestCase):
    """Which are opened, and what others notice of it."""

    def test_interface(self) -> None:
        """It is told what happens to guests."""
        verifyObject(IGuestObserver, self.warm)
        self.warm.startService()

    def test_opened(self) -> None:
        """Those that match, and that somebody with a key may open, each once; not those that
        stand nowhere."""
        self.engine.vms = {
            "alice": [console("db"), console("web1"), console("web2", host="")],
            "bob": [console("Web4"), console("web1"), console("web3\x1b")],
            "carol": [console("web5")],
        }
        self.start()
        self.assertEqual(self.names(), ["web1", "web3\x1b"])
        self.assertEqual(self.guests.asked, [("web1", "open"), ("web3\x1b", "open")])
        self.assertEqual(self.engine.asked, ["keys", "alice", "bob"])
        self.assertEqual(
            self.logged(),
            ["The console of web1 is kept warm", "The console of web3\\x1b is kept warm"],
        )

    def test_patterns(self) -> None:
        """One of several patterns is enough; each is for the whole name, and the case counts."""
        self.make(("db", "web[12]", "x?"))
        names = ("db", "db1", "web1", "web2", "web3", "x", "xy", "Xy")
        self.engine.vms["alice"] = [console(name) for name in names]
        self.start()
        self.assertEqual(self.names(), ["db", "web1", "web2", "xy"])

    def test_new(self) -> None:
        """What comes later is found within a minute; the engine is asked past what is remembered,
        and there is a round each minute as long as it runs."""
        self.start()
        for number in (2, 3):
            self.engine.vms["alice"].append(console(f"web{number}"))
            self.passes(59.5)
            self.assertEqual(len(self.pool), number - 1)
            self.passes(0.6)
            self.assertEqual(len(self.pool), number)
        self.assertRounds(0, 60, 120.1)
        self.assertEqual(len(self.guests.opened), 3)

    def test_pace(self) -> None:
        """50 users in a second, and no more at the same time, whatever they may open."""
        users = [f"user{number:02}" for number in range(60)]
        self.engine.keys = [key(user) for user in users]
        self.pool.startService()
        self.warm.startService()
        self.assertEqual(self.engine.asked, ["keys", "user00"])
        self.passes(1.005)
        self.assertIn(len(self.engine.times), (50, 51))
        self.passes(1)
        self.assertEqual(self.engine.asked[1:], users)
        self.assertApproximates(self.engine.times[2] - self.engine.times[1], 0.02, 0.005)

    def test_nobody_knows(self) -> None:
        """It is nobody who is on the console: neither listed, nor told of to who has the keyboard,
        nor in anybody's way."""
        self.start()
        (opened,) = self.pool
        self.assertEqual(list(describe_all(opened, 0.0)), [])
        alice, alices = self.comes("alice")
        self.assertEqual((alice.has_keyboard, alices.told), (True, []))
        bob, bobs = self.comes("bob")
        self.assertEqual(
            [line.split(":")[0] for line in describe_all(opened, 0.0)],
            ["alice from 192.0.2.1", "bob from 192.0.2.1"],
        )
        bob.console.keyboard.ask(bob)
        alice.loseConnection()
        self.assertTrue(bob.has_keyboard)
        self.pool.guest_changed("id-web1", PAUSED)
        bob.loseConnection()
        self.assertIsNone(opened.keyboard.holder)
        told = " ".join(alices.told + bobs.told)
        self.assertIn("alice from 192.0.2.1 left.", told)
        self.assertNotIn("vmconsole", told)

    def test_who_comes(self) -> None:
        """Who attaches gets what was printed before, and may type; when they leave the stream
        stays open, for who comes next."""
        self.make(linger=5.0)
        self.start()
        self.guests.guest.print(b"booting ")
        alice, terminal = self.comes()
        alice.replay(b"")
        alice.write(b"root")
        self.assertEqual((terminal.seen, self.guests.guest.typed), (b"\x1b[mbooting ", b"root"))
        alice.loseConnection()
        self.passes(600)
        self.guests.guest.print(b"on")
        bob, terminal = self.comes("bob")
        bob.replay(b"")
        self.assertEqual((terminal.seen, len(self.guests.opened)), (b"\x1b[mbooting on", 1))
        self.warm.stopService()
        self.assertTrue(self.guests.guest.open)
        bob.loseConnection()
        self.passes(5.1)

    def test_somebody_is_there(self) -> None:
        """A console that is open already is kept from then on; who has it notices nothing."""
        self.pool.startService()
        alice, terminal = self.comes()
        terminal.told.clear()
        self.start()
        self.assertEqual((terminal.told, len(self.guests.opened)), ([], 1))
        alice.loseConnection()
        self.assertTrue(self.guests.guest.open)

    def test_stopped_beside_a_user(self) -> None:
        """When it is stopped users stay; and with nobody on it a console lingers as any other."""
        self.make(linger=5.0)
        self.engine.vms["alice"].append(console("web2"))
        self.start()
        alice, _ = self.comes()
        self.warm.stopService()
        self.passes(4.9)
        self.assertEqual(self.names(), ["web1", "web2"])
        self.passes(0.2)
        self.assertEqual(self.names(), ["web1"])
        alice.loseConnection()
        self.passes(5.1)

    def test_stopped_soon_after_a_user(self) -> None:
        """When a user has left a moment before that, the next one is not cut off later."""
        self.make(linger=60.0)
        self.start()
        carol, _ = self.comes()
        carol.loseConnection()
        self.passes(0.5)
        self.warm.stopService()
        self.passes(2)
        bob, terminal = self.comes("bob")
        self.passes(120)
        self.assertEqual((self.guests.guest.open, terminal.lost), (True, None))
        bob.loseConnection()
        self.passes(61)

    def test_stuck_guest(self) -> None:
        """What a user typed and the guest did not take does not wait for the next one: the stream
        is closed soon after they have left, and opened again in the next round."""
        self.start()
        for unsent, opened in ((0, 1), (5, 2)):
            alice, _ = self.comes()
            self.guests.guest.unsent = unsent
            alice.loseConnection()
            self.passes(61)
            self.assertEqual((len(self.guests.opened), self.names()), (opened, ["web1"]))

    def test_viewer(self) -> None:
        """That the user by whom it is open may only watch makes no difference, nor that this
        changes."""
        for role in ("viewer", "operator"):
            self.engine.vms["alice"] = [console("web1", role=role)]
            if role == "viewer":
                self.start()
            self.guests.guest.end(OFF)
            self.passes(1)
        self.assertIsNone(next(iter(self.pool)).keyboard.holder)
        alice, terminal = self.comes()
        self.assertEqual((alice.has_keyboard, terminal.told), (True, []))

    def test_over_ssh(self) -> None:
        """``who`` does not have it, and ``log`` has what the guest printed meanwhile."""
        pair = SSHPair()
        pair.engine.vms[ALICE.id] = [console("web1")]
        warm = WarmConsoles(pair.permissions, pair.pool, pair.clock, ("web*",))
        warm.startService()
        pair.guests.guest.print(b"booting")
        pair.login()
        self.assertEqual(pair.run(b"who").output, b"")
        self.assertEqual(pair.run(b"log web1").output, b"booting")
        channel = pair.run(b"web1", pty=True)
        self.assertIn(b"booting", channel.output)
        pair.type(channel, b"ls")
        self.assertEqual((pair.guests.guest.typed, len(pair.guests.opened)), (b"ls", 1))
        self.assertEqual(len(pair.run(b"who").output.splitlines()), 1)
        pair.type(channel, b"\x1d.")
        self.assertTrue(pair.guests.guest.open)
        warm.stopService()
        self.assertFalse(pair.guests.guest.open)


class GoneTests(WarmTestCase):
    """What is open ends, or cannot be opened."""

    def test_back(self) -> None:
        """A guest that stops and comes back is followed; nobody has to open it anew."""
        self.start()
        self.guests.guest.end(OFF)
        self.passes(1)
        self.assertEqual((len(self.guests.opened), self.names()), (2, ["web1"]))
        self.assertRounds(0)
        self.assertEqual(self.logged(), ["The console of web1 is kept warm"])

    def test_given_up(self) -> None:
        """One that does not come back is given up after ``follow`` seconds, and opened again
        within a minute when it can be."""
        self.make(follow=100.0)
        self.start()
        self.guests.answer = DOWN
        self.engine.vms = {}
        self.guests.guest.end(OFF)
        self.passes(99.8)
        self.assertEqual(self.names(), ["web1"])
        self.passes(0.4)
        self.assertEqual(self.names(), [])
        self.guests.answer = None
        self.passes(60)
        self.assertEqual(self.names(), [])
        self.engine.vms["bob"] = [console("web1", host="node2")]
        self.passes(60)
        self.assertEqual((self.names(), self.guests.places[-1].host), (["web1"], "node2"))

    def test_not_followed(self) -> None:
        """With ``follow = 0``, and when it is over for good, it is opened again in the next
        round."""
        for reason, follow in ((OFF, 0.0), (ConsoleGone("web1 has another console."), 300.0)):
            self.make(follow=follow)
            self.start()
            self.guests.guest.end(reason)
            self.assertEqual(self.names(), [])
            self.passes(59)
            self.assertEqual(self.names(), [])
            self.passes(1.1)
            self.assertEqual(self.names(), ["web1"])
            self.warm.stopService()
            self.assertNothingLeft()

    def test_revoked(self) -> None:
        """When the user by whom it is open may open it no longer, another one is found."""
        self.start()
        self.engine.vms["alice"] = []
        carol, terminal = self.comes()
        self.guests.guest.end(OFF)
        self.passes(1)
        self.assertEqual(carol.console.attachments, [carol])
        self.assertEqual(terminal.told[-1], "resumed")
        self.passes(60)
        self.assertEqual(len(carol.console.attachments), 2)
        carol.loseConnection()
        self.assertTrue(self.guests.guest.open)
        self.guests.guest.end(OFF)
        self.passes(1)
        self.assertEqual(len(carol.console.attachments), 1)
        self.assertEqual(len(self.logged()), 2)

    def test_engine_is_away(self) -> None:
        """An outage of the engine ends nothing: it is opened where it was."""
        self.start()
        self.engine.error = EngineUnreachable("no answer")
        for _ in range(2):
            self.guests.guest.end(OFF)
            self.passes(10)
        self.assertEqual((self.names(), len(self.guests.opened)), (["web1"], 3))

    def test_cannot_be_opened(self) -> None:
        """Why one cannot be opened is logged once, and again when the reason is another one, or
        when it was open meanwhile; it is tried once in a round."""
        self.guests.answer = DOWN
        self.start()
        self.assertEqual(self.logged(), [f"The console of web1 is not warm: {DOWN}"])
        self.passes(300)
        # Bob's is another try.
        self.assertEqual((self.logged(), len(self.guests.asked)), ([], 2 * 5))
        self.guests.answer = ConsoleBusy("It is in use.")
        self.passes(120)
        self.assertEqual(self.logged(), ["The console of web1 is not warm: It is in use."])
        self.guests.answer = None
        self.passes(60)
        self.assertEqual(self.logged(), ["The console of web1 is kept warm"])
        self.guests.answer = ConsoleBusy("It is in use.")
        self.guests.guest.end(ConsoleGone("It is over."))
        self.passes(60)
        self.assertEqual(self.logged(), ["The console of web1 is not warm: It is in use."])

    def test_known_problem(self) -> None:
        """What the engine says cannot be opened is not tried for, which is logged once, escaped;
        it is opened once the engine says so no more."""
        stuck = msgspec.structs.replace(console("web1"), problem="no console\x1b device")
        self.engine.vms = {"alice": [stuck, console("web2")], "bob": [stuck]}
        self.start()
        self.passes(300)
        self.assertEqual(self.guests.asked, [("web2", "open")])
        self.assertEqual(
            self.logged(),
            [
                "The console of web1 is not warm: no console\\x1b device",
                "The console of web2 is kept warm",
            ],
        )
        self.engine.vms["bob"] = [console("web1")]
        self.passes(60)
        self.assertEqual(self.names(), ["web1", "web2"])
        self.assertEqual(self.logged(), ["The console of web1 is kept warm"])

    def test_known_problem_and_started(self) -> None:
        """Once its guest has started, with a console by now, the engine is asked at once."""
        self.engine.vms["alice"] = [
            msgspec.structs.replace(console("web1"), problem="no console device")
        ]
        self.engine.vms["bob"] = []
        self.start()
        self.passes(10)
        self.engine.vms["alice"] = [console("web1")]
        self.warm.guest_changed("id-web1", RUNS)
        self.passes(0.5)
        self.assertEqual(self.names(), ["web1"])

    def test_slow_host(self) -> None:
        """One that takes long to open is not opened a second time, and holds up no other."""
        gate: Deferred[None] = Deferred()
        self.guests.answer = gate
        self.engine.vms["bob"].append(console("web2"))
        self.start()
        self.assertEqual(self.names(), ["web1", "web2"])
        self.passes(130)
        self.assertEqual((len(self.guests.asked), self.logged()), (2, []))
        gate.callback(None)
        self.assertEqual(len(self.guests.opened), 2)


class EngineTests(WarmTestCase):
    """The engine fails."""

    def test_retried(self) -> None:
        """It is asked again after 5 seconds; this is logged."""
        self.engine.error = EngineError("500")
        self.start()
        self.assertEqual(self.logged(), ["Warm consoles wait for the engine: 500"])
        self.passes(6)
        self.assertRounds(0, 5)
        self.engine.error = None
        self.passes(5)
        self.assertEqual(self.names(), ["web1"])
        self.assertRounds(10)
        self.passes(50)
        self.assertRounds()

    def test_one_user(self) -> None:
        """That the engine has no use for one user keeps nobody else's consoles from being
        opened."""
        self.engine.keys.insert(0, key("gone"))
        self.engine.unknown.add("gone")
        self.start()
        self.assertTrue(any("500" in line for line in self.logged()))
        self.passes(60)
        self.assertEqual(self.names(), ["web1"])

    def test_outage_in_a_round(self) -> None:
        """When it gives no answer any more the round is over, and the next one follows soon."""
        self.engine.silent.add("alice")
        self.start()
        self.assertEqual(self.engine.asked, ["keys", "alice"])
        self.engine.silent.clear()
        self.passes(5)
        self.assertEqual(self.names(), ["web1"])
        self.assertRounds(0, 5)

    def test_bug(self) -> None:
        """What nobody thought of is logged, and the consoles that are warm stay so."""
        self.start()
        self.engine.error = StoreError("a bug")
        self.passes(60)
        (failure,) = [each["log_failure"] for each in self.events.seen if "log_failure" in each]
        self.assertEqual(failure.type, StoreError)
        self.assertEqual(self.names(), ["web1"])
        self.events.seen.clear()


class NewsTests(WarmTestCase):
    """What happens to guests."""

    def setUp(self) -> None:
        super().setUp()
        self.engine.keys.pop()

    def news(self, news: GuestNews, vm_id: str = "id-web2") -> None:
        """A host tells it."""
        self.warm.guest_changed(vm_id, news)

    def test_started(self) -> None:
        """A guest that is started is looked for soon: after 0.25, 1 and 4 seconds, as the engine
        may hear of it later."""
        self.start()
        self.passes(9.9)
        self.rounds()
        self.news(RUNS)
        self.passes(1)
        self.assertRounds(10.2)
        self.engine.vms["alice"].append(console("web2"))
        self.passes(0.3)
        self.assertEqual(self.names(), ["web1", "web2"])
        self.assertRounds(11.3)
        self.passes(60)
        self.assertRounds(15.3)
        self.passes(10)
        self.assertRounds(75.3)

    def test_nothing_to_look_for(self) -> None:
        """A guest that is paused is not looked for, nor one whose console is warm."""
        self.start()
        self.news(PAUSED)
        self.news(RUNS, "id-web1")
        self.passes(50)
        self.assertRounds(0)

    def test_passed_on(self) -> None:
        """The consoles are told, whether they are warm or not, also when nothing is kept warm any
        more."""
        self.start()
        _, terminal = self.comes()
        self.news(PAUSED, "id-web1")
        self.news(RUNS, "id-web1")
        self.warm.stopService()
        self.news(PAUSED, "id-web1")
        paused = "web1 is paused."
        self.assertEqual(terminal.told, [paused, "web1 runs again.", paused])

    def test_tried_at_once(self) -> None:
        """One that is away is tried at once when its guest is started."""
        self.start()
        self.guests.answer = DOWN
        self.guests.guest.end(OFF)
        self.passes(23)
        self.guests.answer = None
        self.news(RUNS, "id-web1")
        self.assertEqual(len(self.guests.opened), 2)
        self.assertRounds(0)

    def test_during_a_round(self) -> None:
        """News during a round bring another one soon after it."""
        gate: Deferred[None] = Deferred()
        self.engine.consoles_gate = gate
        self.start()
        self.news(RUNS)
        self.passes(2)
        self.assertRounds(0)
        self.engine.consoles_gate = None
        gate.callback(None)
        self.passes(6)
        self.assertRounds(2.4, 3.4, 7.4)

    def test_during_an_outage(self) -> None:
        """They do so, too, when the engine does not answer."""
        self.engine.error = EngineUnreachable("no answer")
        self.start()
        self.passes(2)
        self.news(RUNS)
        self.passes(2)
        self.assertRounds(0, 2.3, 3.3)
        self.passes(9)
        self.assertRounds(7.3, 12.3)

    def test_again(self) -> None:
        """Guests that are started soon after another one are looked for as long as that, and all
        of them by the same rounds."""
        self.start()
        self.passes(9.9)
        self.rounds()
        self.news(RUNS)
        self.passes(3)
        for number in range(3, 100):
            self.news(RUNS, f"id-web{number}")
        self.passes(20)
        self.assertRounds(10.2, 11.3, 15.3, 15.6, 16.6, 20.6)

    def test_not_running(self) -> None:
        """Before it is started, and after it was stopped, news bring nothing; started again it is
        as at first."""
        self.news(RUNS)
        for _ in range(2):
            self.start()
            self.passes(10)
            self.warm.stopService()
            self.news(RUNS)
            self.passes(100)
            self.assertEqual(len(self.rounds()), 1)
            self.assertNothingLeft()

    def test_started_again(self) -> None:
        """News during the first round after it was stopped and started again bring another."""
        self.start()
        self.warm.stopService()
        gate: Deferred[None] = Deferred()
        self.engine.consoles_gate = gate
        self.start()
        self.rounds()
        for _ in range(2):
            self.news(RUNS)
        self.engine.consoles_gate = None
        gate.callback(None)
        self.passes(0.5)
        self.assertEqual(len(self.rounds()), 1)


class StopTests(WarmTestCase):
    """It is stopped, whatever is under way."""

    def phases(self) -> dict[str, Callable[[], None]]:
        """How to come to each."""

        def gate(name: str) -> Callable[[], None]:
            def arrive() -> None:
                setattr(self.engine, name, Deferred())
                self.start()

            return arrive

        def pace() -> None:
            self.pool.startService()
            self.warm.startService()

        def retry() -> None:
            self.engine.error = EngineUnreachable("no answer")
            self.start()

        def soon() -> None:
            self.start()
            self.warm.guest_changed("id-web2", RUNS)

        def refused() -> None:
            self.guests.answer = DOWN
            self.start()

        def connecting() -> None:
            self.guests.answer = Deferred()
            self.start()

        def away(answer: Any, engine: bool = False) -> Callable[[], None]:
            def arrive() -> None:
                self.start()
                self.guests.answer = answer
                self.engine.consoles_gate = Deferred() if engine else None
                self.guests.guest.end(OFF)

            return arrive

        return {
            "keys": gate("keys_gate"),
            "consoles": gate("consoles_gate"),
            "pace": pace,
            "pause": self.start,
            "retry": retry,
            "soon": soon,
            "refused": refused,
            "connecting": connecting,
            "away": away(DOWN),
            "away, connecting": away(Deferred()),
            "away, locating": away(None, engine=True),
            "not started": lambda: None,
        }

    def test_stopped(self) -> None:
        """Nothing is left, in whichever order it and its pool are stopped, and nothing follows."""
        for order in ("warm, pool", "pool, warm", "warm"):
            for phase in self.phases():
                self.engine.error = self.engine.keys_gate = self.engine.consoles_gate = None
                self.guests.answer = None
                self.make()
                self.phases()[phase]()
                for each in order.split(", "):
                    getattr(self, each).stopService()
                self.assertNothingLeft(f"{order}: {phase}")
                self.rounds()
                self.passes(10)
                self.assertEqual((self.rounds(), len(self.pool)), ([], 0), phase)
        self.assertGreater(self.guests.cancelled, 0)

    def test_pool_stops_in_a_round(self) -> None:
        """A console that the stopped pool ends is not said to be what cannot be warm."""
        self.start()
        self.logged()
        self.pool.stopService()
        self.warm.stopService()
        self.assertEqual(self.logged(), [])

    def test_gives_up_what_is_connecting(self) -> None:
        """What the host is asked for is given up; nothing is logged of that."""
        self.guests.answer = Deferred()
        self.start()
        self.warm.stopService()
        self.assertEqual((self.guests.cancelled, self.logged()), (1, []))
