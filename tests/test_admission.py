"""Who may connect, and when."""

from __future__ import annotations

from twisted.internet.task import Clock
from twisted.logger import Logger, formatEvent
from twisted.trial.unittest import SynchronousTestCase

from tests.fakes import Events
from vmconsole import refusals
from vmconsole.config import Limits
from vmconsole.refusals import SummedRefusals
from vmconsole.ssh.addresses import source_of
from vmconsole.ssh.admission import Admission
from vmconsole.ssh.sources import BURST, REFILL, Sources

HOME = "192.0.2.7"
AWAY = "198.51.100.1"


class Client:
    """A connection that a test plays; ``told`` is why it was refused or dropped."""

    def __init__(self, admission: Admission, log: list[Client]) -> None:
        self.served = False
        self.told = ""
        self._log = log
        self.entry = admission.accepted(self._evict)

    def place(self, source: str | None) -> Client:
        """Its address is known."""
        self.entry.place(source, self._admit, self._refuse)
        return self

    def _admit(self) -> None:
        self.served = True
        self._log.append(self)

    def _refuse(self, reason: str) -> None:
        self.told = reason

    def _evict(self, reason: str) -> None:
        self.told = reason
        self.entry.left()


class AdmissionTestCase(SynchronousTestCase):
    """Some limits, a clock, and what was said to the ports and the log."""

    limits = Limits()

    def setUp(self) -> None:
        self.clock = Clock()
        self.ports: list[str] = []
        self.events = Events()
        self.patch(Admission, "_log", Logger("admission", observer=self.events))
        self.served: list[Client] = []
        self.drawn: list[int] = []
        self.use(self.limits)

    def use(self, limits: Limits) -> None:
        """Start with these limits."""
        self.admission = Admission(
            self.clock,
            limits,
            self.draw,
            lambda: self.ports.append("pause"),
            lambda: self.ports.append("resume"),
        )

    def draw(self, below: int) -> int:
        """The last of them, always."""
        self.drawn.append(below)
        return below - 1

    def connect(self, source: str | None = HOME) -> Client:
        """One connection."""
        return Client(self.admission, self.served).place(source)

    def storm(self, count: int, source: str | None = HOME) -> list[Client]:
        """Many at once."""
        return [self.connect(source) for _ in range(count)]

    def pass_time(self, seconds: float, step: float = 0.05) -> None:
        """Step by step, so that each timer sees its own time."""
        self.clock.pump([step] * round(seconds / step))

    def logged(self) -> list[str]:
        """The lines since the last look."""
        lines = [formatEvent(event) for event in self.events.seen]
        self.events.seen.clear()
        return lines


class SourceTests(SynchronousTestCase):
    """Who counts as one."""

    def test_source_of(self) -> None:
        """An IPv4 address, an IPv6 /64; mapped ones are IPv4, zones do not count."""
        for address, source in (
            ("192.0.2.7", "192.0.2.7"),
            ("::ffff:192.0.2.7", "192.0.2.7"),
            ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
            ("2001:db8:1:2::9", "2001:db8:1:2::/64"),
            ("fe80::1%eth0", "fe80::/64"),
            ("::1", "::/64"),
            ("unknown", None),
            ("", None),
            ("gateway.example.com", None),
            ("192.0.2.07", None),
        ):
            self.assertEqual(source_of(address), source, address)


