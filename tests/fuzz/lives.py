"""Plays logins that come to their end while they are there, and sessions that are counted.

The first step is ``["lives", LIMITS]``. Then ``["come", N, KEY, HOW]``: login N, by a key, or by a
certificate for it (see ``authority.py``; null: none); ``["open", N, WHAT]``: a session with nothing
in it, a ``bare`` terminal, a ``console`` on one, a ``pipe`` without one, or a command that ends by
itself (``list``); ``["type", N, S]`` into the Sth of its sessions; ``["shut", N, S]``: that ends;
``["leave", N]``. ``["revoke", WHAT, VALUE]``, ``["pardon"]``, ``["trust", NAMES]`` write the
operator's files, ``["spoil", FILE]`` makes a mistake in one; ``["engine", NAME, THERE]`` takes a
key, or a user without one, out of the engine, or puts it back. ``["sleep", SECONDS]`` and
``["set", SECONDS]``: time passes, or the time of day is set.
"""

from __future__ import annotations

import struct
from base64 import b64encode
from collections import Counter
from collections.abc import Callable
from itertools import product
from random import Random
from typing import Any

from twisted.conch.ssh.common import NS

from tests.fuzz.authority import authorities, public_line
from tests.fuzz.certify import Judged, Truth, judge_certificate
from tests.fuzz.channels import Wrong
from tests.fuzz.crowd import Connection
from tests.fuzz.crowd_rules import Visitor
from tests.fuzz.grammar import Grammar
from tests.fuzz.keyring import Known as Key
from tests.fuzz.keyring import ring_at
from tests.fuzz.lives_rules import (
    ENGINE_SECONDS,
    FILES_SECONDS,
    PIECE,
    History,
    Known,
    Life,
    Login,
    Session,
    TellingLedger,
    merged,
)
from tests.fuzz.play import Finding, judged
from tests.fuzz.steps import Program
from tests.fuzz.world import USERS, World
from vmconsole.config import Limits
from vmconsole.interfaces import User

_ROUNDS = 5000
# A handshake, and a login.
_PACKETS = 6
_MOST_LIVES = 12
_AFTERMATH = 12.0
_NAMED = {name for name, user_id in USERS.items() if user_id}
_CLOSE = b"\x61"
_PTY = NS(b"xterm") + struct.pack(">4L", 80, 24, 0, 0) + NS(b"")


class Client(Connection):
    """One that logs in, and sends what it is told to."""

    ledger: TellingLedger

    def __init__(
        self,
        world: World,
        visitor: Visitor,
        ring: dict[str, Key],
        judge: Callable[[bytes], Judged],
    ) -> None:
        """``ring`` is as it counts now, and ``judge`` judges a certificate."""
        self._ring, self._judge = ring, judge
        super().__init__(world, visitor, False)

    def make_ledger(self, world: World, address: str) -> TellingLedger:
        """See Connection."""
        sessions = world.config.limits.sessions_per_connection
        ring = ring_at(self._ring, address)
        return TellingLedger(ring, world.users, sessions, self._judge)

    def put(self, payload: bytes) -> None:
        """Send this."""
        assert self._client is not None
        self._client.put(payload)

    def answer_closes(self) -> bool:
        """Close what the server has closed. Whether there was something."""
        if self.end.disconnecting or self._client is None or self._client.exchanging:
            return False
        numbers = self.ledger.channels.to_close()
        for number in numbers:
            self.put(_CLOSE + struct.pack(">L", number))
        return bool(numbers)


