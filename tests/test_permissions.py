"""Who may open what, and what happens when somebody no longer may."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from twisted.internet.defer import Deferred
from zope.interface.verify import verifyObject

from tests.engine_kit import EngineTestCase, start
from tests.fakes import Engine, console
from vmconsole.engine.console_lists import ConsoleLists
from vmconsole.engine.last_answer import Lifetimes, Outage
from vmconsole.engine.permissions import Permissions
from vmconsole.errors import EngineError, EngineUnreachable
from vmconsole.interfaces import (
    AuthorizedKey,
    ConsoleInfo,
    ConsoleList,
    IPermissions,
    IWatch,
    KeyOwner,
    User,
)
from vmconsole.keyoptions import KeyOptions

HERE = "192.0.2.7"
RECHECK = 15.0


def key_of(name: str, **options: object) -> AuthorizedKey:
    return AuthorizedKey(f"u-{name}", name, f"{name}'s key".encode(), KeyOptions(**options))  # type: ignore[arg-type]


class ListsTests(EngineTestCase):
    """``ConsoleLists``."""

    def setUp(self) -> None:
        super().setUp()
        self.engine = Engine()
        self.engine.vms = {"alice": [console("db"), console("web")], "bob": [console("web")]}
        self.remember()

    def remember(self, stale_grace: float = 300.0, capacity: int = 1000) -> None:
        lifetimes = Lifetimes(5.0, stale_grace)
        self.lists = ConsoleLists(self.engine, self.clock, lifetimes, Outage(), capacity)

    def names(self, user: str = "alice", fresh: bool = False) -> list[str]:
        found = self.result(self.lists.consoles(user, fresh))
        return [each.vm_name for each in found.consoles]

    def test_remembered(self) -> None:
        """An answer serves for cache_ttl seconds, for that user; ``fresh`` passes it by."""
        for _ in range(3):
            self.assertEqual(self.names(), ["db", "web"])
        self.assertEqual(self.names("bob"), ["web"])
        self.assertEqual(self.engine.asked, ["alice", "bob"])
        self.engine.vms["alice"] = []
        self.assertEqual(self.names(), ["db", "web"])
        self.assertEqual(self.names(fresh=True), [])
        self.assertEqual(self.names(), [])
        self.clock.advance(5.0)
        self.names()
        self.assertEqual(self.engine.asked, ["alice", "bob", "alice", "alice"])

    def test_ahead(self) -> None:
        """Past half of that time an answer is renewed while it is used."""
        self.names()
        self.clock.advance(3)
        self.engine.vms["alice"] = []
        self.engine.consoles_gate = Deferred()
        self.assertEqual(self.names(), ["db", "web"])
        self.engine.consoles_gate.callback(None)
        self.assertEqual(self.names(), [])

    def test_forgotten(self) -> None:
        """Old answers take no memory, nor do those of questions that failed."""
        self.remember(stale_grace=10)
        for number in range(50):
            self.names(f"user {number}")
            self.clock.advance(1)
        self.assertLessEqual(len(self.lists), 11)
        self.engine.error = EngineError("500")
        for number in range(50):
            self.failure(self.lists.consoles(f"stranger {number}"), EngineError)
            self.clock.advance(1)
        self.assertLessEqual(len(self.lists), 3)
        for number in range(50):
            self.failure(self.lists.fresh(f"another {number}"), EngineError)
            self.clock.advance(1)
        self.assertLessEqual(len(self.lists), 3)

    def test_not_forgotten(self) -> None:
        """The longer of cache_ttl and stale_grace counts, whatever others ask meanwhile; a
        question that just failed is remembered, too."""
        self.remember(stale_grace=0)
        for _ in range(2):
            self.names()
            self.names("bob")
        self.assertEqual(self.engine.asked, ["alice", "bob"])
        self.remember(stale_grace=10)
        self.names()
        self.clock.advance(8)
        self.names("bob")
        self.engine.error = EngineUnreachable("refused")
        self.assertEqual(self.names(), ["db", "web"])
        self.engine.asked.clear()
        for _ in range(3):
            self.failure(self.lists.consoles("carol"), EngineUnreachable)
        self.assertEqual(self.engine.asked, ["carol"])

    def test_capacity(self) -> None:
        """When there are too many, those go that were used longest ago."""
        self.remember(capacity=5)
        self.engine.vms["carol"] = [console("web"), console("x")]
        for user in ("alice", "bob", "carol", "alice"):
            self.names(user)
            self.clock.advance(1.1)
        self.engine.vms["dave"] = [console("y")]
        self.names("dave")
        self.engine.error = EngineUnreachable("refused")
        for user in ("alice", "carol", "dave"):
            self.result(self.lists.consoles(user, fresh=True))
        self.failure(self.lists.consoles("bob"), EngineUnreachable)

    def test_capacity_in_use(self) -> None:
        """An answer that is being renewed does not go."""
        self.remember(capacity=2)
        self.names()
        self.clock.advance(6)
        self.engine.consoles_gate = gate = Deferred()
        waiting = [start(self.lists.consoles("alice"))]
        self.engine.consoles_gate = None
        self.names("bob")
        waiting.append(start(self.lists.consoles("alice")))
        gate.callback(None)
        for each in waiting:
            self.assertTrue(self.successResultOf(each).consoles)
        self.assertEqual(self.engine.asked, ["alice", "alice", "bob"])

    def test_outage(self) -> None:
        """The last answer serves within stale_grace, ``fresh`` or not, and says from when it is;
        one of another user does not."""
        self.names()
        answered = self.clock.seconds()
        self.engine.error = EngineUnreachable("refused")
        self.clock.advance(299)
        for fresh in (False, True):
            found = self.result(self.lists.consoles("alice", fresh))
            self.assertEqual(found, ConsoleList((console("db"), console("web")), answered))
        self.failure(self.lists.consoles("bob"), EngineUnreachable)
        self.clock.advance(1)
        self.failure(self.lists.consoles("alice"), EngineUnreachable)

    def test_useless_answers(self) -> None:
        """An answer that is no use is an answer: an older one does not serve; nor is it
        remembered, beyond a second."""
        self.names()
        self.engine.error = EngineError("403")
        self.clock.advance(5)
        for _ in range(3):
            self.assertEqual(self.failure(self.lists.consoles("alice"), EngineError), "403")
        self.assertEqual(len(self.engine.asked), 2)
        self.engine.error = None
        self.clock.advance(1)
        self.assertEqual(self.names(), ["db", "web"])

    def test_hanging(self) -> None:
        """Once one question showed an outage, others do not wait for its end either, unless
        there is nothing older to go by."""
        self.names()
        self.engine.error = EngineUnreachable("no answer")
        self.failure(self.lists.consoles("bob"), EngineUnreachable)
        self.clock.advance(6)
        self.engine.consoles_gate = Deferred()
        waiting = start(self.lists.consoles("alice"))
        nothing_older = start(self.lists.consoles("bob"))
        self.clock.advance(1)
        self.assertIsNotNone(self.successResultOf(waiting).answered)
        self.clock.advance(3)
        self.engine.error = None
        self.engine.consoles_gate.callback(None)
        self.assertIsNone(self.successResultOf(nothing_older).answered)

    def test_slow(self) -> None:
        """An engine that is slow, and was not out of reach when it was asked last, is waited
        for."""
        before: list[list[EngineError | None]] = [
            [],
            [EngineError("500")],
            [EngineUnreachable("refused"), EngineError("500")],
            [EngineUnreachable("refused"), None],
        ]
        for errors in before:
            self.remember()
            self.names()
            for error in errors:
                self.engine.error = error
                start(self.lists.consoles("bob", fresh=True)).addErrback(lambda _: None)
                self.clock.advance(2)
            self.clock.advance(6)
            self.engine.error, self.engine.consoles_gate = None, Deferred()
            waiting = start(self.lists.consoles("alice"))
            self.clock.advance(4)
            self.assertNoResult(waiting)
            self.engine.consoles_gate.callback(None)
            self.engine.consoles_gate = None
            self.assertIsNone(self.successResultOf(waiting).answered, errors)

    def test_shared(self) -> None:
        """All who want the same answer share one request; others have their own."""
        self.engine.consoles_gate = Deferred()
        waiting = [start(self.lists.consoles("alice", fresh)) for fresh in (True, False, True)]
        waiting.append(start(self.lists.consoles("bob")))
        waiting[0].addErrback(lambda _: None)
        waiting[0].cancel()
        waiting.append(start(self.lists.consoles("alice")))
        self.assertEqual(self.engine.asked, ["alice", "bob"])
        self.engine.consoles_gate.callback(None)
        for each in waiting[1:]:
            self.assertTrue(self.successResultOf(each).consoles)


class Seen:
    """What one watch has told."""

    def __init__(self) -> None:
        self.revoked: list[str] = []
        self.unchecked: list[float | None] = []
        self.consoles: dict[str, list[str]] = {}
        self.watch: IWatch


class WatchTests(EngineTestCase):
    """Looking again."""

    def setUp(self) -> None:
        super().setUp()
        self.engine = Engine(key_of("alice"), key_of("bob"))
        self.engine.vms = {"u-alice": [console("db"), console("web")], "u-bob": [console("web")]}
        self.permissions = Permissions(
            self.engine, self.clock, Lifetimes(5.0, 300.0), RECHECK, placed_only=False
        )
        self.permissions.startService()
        self.addCleanup(self.permissions.stopService)
        self.assertEqual(self.engine.asked, ["keys"])
        self.engine.asked.clear()

    def test_domain(self) -> None:
        """Where all users are of one domain a name may be without it; the name itself comes
        first, and another domain is another user's."""
        engine = Engine(key_of("alice@internal"), key_of("bob"), key_of("bob@internal"))
        one, many = (
            Permissions(
                engine, self.clock, Lifetimes(5.0, 300.0), RECHECK, placed_only=False, domain=domain
            )
            for domain in ("internal", "")
        )

        def named(permissions: Permissions, *names: str) -> str | None:
            owner = self.result(permissions.user_named(names))
            return owner and owner.user.name

        self.assertEqual(named(one, "alice"), "alice@internal")
        self.assertEqual(named(one, "alice@internal"), "alice@internal")
        self.assertEqual(named(one, "bob"), "bob")
        self.assertIsNone(named(one, "alice@elsewhere"))
        self.assertIsNone(named(many, "alice"))

    def login(self, name: str, answered: float | None = None) -> Seen:
        """Somebody logs in."""
        seen = Seen()
        owner = KeyOwner(User(f"u-{name}", name), False, answered)
        seen.watch = self.permissions.watch(
            key_of(name).blob, HERE, owner, seen.revoked.append, seen.unchecked.append
        )
        return seen

    def open(self, seen: Seen, info: ConsoleInfo) -> Callable[[], None]:
        """And opens a console."""
        told = seen.consoles.setdefault(info.vm_name, [])
        stop: Callable[[], None] = seen.watch.console(info, told.append, told.append)
        return stop

    def periods(self, count: int = 1) -> None:
        """So many pass, in small steps."""
        for _ in range(count * 30):
            self.clock.advance(RECHECK / 30)

    def test_interface(self) -> None:
        """The seams."""
        verifyObject(IPermissions, self.permissions)
        verifyObject(IWatch, self.login("alice").watch)

    def test_start(self) -> None:
        """At the start the keys are fetched: the first user does not wait for them. The log says
        how many there are, or what is wrong."""
        self.assertIsNotNone(self.result(self.permissions.owner(key_of("alice").blob, HERE)))
        self.assertEqual(self.engine.asked, [])
        self.assertEqual(len(self.logged("The engine knows 2 keys")), 1)
        self.permissions.stopService()
        self.engine.error = EngineError("The engine says 403.")
        self.clock.advance(10)
        self.permissions.startService()
        self.assertEqual(len(self.logged("not of use yet: The engine says 403.")), 1)

    def test_nobody_here(self) -> None:
        """Without sessions nobody is asked."""
        self.periods(3)
        self.login("alice").watch.stop()
        self.periods(3)
        self.assertEqual(self.engine.asked, [])

    def test_questions(self) -> None:
        """A period has one question for the keys, and one for each user with an open console."""
        first, second, bob = self.login("alice"), self.login("alice"), self.login("bob")
        self.open(first, console("web"))
        self.open(first, console("db"))
        stop = self.open(second, console("web"))
        self.periods(2)
        self.assertEqual(self.engine.asked, ["keys", "u-alice"] * 2)
        self.open(bob, console("web"))
        self.clock.advance(RECHECK)
        self.clock.advance(RECHECK * 0.9)
        self.assertEqual(self.engine.asked[4:], ["keys", "u-bob", "u-alice"])
        first.watch.stop()
        stop()
        self.clock.advance(RECHECK)
        self.assertEqual(self.engine.asked[7:], ["keys", "u-bob"])
        self.assertEqual(first.revoked + second.revoked + bob.revoked, [])
        self.assertEqual(first.consoles, {"web": [], "db": []})

    def test_remembered(self) -> None:
        """What is remembered of answers to others is no answer here."""
        alice = self.login("alice")
        self.open(alice, console("web"))
        self.clock.advance(RECHECK - 1)
        self.result(self.permissions.consoles("u-alice"))
        self.result(self.permissions.owner(key_of("alice").blob, HERE))
        self.engine.asked.clear()
        self.clock.advance(1)
        self.clock.advance(0)
        self.assertEqual(sorted(self.engine.asked), ["keys", "u-alice"])

    def test_key_removed(self) -> None:
        """A key that is no longer the user's ends the login and its consoles, once; others stay."""
        alice, bob, idle = self.login("alice"), self.login("bob"), self.login("alice")
        self.open(alice, console("web"))
        self.open(bob, console("web"))
        self.engine.keys = [key_of("bob")]
        self.periods(3)
        [reason] = alice.revoked
        self.assertIn("Your key no longer lets you in", reason)
        self.assertEqual(alice.consoles, {"web": [reason]})
        self.assertEqual(idle.revoked, [reason])
        self.assertEqual((bob.revoked, bob.consoles), ([], {"web": []}))

    def test_key_of_somebody_else(self) -> None:
        """So does one that is somebody else's now, or several users'."""
        for keys in (
            [AuthorizedKey("u-carol", "carol", key_of("alice").blob)],
            [key_of("alice"), AuthorizedKey("u-carol", "carol", key_of("alice").blob)],
        ):
            alice = self.login("alice")
            self.engine.keys = keys
            self.periods()
            self.assertEqual(len(alice.revoked), 1)

    def test_key_options(self) -> None:
        """So does one that has expired, or may no longer be used from where the user is."""
        self.engine.keys = [
            key_of("alice", expires=self.clock.seconds() + 20),
            key_of("bob", sources=("198.51.100.0/24",)),
        ]
        alice, bob = self.login("alice"), self.login("bob")
        self.periods()
        self.assertEqual((len(alice.revoked), len(bob.revoked)), (0, 1))
        self.assertIn(HERE, bob.revoked[0])
        self.periods()
        self.assertIn("expired", alice.revoked[0])

    def test_clock_is_set(self) -> None:
        """A key expires by the time of day."""
        day = 1000.0
        self.clock.time_of_day = lambda: day
        self.engine.keys = [key_of("alice", expires=1001.0)]
        alice = self.login("alice")
        self.periods(3)
        self.assertEqual(alice.revoked, [])
        day = 1001.1
        self.periods()
        self.assertIn("expired", alice.revoked[0])

    def test_grant_revoked(self) -> None:
        """A VM that is missing from two answers running ends that console, once, and no other."""
        alice = self.login("alice")
        self.open(alice, console("web"))
        self.open(alice, console("db"))
        self.engine.vms["u-alice"] = [console("db")]
        self.periods()
        self.assertEqual(alice.consoles, {"web": [], "db": []})
        self.periods()
        self.assertEqual(alice.consoles, {"web": ["You no longer have access to web."], "db": []})
        self.periods(2)
        self.assertEqual(len(alice.consoles["web"]), 1)
        self.assertEqual(alice.revoked, [])

    def test_missing_once(self) -> None:
        """A VM that is missing now and then, as when it moves, ends nothing."""
        alice = self.login("alice")
        self.open(alice, console("web"))
        for _ in range(3):
            self.engine.vms["u-alice"] = []
            self.periods()
            self.engine.vms["u-alice"] = [console("web", host="node2")]
            self.periods()
        self.assertEqual(alice.consoles, {"web": []})

    def test_missing_between_failures(self) -> None:
        """An answer that is no use between two that lack the VM neither counts nor forgives."""
        alice = self.login("alice")
        self.open(alice, console("web"))
        self.engine.vms["u-alice"] = []
        self.periods()
        for error in (EngineUnreachable("refused"), EngineError("500")):
            self.engine.error = error
            self.periods(3)
            self.assertEqual(alice.consoles, {"web": []})
        self.engine.error = None
        self.periods()
        self.assertEqual(len(alice.consoles["web"]), 1)

    def test_user_ids(self) -> None:
        """All users with a key, as the engine tells it now; an old answer does not serve."""
        self.engine.keys = [key_of("bob"), key_of("alice"), key_of("bob")]
        self.assertEqual(list(self.result(self.permissions.user_ids())), ["u-bob", "u-alice"])
        self.engine.keys = [key_of("carol")]
        self.assertEqual(list(self.result(self.permissions.user_ids())), ["u-carol"])
        self.engine.error = EngineUnreachable("refused")
        self.assertEqual(self.failure(self.permissions.user_ids(), EngineUnreachable), "refused")

    def test_role(self) -> None:
        """A role that changes is told, once for each change."""
        alice = self.login("alice")
        self.open(alice, console("web"))
        for role in ("viewer", "operator"):
            self.engine.vms["u-alice"] = [console("web", role=role)]  # type: ignore[arg-type]
            self.periods(2)
        self.assertEqual(alice.consoles, {"web": ["viewer", "operator"]})

    def test_outage(self) -> None:
        """An outage, or an answer of no use, ends nothing, also without end; it is told once,
        with the time of the last good look, and its end is told."""
        alice, bob = self.login("alice"), self.login("bob")
        self.open(alice, console("web"))
        self.periods()
        last = self.clock.seconds()
        for error in (EngineUnreachable("refused"), EngineError("The engine says 403.")):
            self.engine.error = error
            self.engine.keys = []
            self.periods(40)
            self.assertEqual(alice.revoked + bob.revoked, [])
            for seen in (alice, bob):
                [since] = seen.unchecked
                assert since is not None
                self.assertAlmostEqual(since, last, 3)
        self.assertEqual(len(self.logged("cannot be checked (alice, bob): refused")), 1)
        self.assertEqual(len(self.logged("cannot be checked (as before): The engine says 403.")), 1)
        self.engine.error, self.engine.keys = None, [key_of("alice"), key_of("bob")]
        self.periods()
        self.assertEqual((alice.unchecked[1:], bob.unchecked[1:]), ([None], [None]))
        self.periods()
        self.assertEqual(len(alice.unchecked), 2)

    def test_consoles_fail(self) -> None:
        """When only the question for a user's consoles fails, only that user is unchecked."""
        alice, bob = self.login("alice"), self.login("bob")
        self.open(alice, console("web"))
        self.open(bob, console("web"))
        self.engine.unknown = {"u-alice"}
        self.periods(3)
        self.assertEqual((len(alice.unchecked), bob.unchecked), (1, []))
        self.assertEqual(alice.consoles, {"web": []})
        self.assertEqual(len(self.logged("cannot be checked (alice)")), 1)

    def test_names_in_the_log(self) -> None:
        """Who cannot be checked is named once, with what a name may do to a terminal escaped."""
        self.engine.keys = [key_of("al\x1bice"), key_of("bob")]
        self.login("al\x1bice")
        self.login("al\x1bice")
        self.login("bob")
        self.engine.error = EngineUnreachable("refused")
        self.periods()
        self.assertEqual(len(self.logged("cannot be checked (al\\x1bice, bob): refused")), 1)

    def test_over(self) -> None:
        """When an outage is over users are asked about again; a login that is ended by the first
        good answer is not told that it is checked."""
        alice, bob = self.login("alice"), self.login("bob")
        self.open(alice, console("web"))
        self.engine.error = EngineUnreachable("refused")
        self.periods(3)
        self.engine.error, self.engine.keys = None, [key_of("alice")]
        self.periods()
        self.assertEqual(alice.unchecked[1:], [None])
        self.assertEqual((len(bob.unchecked), len(bob.revoked)), (1, 1))

    def test_slow_answers(self) -> None:
        """The last good look was when its question was asked."""
        alice, bob = self.login("alice"), self.login("bob")
        self.open(alice, console("web"))
        self.engine.keys_gate, self.engine.consoles_gate = Deferred(), Deferred()
        self.clock.advance(RECHECK)
        began = self.clock.seconds()
        self.clock.advance(1)
        self.engine.keys_gate.callback(None)
        self.clock.advance(1)
        self.engine.consoles_gate.callback(None)
        self.engine.error = EngineUnreachable("refused")
        self.engine.keys_gate = self.engine.consoles_gate = None
        self.periods()
        self.assertEqual((alice.unchecked, bob.unchecked), ([began], [began]))

    def test_confirmed(self) -> None:
        """A login by an old answer is confirmed by a good look at its key, and by none at its
        consoles."""
        alice = self.login("alice", self.clock.seconds() - 100)
        self.open(alice, console("web"))
        self.engine.keys_gate = Deferred()
        self.periods()
        self.assertEqual(self.questions(), {"keys": 1, "u-alice": 1})
        self.assertIsNotNone(alice.watch.unconfirmed)
        self.engine.keys_gate.callback(None)
        self.assertIsNone(alice.watch.unconfirmed)

    def test_nothing_kept(self) -> None:
        """Of users who have left nothing is kept."""
        for seen in self.crowd(10):
            self.periods()
            seen.watch.stop()
        self.periods()
        self.assertEqual(self.permissions._asked, {})

    def test_slow_consoles(self) -> None:
        """Of a look that fails it is told when that one was last good, whatever the other is."""
        alice = self.login("alice")
        stop = self.open(alice, console("web"))
        self.open(alice, console("db"))
        self.engine.consoles_gate = Deferred()
        self.clock.advance(RECHECK)
        began = self.clock.seconds()
        self.clock.advance(2)
        self.engine.consoles_gate.callback(None)
        self.engine.consoles_gate = None
        self.engine.unknown = {"u-alice"}
        self.periods(3)
        self.assertEqual(alice.unchecked, [began])
        stop()
        self.assertEqual(len(alice.unchecked), 1)

    def test_hanging(self) -> None:
        """Once the question for the keys showed an outage, nobody waits long for consoles."""
        self.result(self.permissions.consoles("u-alice"))
        self.clock.advance(6)
        self.engine.error = EngineUnreachable("refused")
        self.result(self.permissions.owner(key_of("alice").blob, HERE))
        self.engine.consoles_gate = Deferred()
        waiting = start(self.permissions.consoles("u-alice"))
        self.clock.advance(1)
        self.assertIsNotNone(self.successResultOf(waiting).answered)

    def test_changing_trouble(self) -> None:
        """Trouble that is told in other words each time does not fill the log."""
        self.crowd(10)
        for number in range(60):
            self.engine.error = EngineError(f"500 at {number}")
            self.clock.advance(RECHECK / 15)
        self.events.clear()
        for number in range(60):
            self.engine.error = EngineError(f"500 again at {number}")
            self.clock.advance(RECHECK / 15)
        count = len(self.logged("cannot be checked (as before): 500 again"))
        self.assertGreater(count, 2)
        self.assertLess(count, 10)

    def test_names_in_reasons(self) -> None:
        """What the name of a VM may do to a terminal is escaped."""
        alice = self.login("alice")
        self.open(alice, console("we\x1bb"))
        self.engine.vms["u-alice"] = []
        self.periods(2)
        [told] = alice.consoles.values()
        self.assertEqual(told, ["You no longer have access to we\\x1bb."])

    def test_stale_login(self) -> None:
        """Who was let in by an old answer is unchecked since then."""
        answered = self.clock.seconds() - 100
        alice = self.login("alice", answered)
        self.engine.error = EngineUnreachable("refused")
        self.periods()
        self.assertEqual(alice.unchecked, [answered])

    def crowd(self, count: int) -> list[Seen]:
        """So many users, each with an open console."""
        names = [f"n{number:03}" for number in range(count)]
        self.engine.keys = [key_of(name) for name in names]
        self.engine.vms = {f"u-{name}": [console("web")] for name in names}
        crowd = [self.login(name) for name in names]
        for seen in crowd:
            self.open(seen, console("web"))
        return crowd

    def test_spread(self) -> None:
        """The questions about users are spread over the period."""
        self.crowd(10)
        self.clock.advance(RECHECK)
        counts = []
        for _ in range(10):
            counts.append(len(self.engine.asked))
            self.clock.advance(RECHECK * 0.078)
            counts.append(len(self.engine.asked))
            self.clock.advance(RECHECK * 0.002)
        self.assertEqual(counts, [count for count in range(2, 12) for _ in range(2)])

    def questions(self) -> Counter[str]:
        """What was asked since the last look."""
        asked, self.engine.asked = Counter(self.engine.asked), []
        return asked

    def test_at_once(self) -> None:
        """At most four questions about users are out at a time; a look that lags is logged in
        each period that it holds up, and the look at the keys goes on meanwhile."""
        crowd = self.crowd(10)
        self.engine.consoles_gate = Deferred()
        self.periods(3)
        asked = self.questions()
        self.assertEqual((asked["keys"], asked.total()), (3, 7))
        self.assertEqual(len(self.logged("the consoles of open sessions lags")), 2)
        self.assertEqual(len(self.logged("began 30 s ago is not done")), 1)
        self.engine.keys = [key for key in self.engine.keys if key.user_id != "u-n009"]
        self.periods()
        self.assertEqual([len(seen.revoked) for seen in crowd], [0] * 9 + [1])
        gate, self.engine.consoles_gate = self.engine.consoles_gate, None
        gate.callback(None)
        asked = self.questions()
        self.assertEqual({asked[f"u-n{number:03}"] for number in range(4, 9)}, {1})
        self.periods(2)
        self.assertEqual(self.questions()["u-n000"], 2)
        self.assertEqual(len(self.logged("lags")), 3)
        self.engine.consoles_gate = Deferred()
        self.periods(3)
        self.assertEqual(len(self.logged("began 30 s ago is not done")), 2)

    def test_keys_lag(self) -> None:
        """A question for the keys that takes longer than a period is logged, and not repeated."""
        self.login("alice")
        self.engine.keys_gate = Deferred()
        self.periods(3)
        self.assertEqual(self.questions(), {"keys": 1})
        self.assertEqual(len(self.logged("the keys of open sessions lags")), 2)

    def test_outage_begins(self) -> None:
        """An engine that stops to answer in the middle is not asked about everybody."""
        crowd = self.crowd(10)
        self.clock.advance(RECHECK)
        self.engine.error = EngineUnreachable("refused")
        self.clock.advance(RECHECK * 0.8)
        self.assertEqual(len(self.engine.asked), 1 + 1 + 4)
        self.assertEqual([len(seen.unchecked) for seen in crowd], [0] + [1] * 9)

    def test_no_outage(self) -> None:
        """Answers of no use, or none now and then, hide nobody: all users are asked about."""
        self.crowd(10)
        self.engine.unknown = {f"u-n{number:03}" for number in range(9)}
        self.periods(2)
        self.assertEqual(self.questions()["u-n009"], 1)
        self.engine.unknown = set()
        self.engine.silent = {f"u-n{number:03}" for number in range(0, 10, 2)}
        self.periods(2)
        self.assertEqual({count for _, count in self.questions().items()}, {2})

    def test_silent_about_some(self) -> None:
        """No answer about some users, however many, hides nobody else: they all get their turn."""
        crowd = self.crowd(20)
        self.engine.silent = {f"u-n{number:03}" for number in range(10)}
        self.engine.vms = {}
        self.periods(8)
        ended = [len(seen.consoles["web"]) for seen in crowd]
        self.assertEqual(ended, [0] * 10 + [1] * 10)

    def test_broken_callback(self) -> None:
        """An error of ours about one login spoils the look at no other."""
        broken, fine = self.login("alice"), self.login("bob")
        for seen in (broken, fine):
            self.open(seen, console("web"))
        broken.watch.console(console("db"), broken.revoked.index, broken.revoked.index)  # type: ignore[arg-type]
        self.engine.vms = {}
        self.periods(3)
        self.assertEqual(fine.consoles, {"web": ["You no longer have access to web."]})
        self.engine.keys = []
        self.periods()
        self.assertEqual((len(broken.revoked), len(fine.revoked)), (1, 1))
        self.assertEqual(len(self.flushLoggedErrors(ValueError)), 2)

    def test_broken_sessions(self) -> None:
        """Nor about one of a user's sessions the look at the others, nor about a user's consoles
        what comes later; each is logged."""
        broken, *fine = [self.login("alice") for _ in range(12)]
        broken.watch.console(console("db"), broken.revoked.index, broken.revoked.index)  # type: ignore[arg-type]
        for seen in fine:
            self.open(seen, console("web"))
        self.engine.vms = {}
        self.periods(2)
        for seen in fine:
            self.assertEqual(seen.consoles, {"web": ["You no longer have access to web."]})
        self.assertEqual(len(self.flushLoggedErrors(ValueError)), 1)
        self.engine.vms = None  # type: ignore[assignment]
        self.periods(2)
        self.assertEqual(len(self.flushLoggedErrors(AttributeError)), 2)

    def test_part_of_it(self) -> None:
        """A session is checked again only when both looks are good; without an open console the
        keys are enough."""
        alice = self.login("alice")
        stop = self.open(alice, console("web"))
        self.engine.error = EngineUnreachable("refused")
        self.periods(2)
        self.engine.error = None
        self.engine.silent = {"u-alice"}
        self.periods(2)
        self.assertEqual(len(alice.unchecked), 1)
        stop()
        self.assertEqual(len(alice.unchecked), 1, "nobody said that all is well")
        self.periods()
        self.assertEqual(alice.unchecked[1:], [None])

    def test_stop(self) -> None:
        """A service that stops in the middle of a look leaves nothing behind."""
        self.crowd(10)
        self.engine.consoles_gate = Deferred()
        self.clock.advance(RECHECK)
        for _ in range(5):
            self.clock.advance(RECHECK * 0.1)
        self.permissions.stopService()
        self.assertEqual(self.clock.getDelayedCalls(), [])
        self.engine.asked.clear()
        self.engine.consoles_gate.callback(None)
        self.assertEqual(self.engine.asked, [])
        self.permissions.startService()

    def test_bug(self) -> None:
        """An error of our own is logged, and the next period looks again."""
        alice = self.login("alice")
        self.engine.keys = None  # type: ignore[assignment]
        self.periods(2)
        self.assertEqual(len(self.flushLoggedErrors(TypeError)), 2)
        self.engine.keys = []
        self.periods()
        self.assertEqual(len(alice.revoked), 1)