class SlowDownTests(AdmissionTestCase):
    """Connections that do not log in slow their source down."""

    def test_burst_then_five_a_second(self) -> None:
        """Ten are served at once, then five a second, in the order in which they came."""
        clients = self.storm(40)
        self.assertEqual(len(self.served), 10)
        self.assertEqual(self.admission.waiting, 30)
        self.pass_time(2)
        self.assertEqual(len(self.served), 20)
        self.assertEqual(self.served, clients[:20])

    def test_scanner(self) -> None:
        """A scanner with three sockets that closes each as soon as it is served gets fewer than
        30 of 38 in a second and a half, and never 20 a second afterwards."""
        tried = 0
        waiting: list[Client] = []
        for _ in range(150):
            for client in list(waiting):
                if client.served:
                    client.entry.left()
                    waiting.remove(client)
            while len(waiting) < 3 and tried < 38:
                waiting.append(self.connect())
                tried += 1
            self.clock.advance(0.01)
        self.assertLess(len(self.served), 20)
        self.assertGreater(len(self.served), 10)
        before = len(self.served)
        for client in waiting:
            client.entry.left()
        self.storm(50)
        self.pass_time(4)
        self.assertLessEqual(len(self.served) - before, 4 * 5 + 1)

    def test_honest_storm(self) -> None:
        """200 that log in go on at full speed, ten at a time: no second passes for them."""
        self.use(Limits(per_address=200, unauthenticated=300))
        self.storm(200)
        most = 0
        logged_in = 0
        while logged_in < len(self.served):
            under_way = self.served[logged_in:]
            most = max(most, len(under_way))
            for client in under_way:
                client.entry.logged_in()
            logged_in += len(under_way)
            for _ in range(20):
                self.clock.advance(0)
        self.assertEqual((logged_in, most, self.clock.seconds()), (200, 10, 0.0))
        self.assertEqual(self.logged(), [])

    def test_login_gives_back_one_token(self) -> None:
        """A login counts for itself alone: it does not make up for those that failed."""
        for _ in range(9):
            self.connect().entry.left()
        honest = self.connect()
        self.assertTrue(honest.served)
        honest.entry.logged_in()
        honest.entry.left()
        self.assertTrue(self.connect().served)
        self.assertFalse(self.connect().served)

    def test_full_bucket(self) -> None:
        """Logins never fill the bucket beyond its brim."""
        for _ in range(30):
            client = self.connect()
            client.entry.logged_in()
        self.storm(20)
        self.assertEqual(len(self.served), 30 + 10)

    def test_long_quiet(self) -> None:
        """However long nothing came, ten are served at once, and no more."""
        self.connect()
        self.clock.advance(1000)
        self.storm(30)
        self.assertEqual(len(self.served), 1 + 10)

    def test_no_overtaking(self) -> None:
        """Who comes as a token is given back is served after those who waited for it."""
        first, *_, waiting = self.storm(11)
        first.entry.logged_in()
        late = self.connect()
        self.clock.advance(0)
        self.assertEqual((waiting.served, late.served), (True, False))

    def test_leaves_while_it_waits(self) -> None:
        """Who goes before being served costs nothing, and holds nobody up."""
        self.storm(10)
        gone, patient = self.connect(), self.connect()
        self.assertEqual(self.admission.waiting, 2)
        gone.entry.left()
        self.assertEqual(self.admission.waiting, 1)
        self.pass_time(0.25)
        self.assertEqual((gone.served, patient.served), (False, True))

    def test_nobody_waits(self) -> None:
        """When the last who waited is gone, no timer is left."""
        self.storm(10)
        waiting = self.connect()
        self.assertEqual(len(self.clock.getDelayedCalls()), 1)
        waiting.entry.left()
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_other_sources(self) -> None:
        """One source's storm does not slow another one down; what has no address is never
        slowed down."""
        self.storm(30)
        self.assertTrue(self.connect(AWAY).served)
        self.assertTrue(all(client.served for client in self.storm(30, None)))

    def test_goes_as_it_is_served(self) -> None:
        """A connection that is lost while it is let in leaves the counts right."""
        entry = self.admission.accepted(lambda reason: None)
        entry.place(HOME, entry.left, lambda reason: None)
        entry.left()
        self.assertEqual((self.admission.total, self.admission.unauthenticated), (0, 0))

    def test_failing_admit(self) -> None:
        """An error while one is let in does not keep those behind it waiting for ever."""
        self.storm(10)

        def broken() -> None:
            raise RuntimeError("broken")

        entry = self.admission.accepted(lambda reason: None)
        entry.place(HOME, broken, lambda reason: None)
        behind = self.connect()
        for _ in range(10):
            try:
                self.clock.advance(0.05)
            except RuntimeError:
                pass
        self.assertTrue(behind.served)

    def test_out_of_turn(self) -> None:
        """What is told of a connection twice, or too late, changes nothing."""
        client = self.connect().place(AWAY)
        self.assertEqual(self.served, [client])
        for _ in range(2):
            client.entry.logged_in()
        client.entry.left()
        client.entry.logged_in()
        client.place(HOME)
        waiting = self.storm(11)[10]
        waiting.entry.logged_in()
        self.assertEqual((self.admission.total, self.admission.unauthenticated), (11, 11))

    def test_counts(self) -> None:
        """What metrics tell: all there are, those without a login, and those that wait."""
        clients = self.storm(12)
        clients[0].entry.logged_in()
        Client(self.admission, self.served)
        admission = self.admission
        self.assertEqual((admission.total, admission.unauthenticated), (13, 12))
        self.assertEqual(admission.waiting, 2)
        for client in clients:
            client.entry.left()
            client.entry.left()
        self.assertEqual((admission.total, admission.unauthenticated), (1, 1))
        self.assertEqual(admission.waiting, 0)


