"""Plays a crowd: many connections, from few and from many addresses, on one server.

The first step is ``["crowd", LIMITS, SEED]``; SEED decides who is dropped by chance. Then
``["come", N, ADDRESS, BALANCED]``: connection N comes, perhaps through a balancer; ``["login", N,
KEY]``, ``["bad", N]`` (a signature by nobody), ``["rubbish", N]``, ``["cling", N]`` (it stays when
it is told to go), ``["leave", N]``, and ``["sleep", SECONDS]``.
"""

from __future__ import annotations

from collections import Counter, deque
from random import Random
from typing import Any

from twisted.internet.error import ConnectionDone
from twisted.python.failure import Failure
from twisted.test import iosim

from tests.fuzz.balancer import v2
from tests.fuzz.channels import Wrong
from tests.fuzz.crowd_rules import PIECE, Rules, Visitor
from tests.fuzz.grammar import HELLO, Grammar
from tests.fuzz.keyring import Reader, ring_at
from tests.fuzz.ledger import Ledger
from tests.fuzz.peer import Client
from tests.fuzz.play import Finding, judged
from tests.fuzz.sealed import SUITES
from tests.fuzz.steps import Maker, Program, Step
from tests.fuzz.world import World
from tests.sshpair import ALICE
from vmconsole.config import Limits

BACKLOG = 20
_ROUNDS = 5000
# A handshake, and a login.
_PACKETS = 6
_AFTERMATH = 12.0
_CLING = 6.0
_DISCONNECT, _KEXINIT = 1, 20
_BALANCER = "192.0.2.9"


class Connection:
    """A visitor's two ends. Until it ``talks``, what it has to say stays on its way."""

    def __init__(self, world: World, visitor: Visitor, balanced: bool) -> None:
        address = _BALANCER if balanced else visitor.address
        self.server, self._receiver, self.end = world.accept(address, balanced)
        if balanced:
            self._receiver.dataReceived(v2(visitor.address))
        shown = visitor.address or "0.0.0.0"
        self._maker = Maker(world.ring, ALICE.name.encode(), world.time_of_day)
        self.ledger = self.make_ledger(world, shown)
        self._client: Client | None = None
        self.wants: list[Any] | None = None
        """The login that it will send."""
        self.good = self.rubbish = self.clings = False

    def make_ledger(self, world: World, address: str) -> Ledger:
        """The account of it."""
        return Ledger(ring_at(world.ring, address), world.users, 1)

    def first_word(self) -> tuple[int, str]:
        """What the server said first to one that does not talk: the message's number, and the
        words of a DISCONNECT; 0: nothing."""
        data = b"".join(self.end.stream)
        _, line, packet = data.partition(b"\r\n")
        if not line:
            return 0, ""
        number = packet[5] if len(packet) > 5 else 0
        if number != _DISCONNECT:
            return number, ""
        reader = Reader(packet[6:])
        reader.uint32()
        return number, reader.string().decode()

    def last_word(self) -> str:
        """The words of the DISCONNECT, if there was one."""
        if self._client is not None:
            self._hear()
            return self.ledger.words
        data = b"".join(self.end.stream).partition(b"\r\n")[2]
        while len(data) > 5:
            size = int.from_bytes(data[:4], "big")
            if data[5] == _DISCONNECT:
                return Reader(data[10:]).string().decode()
            data = data[4 + size :]
        return ""

    def talk(self) -> None:
        """It goes on with its handshake."""
        if self._client is None:
            self._client = Client(self.ledger, self._maker, HELLO, [], SUITES[-1])
            self._wire = iosim.FakeTransport(self._client, False)
            self._client.makeConnection(self._wire)

    def say_rubbish(self) -> None:
        """It says what is no ssh, and nothing else from then on."""
        self.rubbish = True
        self.ledger.tamper()
        if not self.end.disconnecting:
            self._receiver.dataReceived(b"\0" * 64 + b"\r\n" + b"SSH-9\r\n" * 3)

    def move(self) -> bool:
        """What is on its way arrives, on both sides. Whether there was something."""
        client = self._client
        if client is None:
            return False
        moved = False
        if self._wire.stream and self.end.reading and not self.rubbish:
            if not self.end.disconnecting:
                moved = True
                self._receiver.dataReceived(self._wire.getOutBuffer())
        moved = self._hear() or moved
        if self.wants is not None and self.ledger.secure and not client.exchanging:
            moved = True
            fields, self.wants = self.wants, None
            self._maker.session = self.ledger.session
            client.put(self._maker.payload(fields, ()))
        return moved

    def _hear(self) -> bool:
        data = self.end.drain()
        if data and self._client is not None:
            self._client.dataReceived(data)
        return bool(data)

    def lose(self) -> None:
        """The connection is gone."""
        self.end.disconnecting = True
        self._receiver.connectionLost(Failure(ConnectionDone()))