class LivesPlay:
    """One program. ``endings`` counts what becomes of logins and sessions."""

    def __init__(self, world: World, endings: Counter[str]) -> None:
        self._world, self._endings = world, endings
        self._clock = world.clock
        self._clients: dict[int, Client] = {}
        self._lives: dict[int, Life] = {}
        self._keys = [*world.engine.keys]
        self._count = 0
        self.packets = 0
        self.servers: list[Any] = []

    def run(self, program: Program) -> Finding | None:
        """Play it to its end, when all leave. The finding, if there is one."""
        world = self._world
        self._limits = Limits(**program[0][1])
        self._most_here = world.config.limits.sessions_per_connection
        world.admit(self._limits, lambda below: 0, lambda: None, lambda: None)
        known = Known(
            frozenset(each.blob for name, each in world.ring.items() if name != "stranger"),
            frozenset(_NAMED),
        )
        self._trusted = History(world.truth.trusted, FILES_SECONDS)
        self._revoked = History(world.truth, FILES_SECONDS)
        self._engine = History(known, ENGINE_SECONDS)

        def play(logged: list[str]) -> None:
            for service in (world.trust, world.permissions):
                service.startService()
            for step in program[1:]:
                self.packets += 1
                kind, *values = step
                getattr(self, f"_do_{kind}")(*values)
                self._settle()
                if logged:
                    break
            self._finish()

        return judged(play)

    @property
    def _now(self) -> float:
        return float(self._clock.seconds())

    # --- who comes and goes

    def _do_come(self, number: int, key: str, how: dict[str, Any] | None) -> None:
        if number in self._clients or len(self._lives) >= _MOST_LIVES:
            return
        known = self._world.ring[key]
        login = Login(known.user, known.blob, None)
        states = [bool(login.revoked(each)) for each in self._trust()]
        states += [bool(login.unknown(each)) for each in self._engine.may_be(self._now)]
        if how is None and any(states) and not all(states):
            # A plain key is judged as it is in the ring.
            return
        self.packets += _PACKETS
        address = self._world.new_address()
        ring = self._world.ring
        if how is None and any(states):
            ring = {**ring, key: known._replace(welcome=False)}
        visitor = Visitor(number, address, self._now)
        client = Client(self._world, visitor, ring, lambda blob: self._judge(blob, address))
        self._clients[number] = client
        self.servers.append(client.server)
        client.talk()
        grammar = Grammar(Random(0))
        step = grammar.login(key) if how is None else grammar.login_by(key, how)
        client.wants = step[1]
        self._settle()
        if not client.ledger.logged_in:
            self._endings["a login is refused"] += 1
            del self._clients[number]
            client.lose()
            return
        self._endings["a login"] += 1
        request = client.ledger.logins[-1]
        assert request.key is not None
        login = Login(request.user, request.key.blob, request.certificate)
        self._lives[number] = Life(login, client.ledger)

    def _judge(self, blob: bytes, address: str) -> Judged:
        now, seconds = self._now, self._world.time_of_day()
        return merged(
            [
                judge_certificate(blob, truth, dict.fromkeys(known.users, "u"), seconds, address)
                for truth, known in product(self._trust(), self._engine.may_be(now))
            ]
        )

    def _do_leave(self, number: int) -> None:
        if number in self._lives:
            self._endings["a user leaves"] += 1
            self._lose(number)

    def _lose(self, number: int) -> None:
        del self._lives[number]
        self._clients.pop(number).lose()

    # --- sessions

    def _do_open(self, number: int, what: str) -> None:
        life = self._lives.get(number)
        if life is None:
            return
        client = self._clients[number]
        here = len(client.ledger.channels.known)
        count = sum(
            len(each.ledger.channels.known)
            for each in self._lives.values()
            if each.login.user == life.login.user
        )
        most = self._limits.sessions_per_user
        allowed = here < self._most_here and not 0 < most <= count
        self._count += 1
        client.put(b"\x5a" + NS(b"session") + struct.pack(">3L", self._count, 1 << 24, 32768))
        self._settle()
        if number not in self._lives:
            return
        known = client.ledger.channels.known
        server = next((at for at, each in known.items() if each.client_number == self._count), None)
        if (server is not None) != allowed:
            become = "refused" if allowed else "opened"
            raise Wrong("counts", f"{count} sessions, of {most}: one more is {become}")
        self._endings["a session" if allowed else "a session is refused"] += 1
        if server is not None:
            session = life.sessions[self._count] = Session(self._count)
            # A session in which nothing runs is ended with a status, too.
            known[server].may_run = True
            self._prepare(client, session, server, what)

    def _prepare(self, client: Client, session: Session, server: int, what: str) -> None:
        head = b"\x62" + struct.pack(">L", server)
        if what in ("bare", "console") and client.ledger.channels.terminals:
            session.terminal, session.typed = True, self._now
            client.put(head + NS(b"pty-req") + b"\1" + _PTY)
        if what in ("console", "pipe", "list"):
            # Without a terminal there is no console.
            session.brief = what == "list" or not session.terminal
            line = b"list" if what == "list" else b"vm1"
            client.put(head + NS(b"exec") + b"\1" + NS(line))

    def _session(self, number: int, at: int) -> tuple[Client, Session, int] | None:
        life = self._lives.get(number)
        if life is None or not life.sessions:
            return None
        session = list(life.sessions.values())[at % len(life.sessions)]
        for server, channel in life.ledger.channels.known.items():
            if channel.client_number == session.number:
                return self._clients[number], session, server
        return None

    def _do_type(self, number: int, at: int) -> None:
        found = self._session(number, at)
        if found is not None:
            client, session, server = found
            session.typed, session.warned = self._now, None
            client.ledger.told.pop(session.number, None)
            client.put(b"\x5e" + struct.pack(">L", server) + NS(b"x"))

    def _do_shut(self, number: int, at: int) -> None:
        found = self._session(number, at)
        if found is not None:
            client, session, server = found
            del self._lives[number].sessions[session.number]
            client.put(_CLOSE + struct.pack(">L", server))

    # --- what is true

    def _do_revoke(self, what: str, value: Any) -> None:
        truth = self._revoked.value
        if what == "serial":
            truth = truth._replace(serials=truth.serials | {(value, value)})
        elif what == "id":
            truth = truth._replace(ids=truth.ids | {bytes.fromhex(value)})
        else:
            known = (self._world.ring if what == "key" else authorities())[value]
            truth = truth._replace(keys=truth.keys | {known.blob})
        self._write_list(truth)

    def _do_pardon(self) -> None:
        self._write_list(self._world.truth)

    def _trust(self) -> list[Truth]:
        now = self._now
        both = product(self._trusted.may_be(now), self._revoked.may_be(now))
        return [revoked._replace(trusted=trusted) for trusted, revoked in both]

    def _write_list(self, truth: Truth) -> None:
        lines = [_line(blob) for blob in sorted(truth.keys)]
        lines += [f"id: {each.decode()}" for each in sorted(truth.ids)]
        lines += [f"serial: {first}-{last}" for first, last in sorted(truth.serials)]
        self._world.write("revoked_keys", "\n".join(lines))
        self._revoked.change(truth, self._now)

    def _do_trust(self, names: list[str]) -> None:
        self._world.write("user_ca", "".join(map(public_line, names)))
        trusted = frozenset(authorities()[name].blob for name in names)
        self._trusted.change(trusted, self._now)

    def _do_spoil(self, name: str) -> None:
        self._world.write(name, "ssh-ed25519 AAAA\n")
        (self._trusted if name == "user_ca" else self._revoked).hide(self._now)

    def _do_engine(self, name: str, there: int) -> None:
        engine, ring = self._world.engine, self._world.ring
        blob = ring[name].blob if name in ring else b""
        gone = [each for each in engine.keys if not _is(each, name, blob)]
        back = [each for each in self._keys if _is(each, name, blob)]
        engine.keys = [*gone, *(back if there else [])]
        keys = frozenset(each.blob for each in engine.keys if not isinstance(each, User))
        users = {each.name if isinstance(each, User) else each.user_name for each in engine.keys}
        self._engine.change(Known(keys, frozenset(users & _NAMED)), self._now)

    def _do_set(self, seconds: float) -> None:
        self._world.ahead += seconds
        for life in self._lives.values():
            life.clock_set = True

    def _do_sleep(self, seconds: float) -> None:
        while seconds > 0:
            piece = min(seconds, PIECE)
            seconds -= piece
            self._clock.advance(piece)
            self._settle()

    # --- what comes of it

    def _settle(self) -> None:
        for _ in range(_ROUNDS):
            moved = False
            for client in list(self._clients.values()):
                moved = client.move() or moved
                moved = client.answer_closes() or moved
            calls = self._clock.getDelayedCalls()
            if not moved and min((call.getTime() for call in calls), default=1e9) > self._now:
                break
            self._clock.advance(0)
        else:
            raise Wrong("endless", "the users and the server go on without an end")
        for number in list(self._lives):
            self._look(number)

    def _look(self, number: int) -> None:
        life, client, now = self._lives[number], self._clients[number], self._now
        if client.end.late:
            raise Wrong("after-disconnect", "the server wrote after it had closed")
        over = bool(client.end.disconnecting)
        trust, engine = self._trust(), self._engine.may_be(now)
        life.look(over, now, self._world.time_of_day(), trust, engine)
        if over:
            self._endings[f"ended: {life.ledger.words[:40]}"] += 1
            self._lose(number)
            return
        life.ledger.settle()
        for session in life.ended_sessions():
            self._endings["a session ends"] += 1
            session.ended(life.ledger.told.pop(session.number, b""), now, self._limits.idle)
        for session in life.sessions.values():
            session.look(life.ledger.told.get(session.number, b""), now, self._limits.idle)

    def _finish(self) -> None:
        self._do_sleep(1.0)
        world = self._world
        for number in list(self._lives):
            self._do_leave(number)
        if world.factory.session_counts.total:
            raise Wrong("counts", "all have left, and their sessions are counted")
        world.restore()
        self._clock.advance(_AFTERMATH)
        left = world.timers()
        if left:
            raise Wrong("timers", f"of logins that are gone: {left[0]}")
        world.forget()


def _line(blob: bytes) -> str:
    size = int.from_bytes(blob[:4], "big")
    return f"{blob[4 : 4 + size].decode()} {b64encode(blob).decode()}"


def _is(entry: Any, name: str, blob: bytes) -> bool:
    return entry.name == name if isinstance(entry, User) else entry.blob == blob