class CapTests(AdmissionTestCase):
    """How many connections there may be."""

    limits = Limits(connections=5, per_address=3)

    def log_in(self, count: int, source: str | None) -> list[Client]:
        """So many users."""
        clients = self.storm(count, source)
        for client in clients:
            client.entry.logged_in()
        return clients

    def test_per_address(self) -> None:
        """Above its limit an address is refused with a sentence, others are not; one that goes
        makes room."""
        clients = self.log_in(3, HOME)
        refused = self.connect()
        self.assertEqual(
            (refused.served, refused.told),
            (False, "too many connections from your address; try again later"),
        )
        self.assertTrue(self.connect(AWAY).served)
        clients[0].entry.left()
        self.assertTrue(self.connect().served)

    def test_total(self) -> None:
        """Above the limit of all, everybody is, whatever has no address, too."""
        clients = self.log_in(3, HOME) + self.log_in(2, AWAY)
        for source in ("203.0.113.1", None):
            self.assertEqual(self.connect(source).told, "too many connections; try again later")
        clients[0].entry.left()
        self.assertTrue(self.connect("203.0.113.1").served)

    def test_gone_before_its_address(self) -> None:
        """Connections that go before their address is known take no room, and make none."""
        for _ in range(3):
            Client(self.admission, self.served).entry.left()
        self.log_in(3, HOME)
        self.log_in(2, AWAY)
        self.assertEqual(self.connect("203.0.113.1").told, "too many connections; try again later")

    def test_refused_are_forgotten(self) -> None:
        """Addresses that were only refused are not remembered for ever."""
        self.log_in(3, HOME)
        self.log_in(2, AWAY)
        for number in range(200):
            self.connect(f"203.0.113.{number}").entry.left()
            self.clock.advance(1)
        self.assertLess(len(self.admission._sources), 5)

    def test_refused_do_not_count(self) -> None:
        """Those who were refused, and are not gone yet, take no room from others."""
        clients = self.log_in(3, HOME) + self.log_in(2, AWAY)
        refused = self.storm(4, "203.0.113.1")
        clients[0].entry.left()
        self.assertTrue(self.connect("203.0.113.1").served)
        for client in refused:
            client.entry.left()
        self.assertEqual(self.connect("203.0.113.2").told, "too many connections; try again later")

    def test_refused_hold_few_places(self) -> None:
        """An eighth of the places at most is held by who was refused and has not gone yet: the
        others are put out at once. So one address that connects without end pauses no port."""
        self.use(Limits(unauthenticated=32, per_address=3))
        self.log_in(3, HOME)
        refused = self.storm(200)
        self.assertEqual({client.told for client in refused}, {refused[0].told})
        self.assertEqual((self.admission.unauthenticated, self.ports), (4, []))
        self.assertTrue(self.connect(AWAY).served)
        refused[0].entry.left()
        self.storm(2)
        self.assertEqual(self.admission.unauthenticated, 5)

    def test_banned_hold_few_places(self) -> None:
        """Nor do those who waited when their address was banned."""
        self.use(Limits(unauthenticated=80, ban_after=1))
        clients = self.storm(int(BURST) + 30)
        clients[0].entry.left()
        self.assertEqual(self.admission.unauthenticated, BURST - 1 + 10)

    def test_logged_once(self) -> None:
        """A thousand refusals are one line, a second one with their number when it is over, and
        then silence."""
        self.log_in(3, HOME)
        for _ in range(1000):
            self.connect().entry.left()
        line = "Refused a connection: 192.0.2.7 has 3 (limits.per_address)"
        self.assertEqual(self.logged(), [line])
        self.assertEqual(len(self.clock.getDelayedCalls()), 1)
        self.pass_time(30)
        self.assertEqual(self.logged(), [f"{line}: 999 more"])
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_summed_up_meanwhile(self) -> None:
        """A storm that goes on is told of every ten seconds."""
        self.log_in(3, HOME)
        for _ in range(60):
            self.connect().entry.left()
            self.clock.advance(0.5)
        self.assertEqual(len(self.logged()), 3)

    def test_many_addresses(self) -> None:
        """Addresses by the thousand do not make lines by the thousand."""
        self.patch(refusals, "_KINDS", 3)
        self.use(Limits(per_address=1))
        for number in range(40):
            self.log_in(1, f"203.0.113.{number}")
            self.connect(f"203.0.113.{number}").entry.left()
        self.assertEqual(len(self.logged()), 4)
        self.pass_time(30)
        self.assertEqual(self.logged(), ["For other reasons: 36 more"])