class CrowdPlay:
    """One program. ``endings`` counts what becomes of connections."""

    def __init__(self, world: World, endings: Counter[str]) -> None:
        self._world, self._endings = world, endings
        self._clock = world.clock
        self._backlog: deque[tuple[Visitor, bool]] = deque()
        self._numbers: set[int] = set()
        self.packets = 0
        self.servers: list[Any] = []

    def run(self, program: Program) -> Finding | None:
        """Play it to its end, when all leave. The finding, if there is one."""
        _, limits, seed = program[0]
        self._rules = Rules(Limits(**limits), self._now)
        self._admission = self._world.admit(
            self._rules.limits,
            Random(seed).randrange,
            lambda: self._rules.pause(True, self._now),
            lambda: self._rules.pause(False, self._now),
        )

        def play(logged: list[str]) -> None:
            for step in program[1:]:
                self._step(step)
                if logged:
                    break
            self._finish()
            self._world.reset_admission()

        return judged(play)

    @property
    def _now(self) -> float:
        return float(self._clock.seconds())

    # --- steps

    def _step(self, step: Step) -> None:
        self.packets += 1
        kind, *values = step
        if kind == "come":
            self._come(*values)
        elif kind == "sleep":
            self._sleep(*values)
        else:
            visitor = self._rules.visitors.get(values[0])
            if visitor is not None and visitor.state != "backlog":
                getattr(self, f"_do_{kind}")(visitor, *values[1:])
        self._settle()

    def _come(self, number: int, address: str, balanced: int) -> None:
        if number in self._numbers or len(self._backlog) >= BACKLOG:
            # The kernel drops it.
            return
        self._numbers.add(number)
        visitor = Visitor(number, address, self._now)
        visitor.ahead = len(self._backlog)
        self._rules.visitors[number] = visitor
        self._backlog.append((visitor, bool(balanced and address)))

    def _do_login(self, visitor: Visitor, key: str) -> None:
        play = visitor.play
        if visitor.state == "in" or play.rubbish:
            return
        self.packets += _PACKETS
        play.talk()
        play.wants = Grammar(Random(0)).login(key)[1]
        play.good = key == "alice"

    def _do_bad(self, visitor: Visitor) -> None:
        self._do_login(visitor, "stranger")

    def _do_rubbish(self, visitor: Visitor) -> None:
        visitor.play.say_rubbish()

    def _do_cling(self, visitor: Visitor) -> None:
        visitor.play.clings = True

    def _do_leave(self, visitor: Visitor) -> None:
        self._endings[f"{visitor.state}, leaves"] += 1
        self._lose(visitor)

    def _sleep(self, seconds: float) -> None:
        while seconds > 0:
            waits = self._rules.paused or any(
                account.waiting for account in self._rules.accounts.values()
            )
            piece = min(seconds, PIECE if waits else 0.5)
            seconds -= piece
            self._clock.advance(piece)
            self._settle()

    # --- what comes of it

    def _settle(self) -> None:
        for _ in range(_ROUNDS):
            moved = self._accept()
            for visitor in list(self._rules.visitors.values()):
                if visitor.play is not None:
                    # What was said first is gone once it has moved.
                    self._observe(visitor)
                    moved = visitor.play.move() or moved
                    self._observe(visitor)
            calls = self._clock.getDelayedCalls()
            if not moved and min((call.getTime() for call in calls), default=1e9) > self._now:
                break
            self._clock.advance(0)
        else:
            raise Wrong("endless", "the crowd and the server go on without an end")
        self._rules.look(self._now)
        self._look_at_counts()
        for visitor in self._rules.visitors.values():
            if visitor.state == "served" and visitor.play.good and not visitor.play.rubbish:
                raise Wrong("honest", f"{visitor.address} cannot log in")

    def _accept(self) -> bool:
        if self._rules.paused or not self._backlog:
            return False
        visitor, balanced = self._backlog.popleft()
        visitor.came = self._now
        visitor.play = Connection(self._world, visitor, balanced)
        self.servers.append(visitor.play.server)
        self._observe(visitor)
        if visitor.state == "backlog":
            self._rules.waits(visitor, self._now)
        return True

    def _observe(self, visitor: Visitor) -> None:
        play, rules, now = visitor.play, self._rules, self._now
        if visitor.state == "gone":
            return
        if visitor.state in ("backlog", "waiting"):
            number, words = play.first_word()
            if number == _KEXINIT:
                rules.served(visitor, now)
            elif number == _DISCONNECT:
                rules.refused(visitor, words, now)
        if visitor.state == "served" and play.ledger.logged_in:
            rules.logged_in(visitor, now)
        if play.end.disconnecting:
            self._put_out(visitor)

    def _put_out(self, visitor: Visitor) -> None:
        play, rules = visitor.play, self._rules
        if play.clings and visitor.state not in ("waiting", "gone") and not play.end.aborted:
            return
        reason = play.last_word()
        if visitor.state != "refused" and not (visitor.state == "in" and play.rubbish):
            rules.put_out(visitor, reason, self._now)
        self._endings[f"{visitor.state}, ends: {reason[:40]}"] += 1
        self._lose(visitor)

    def _lose(self, visitor: Visitor) -> None:
        self._rules.left(visitor, self._now)
        visitor.play.lose()

    def _look_at_counts(self) -> None:
        rules, admission = self._rules, self._admission
        waiting = sum(each.state == "waiting" for each in rules.visitors.values())
        there = sum(each.play is not None for each in rules.visitors.values())
        counts = (admission.total, admission.unauthenticated, admission.waiting)
        if counts != (there, rules.strangers, waiting):
            raise Wrong("counts", f"{counts}, and there are {(there, rules.strangers, waiting)}")

    def _finish(self) -> None:
        self._sleep(_CLING)
        for visitor in list(self._rules.visitors.values()):
            if visitor.play is not None:
                self._endings[f"{visitor.state}, leaves"] += 1
                self._lose(visitor)
        self._backlog.clear()
        self._rules.visitors.clear()
        self._clock.advance(0)
        self._rules.look(self._now)
        self._look_at_counts()
        if self._rules.paused or self._world.factory.session_counts.total:
            raise Wrong("counts", "all have left, and the server counts on them")
        self._clock.advance(_AFTERMATH)
        left = self._world.timers()
        if left:
            raise Wrong("timers", f"of a crowd that is gone: {left[0]}")
        self._world.forget()