class RefusalsTests(SynchronousTestCase):
    """The log of what was refused, summed up."""

    def setUp(self) -> None:
        self.clock, self.events = Clock(), Events()
        self.log = SummedRefusals(Logger("refusals", observer=self.events), self.clock)

    def lines(self) -> list[str]:
        """Those there are."""
        return [formatEvent(event) for event in self.events.seen]

    def test_reason_with_a_stop(self) -> None:
        """A sentence loses its full stop for the number behind it."""
        for _ in range(3):
            self.log.tell("No", "It is full.")
        self.clock.advance(10)
        self.assertEqual(self.lines(), ["No: It is full.", "No: It is full: 2 more"])

    def test_each_in_its_time(self) -> None:
        """Ten seconds count for each kind alone."""
        for seconds, kind in ((0, "a"), (1, "a"), (8, "b"), (1, "b")):
            self.clock.advance(seconds)
            self.log.tell("No", kind)
        self.clock.pump([1] * 30)
        self.assertEqual(self.lines(), ["No: a", "No: b", "No: a: 1 more", "No: b: 1 more"])

    def test_many_kinds(self) -> None:
        """A thousand kinds at once are a hundred lines, and one for the rest."""
        for number in range(1000):
            self.log.tell("No", str(number))
        self.assertEqual(len(self.lines()), 101)

    def test_kind_that_is_over(self) -> None:
        """A new kind takes the place of one that was not told of for ten seconds, though another
        one is known for longer."""
        self.patch(refusals, "_KINDS", 2)
        for seconds, kind in ((0, "a"), (1, "b"), (9.5, "a"), (1, "c"), (0, "d")):
            self.clock.advance(seconds)
            self.log.tell("No", kind)
        # The last is the first of those that there is no place for.
        self.assertEqual(self.lines(), [f"No: {kind}" for kind in "abacd"])

    def test_clock_that_was_set_back(self) -> None:
        """It makes nobody wait for a line until it is as late again."""
        self.clock.advance(1000)
        self.log.tell("No", "a")
        self.clock.rightNow = 0.0
        self.log.tell("No", "a")
        self.assertEqual(self.lines(), ["No: a", "No: a"])

    def test_after_a_sum(self) -> None:
        """After a sum the next one is not told sooner than after a line."""
        for seconds in (0, 1, 10):
            self.clock.advance(seconds)
            self.log.tell("No", "a")
        self.assertEqual(self.lines(), ["No: a", "No: a: 1 more"])
        self.clock.pump([1] * 30)
        self.assertEqual(self.lines()[2:], ["No: a: 1 more"])


class PauseTests(AdmissionTestCase):
    """Too many connections without a login."""

    limits = Limits(unauthenticated=32, per_address=1000)

    def test_paused(self) -> None:
        """At the limit the ports pause, once; they resume when some have gone or logged in."""
        clients = [self.connect(f"192.0.2.{number}") for number in range(31)]
        self.assertEqual(self.ports, [])
        clients.append(self.connect(AWAY))
        clients.append(self.connect(AWAY))
        self.assertEqual(self.ports, ["pause"])
        clients[0].entry.logged_in()
        clients[1].entry.left()
        self.assertEqual(self.ports, ["pause"])
        clients[2].entry.logged_in()
        self.assertEqual(self.ports, ["pause", "resume"])
        self.assertEqual(
            self.logged(),
            ["Accepting pauses: 32 connections have not logged in (limits.unauthenticated)"],
        )

    def test_limit_of_one(self) -> None:
        """Also the smallest limit lets one in after the other."""
        self.use(Limits(unauthenticated=1))
        for _ in range(3):
            self.connect().entry.logged_in()
        self.assertEqual(self.ports, ["pause", "resume"] * 3)

    def test_too_many_at_once(self) -> None:
        """Of more than the limit, who were accepted in one turn, all but enough have to go."""
        self.use(Limits(unauthenticated=1))
        first, second = self.connect(), self.connect()
        first.entry.left()
        self.assertEqual(self.ports, ["pause"])
        second.entry.left()
        self.assertEqual(self.ports, ["pause", "resume"])

    def test_all_kinds_count(self) -> None:
        """Those count that wait for a token, that have said nothing of their address yet, and
        that were refused and are not gone."""
        self.use(Limits(unauthenticated=16, per_address=12))
        self.storm(13)
        for _ in range(3):
            self.assertEqual(self.ports, [])
            Client(self.admission, self.served)
        self.assertEqual(self.ports, ["pause"])

    def test_random_early_drop(self) -> None:
        """When connections without a login have held the places for two seconds, one of them, by
        chance, makes room each tenth of a second."""
        idle = [self.connect(f"192.0.2.{number}") for number in range(32)]
        self.pass_time(1.9)
        self.assertEqual([client for client in idle if client.told], [])
        self.pass_time(0.4)
        dropped = [client for client in idle if client.told]
        self.assertEqual(
            {client.told for client in dropped},
            {"too many connections do not log in; try again later"},
        )
        self.assertEqual(dropped, idle[-len(dropped) :])
        self.assertEqual(self.drawn, [32, 31])
        self.assertEqual(self.ports, ["pause", "resume"])

    def test_drop_pace(self) -> None:
        """No more than ten a second are dropped, whoever takes their places, and however often
        the ports were paused before."""
        self.use(Limits(unauthenticated=200))
        for _ in range(5):
            for client in self.storm(200, None):
                client.entry.left()
        for number in range(200):
            self.connect(f"192.0.2.{number}")
        self.pass_time(2.0)
        for _ in range(20):
            before = len(self.drawn)
            self.pass_time(1.0, 0.01)
            self.assertLessEqual(len(self.drawn), before + 10)
            while self.admission.unauthenticated < 200:
                self.connect(AWAY)
        self.assertGreater(len(self.drawn), 150)

    def test_no_drop_of_the_quick(self) -> None:
        """An honest storm that lasts drops nobody, although all places are always taken: not
        even the few who are slow."""
        slow = [self.connect(f"192.0.2.{number}") for number in range(8)]
        quick = [self.connect(f"198.51.100.{number}") for number in range(24)]
        for turn in range(100):
            self.pass_time(0.1)
            for client in quick:
                client.entry.logged_in()
                client.entry.left()
            quick = [self.connect(f"198.51.{turn}.{number}") for number in range(24)]
        self.assertEqual(self.drawn, [])
        self.assertEqual([client.told for client in slow], [""] * 8)

    def test_no_drop_without_need(self) -> None:
        """Connections without a login that leave room for others stay until the grace period
        ends them; and no timer runs for them."""
        clients = [self.connect(f"192.0.2.{number}") for number in range(32)]
        for client in clients[:3]:
            client.entry.left()
        self.pass_time(20)
        self.assertEqual(self.drawn, [])
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_dropped_once(self) -> None:
        """Who is being dropped, and is not gone yet, is not dropped again."""
        told: list[str] = []
        entries = [self.admission.accepted(told.append) for _ in range(32)]
        self.pass_time(6)
        # More cannot be: those that are left are less than three quarters of all.
        self.assertEqual(len(told), 9)
        self.assertEqual(sum(entry.dropped for entry in entries), 9)


class BanTests(AdmissionTestCase):
    """``ban_after``."""

    limits = Limits(ban_after=3, ban_seconds=600)

    def fail(self, count: int, source: str | None = HOME) -> None:
        """So many are served, and go without a login."""
        for _ in range(count):
            client = self.connect(source)
            self.assertTrue(client.served)
            client.entry.left()

    def test_dropped(self) -> None:
        """Who was dropped by chance did not fail."""
        self.use(Limits(ban_after=1, unauthenticated=4))
        clients = [self.connect(f"192.0.2.{number}") for number in range(4)]
        self.pass_time(2.5)
        [dropped, *_] = [client for client in clients if client.told]
        source = f"192.0.2.{clients.index(dropped)}"
        for client in clients:
            client.entry.left()
        self.assertTrue(self.connect(source).served)
        self.assertFalse(self.connect(f"192.0.2.{3 - clients.index(dropped)}").served)

    def test_banned(self) -> None:
        """So many in a row without a login ban their source for a time: it is refused at once,
        and told for how long. Others are not."""
        self.fail(3)
        self.assertEqual(
            self.connect().told,
            "too many connections from your address ended without a login; try again in 10 minutes",
        )
        self.assertTrue(self.connect(AWAY).served)
        self.clock.advance(599)
        self.assertIn("1 second", self.connect().told)
        self.clock.advance(1)
        self.fail(2)
        self.assertTrue(self.connect().served)

    def test_login_between(self) -> None:
        """A login begins the count anew."""
        for _ in range(5):
            self.fail(2)
            client = self.connect()
            client.entry.logged_in()
            client.entry.left()
            self.pass_time(2)
        self.assertEqual(self.connect().told, "")

    def test_not_served(self) -> None:
        """Those that were refused, or went while they waited, do not count; nor do those whose
        login failed by our fault."""
        self.use(Limits(ban_after=1, per_address=12))
        clients = self.storm(12)
        self.connect().entry.left()
        clients[11].entry.left()
        clients[0].entry.left(failed=False)
        self.assertEqual(self.connect().told, "")

    def test_those_who_wait(self) -> None:
        """A ban counts for those as well that wait already; they take room from nobody."""
        self.use(Limits(ban_after=3, connections=12))
        clients = self.storm(12)
        for client in clients[:3]:
            client.entry.left()
        self.assertIn("try again", clients[11].told)
        self.assertEqual(self.admission.waiting, 0)
        self.pass_time(5)
        self.assertFalse(clients[11].served)
        for client in clients[3:]:
            client.entry.left()
        self.assertEqual(self.admission.total, 0)
        others = self.storm(13, None)
        self.assertEqual([client.served for client in others], [True] * 12 + [False])

    def test_slow_tries(self) -> None:
        """The count lasts as long as a ban would, however full the bucket is by then."""
        self.use(Limits(ban_after=3, ban_seconds=100))
        for _ in range(3):
            self.fail(1)
            for number in range(10):
                self.connect(f"203.0.113.{number}").entry.left(failed=False)
            self.clock.advance(90)
        self.assertIn("try again", self.connect().told)

    def test_long_connection(self) -> None:
        """A connection counts that took so long that its bucket was full again."""
        self.use(Limits(ban_after=1))
        client = self.connect()
        self.clock.advance(30)
        client.entry.left()
        self.assertIn("try again", self.connect().told)

    def test_never(self) -> None:
        """Without ban_after there is no ban."""
        self.use(Limits())
        for _ in range(100):
            self.fail(1)
            self.clock.advance(1)

    def test_no_address(self) -> None:
        """What has no address, a unix socket or a balancer's own check, is never banned."""
        self.fail(50, None)

    def test_logged(self) -> None:
        """The ban is a line, and the refusals that follow are one."""
        self.fail(3)
        for _ in range(100):
            self.connect().entry.left()
        self.assertEqual(
            self.logged(),
            [
                "Banned an address: 192.0.2.7, for 10 minutes: 3 connections in a row ended "
                "without a login (limits.ban_after)",
                "Refused a connection: 192.0.2.7 is banned (limits.ban_after)",
            ],
        )


class SlowDownLogTests(AdmissionTestCase):
    """What the log says of those that are slowed down."""

    def test_logged_once(self) -> None:
        """One line for a source that has to wait for long."""
        self.storm(60)
        self.pass_time(9)
        self.assertEqual(
            self.logged(), ["Slowed down an address: 192.0.2.7: its connections do not log in"]
        )

    def test_short_wait(self) -> None:
        """None for a moment's wait."""
        self.storm(14)
        self.pass_time(3)
        self.assertEqual(len(self.served), 14)
        self.assertEqual(self.logged(), [])


class TableTests(SynchronousTestCase):
    """What is remembered of sources, and for how long."""

    def visit(self, sources: Sources, name: str, now: float, tokens: int = 1) -> None:
        """A connection that comes, takes so many tokens, and goes."""
        source = sources.find(name, now)
        source.connections += 1
        for _ in range(tokens):
            source.take(now)
        source.connections -= 1
        sources.left(source, now)

    def test_forgotten(self) -> None:
        """A source is forgotten when its bucket is full again, as others come and go."""
        sources = Sources(0.0)
        for number in range(1000):
            self.visit(sources, f"a{number}", 0.0)
        self.assertEqual(len(sources), 1000)
        for number in range(500):
            self.visit(sources, "b", 1.0 / REFILL + number)
        self.assertEqual(len(sources), 1)

    def test_little_at_a_time(self) -> None:
        """However many are to be forgotten, one connection forgets a few."""
        sources = Sources(0.0)
        for number in range(1000):
            self.visit(sources, f"a{number}", 0.0)
        self.visit(sources, "b", 10.0)
        self.assertEqual(len(sources), 997)

    def test_open_connections(self) -> None:
        """A source with connections is not forgotten."""
        sources = Sources(0.0)
        self.visit(sources, "a", 0.0)
        kept = sources.find("a", 0.1)
        kept.connections += 1
        for number in range(10):
            self.visit(sources, "b", 10.0 * number)
        self.assertIs(sources.find("a", 100.0), kept)

    def test_open_connections_in_a_full_table(self) -> None:
        """Nor is one with connections when there are too many, however many of these there are."""
        sources = Sources(0.0, max_sources=10)
        for number in range(10):
            self.visit(sources, f"a{number}", 0.0)
        for number in range(10):
            sources.find(f"a{number}", 0.0).connections += 1
        sources.find("b", 0.0)
        self.assertEqual(len(sources), 11)

    def test_comes_again(self) -> None:
        """What is not over yet is remembered, however often it is looked at."""
        sources = Sources(0.0)
        self.visit(sources, "a", 0.0)
        self.visit(sources, "a", 0.1, tokens=10)
        self.visit(sources, "b", 0.3)
        again = sources.find("a", 0.3)
        self.assertTrue(again.take(0.3))
        self.assertFalse(again.take(0.3))

    def test_bounded(self) -> None:
        """The table has a limit. The one goes that is nearest to being forgotten: of the worst
        offenders the most is remembered."""
        sources = Sources(600.0, max_sources=100)
        for number in range(50):
            self.visit(sources, f"bad{number}", 0.0)
            sources.find(f"bad{number}", 0.0).banned_until = 500.0
        for number in range(5000):
            self.visit(sources, f"other{number}", 0.0001 * number)
            self.assertLessEqual(len(sources), 100)
        self.assertEqual(sources.find("bad7", 1.0).banned_until, 500.0)

    def test_full_of_offenders(self) -> None:
        """Also when all of them are banned there is room for one more."""
        sources = Sources(600.0, max_sources=100)
        for number in range(300):
            self.visit(sources, f"bad{number}", float(number))
            sources.find(f"bad{number}", float(number)).banned_until = number + 5000.0
        self.assertEqual(len(sources), 100)
        self.assertEqual(sources.find("bad299", 300.0).banned_until, 5299.0)

    def test_clock_set_back(self) -> None:
        """A clock that is set back empties no bucket, and fills none."""
        sources = Sources(0.0)
        source = sources.find("a", 1000.0)
        for _ in range(int(BURST)):
            self.assertTrue(source.take(1000.0))
        self.assertFalse(source.take(0.0))
        self.assertTrue(source.take(0.2))
