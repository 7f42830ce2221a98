"""Plays a program against the server, and looks after each step whether all is well."""

from __future__ import annotations

import re
import struct
import traceback
from collections import Counter
from collections.abc import Callable
from ipaddress import ip_address
from typing import Any, NamedTuple

from twisted.conch.ssh.common import NS
from twisted.internet.error import ConnectionDone
from twisted.python.failure import Failure
from twisted.test import iosim

from tests.fuzz.balancer import present
from tests.fuzz.certify import Judged
from tests.fuzz.channels import Wrong
from tests.fuzz.edits import edit
from tests.fuzz.keyring import ring_at
from tests.fuzz.ledger import Ledger
from tests.fuzz.logins import Request
from tests.fuzz.peer import Client, Runaway
from tests.fuzz.sealed import SUITES
from tests.fuzz.steps import Maker, NoChannel, Program, Step
from tests.fuzz.world import World, watched_log, weigh
from tests.sshpair import ALICE

# What one connection may hold, its output in the kernel's place with it: eight sessions with a
# window of input, and with their share of a console's scrollback and backlog.
MOST_HELD = 6 << 20
# Before the login: a packet that is not whole yet, and what one read brings.
MOST_HELD_BEFORE_LOGIN = 192 << 10
# So often something has to be repeated for its growth to be told.
_MANY = 400
# Messages of key exchanges.
_EXCHANGE = {bytes((number,)) for number in range(20, 50)}
_KIND = 60
_CLOSE = b"\x61"
_ROUNDS = 5000
# Seconds until nothing that was begun for a connection is to be left.
_AFTERMATH = 10.0
_PIECE = 5.0
_AFTER_THE_END = b"\x5a" + NS(b"session") + struct.pack(">3L", 99, 65536, 32768)


class Finding(NamedTuple):
    """What is wrong: the rule that was broken, and how."""

    oracle: str
    what: str

    @property
    def kind(self) -> str:
        """The same for findings that likely have one cause."""
        last = self.what.strip().rsplit("\n", 1)[-1]
        return f"{self.oracle} {re.sub('0x[0-9a-f]+|[0-9]+', '', last)[:_KIND]}"


def judged(play: Callable[[list[str]], None]) -> Finding | None:
    """The finding, if there is one. ``play`` is given the errors in the log, as they come."""
    logged: list[str] = []
    with watched_log(logged):
        try:
            play(logged)
        except Wrong as wrong:
            return Finding(wrong.oracle, str(wrong))
        except Runaway as runaway:
            return Finding("runaway", str(runaway))
        except Exception:
            return Finding("escaped", traceback.format_exc())
    return Finding("log", logged[0]) if logged else None


class Play:
    """One program on one connection. ``endings`` counts how connections end."""

    def __init__(self, world: World, endings: Counter[str]) -> None:
        self._world, self._endings = world, endings
        self._maker = Maker(world.ring, ALICE.name.encode(), world.time_of_day)
        self._maker.host_keys = world.factory.host_keys.blobs
        self.packets = 0
        self.servers: list[Any] = []
        """The ConsoleTransport, when there is a connection."""
        self._client_left = False
        self._guests_before = len(world.guests.opened)
        self._over = False

    def run(self, program: Program) -> Finding | None:
        """Play it to its end, or to the server's. The finding, if there is one."""

        def play(logged: list[str]) -> None:
            self._start(program)
            for step in program[1:]:
                if self._over or logged:
                    break
                self._step(step)
            self._finish()

        return judged(play)

    def _start(self, program: Program) -> None:
        first = program[0]
        balancer = first[1:4] if first[0] == "proxied" else None
        kind, version, tampers, suite = [*(first[4] if balancer else first), [], SUITES[-1]][:4]
        world = self._world
        self._address = world.new_address()
        self.server, self._receiver, self._end = world.accept(self._address, bool(balancer))
        self.servers.append(self.server)
        last = self._present(*balancer) if balancer else b""
        sessions = world.config.limits.sessions_per_connection
        ring = ring_at(world.ring, self._address)
        self.ledger = Ledger(ring, world.users, sessions, self._certified)
        line = bytes.fromhex(version)
        tidy = line.startswith(b"SSH-2.0-") and line.isascii() and len(line) < 200
        self.client = Client(self.ledger, self._maker, line, tampers, suite)
        if self._over:
            return
        self._client_end = iosim.FakeTransport(self.client, False)
        if not tidy:
            self.ledger.tamper()
        self.packets += 1
        self.client.makeConnection(self._client_end)
        if kind == "stranger":
            self.ledger.tamper()
            self.client.cooperative, self.client.stranger = False, True
            self._client_end.stream = [line]
        self._client_end.stream.insert(0, last)
        self._deliver()

    def _certified(self, blob: bytes) -> Judged:
        return self._world.judge_certificate(blob, self._address)

    def _present(self, header: str, cuts: list[int], hold: int) -> bytes:
        self.packets += 1
        data = bytes.fromhex(header)
        judged, last = present(self._receiver, self._end, data, cuts, self._world.clock, bool(hold))
        self._over = self._end.disconnecting
        self._endings[f"a header that is {judged.verdict.name.lower()}"] += 1
        if not self._over:
            self._address = judged.address or self._address
        return last

    # --- steps

    def _step(self, step: Step) -> None:
        kind, *values = step
        if kind == "repeat":
            self._repeat(*values)
            return
        try:
            getattr(self, f"_do_{kind}")(*values)
        except NoChannel:
            return
        if not self._over and not (kind == "send" and values[-1]):
            self._deliver()

    def _repeat(self, count: int, steps: list[Step]) -> None:
        held = 0
        for turn in range(count):
            if turn == count // 2:
                held = weigh(self.server, self._world.shared).objects
            for each in steps:
                if self._over:
                    return
                self._step(each)
        more = weigh(self.server, self._world.shared).objects - held
        # Bytes may wait, within bounds; a thing more for each time that something is said may not.
        if count >= _MANY and more > count // 4:
            raise Wrong("growth", f"{more} more objects after {count // 2} more repetitions")

    def _do_send(self, fields: list[Any], edits: list[Any], later: int) -> None:
        payload = self._maker.payload(fields, self.ledger.channels.numbers())
        payload = edit(payload, edits)
        self.packets += 1
        self._client_left = self._client_left or payload[:1] == b"\1"
        self._heed(payload)
        self.client.put(payload)

    def _heed(self, payload: bytes) -> None:
        # After a packet of a key exchange that is not the client's own, the keys may differ.
        if payload[:1] in _EXCHANGE:
            self.ledger.tamper()
            self.client.blind, self.client.cooperative = True, False

    def _do_wire(self, fields: list[Any], edits: list[Any]) -> None:
        payload = self._maker.payload(fields, self.ledger.channels.numbers())
        self.packets += 1
        self.ledger.tamper()
        self.client.blind = True
        self.client.damage(payload, edits)

    def _do_raw(self, data: str) -> None:
        self._write_raw(bytes.fromhex(data))

    def _do_plain(self, length: int, padding: int, data: str) -> None:
        head = (length & 0xFFFFFFFF).to_bytes(4, "big") + bytes((padding & 0xFF,))
        self._write_raw(head + bytes.fromhex(data))

    def _write_raw(self, data: bytes) -> None:
        self.packets += 1
        self.ledger.tamper()
        # It may be a DISCONNECT, by its sixth byte.
        self._client_left = self._client_left or data[5:6] == b"\1"
        # In the clear the answers can still be read.
        self.client.blind = self.client.blind or self.ledger.secure
        self._client_end.stream.append(data)

    def _do_rekey(self) -> None:
        self.packets += 1
        if self.client.cooperative and not self.client.exchanging:
            self.client.sendKexInit()

    def _do_deaf(self, deaf: int) -> None:
        self._end.fill(bool(deaf))

    def _do_lazy(self, lazy: int) -> None:
        self.client.lazy = bool(lazy)

    def _do_sleep(self, seconds: float) -> None:
        # In pieces, so that a client can answer keepalives.
        while seconds > 0 and not self._over:
            piece = min(seconds, _PIECE)
            seconds -= piece
            self._world.clock.advance(piece)
            self._deliver()

    def _do_guest(self, data: str) -> None:
        for guest in self._world.guests.opened[-1:]:
            if guest.open:
                guest.print(bytes.fromhex(data))

    def _do_gone(self) -> None:
        for guest in self._world.guests.opened[-1:]:
            guest.end(Failure(ConnectionDone()))

    # --- both ends' turns

    def _deliver(self) -> None:
        for _ in range(_ROUNDS):
            moved = self._to_server()
            self._world.clock.advance(0)
            moved = self._to_client() or moved
            moved = moved or self._answer_closes()
            if not moved:
                break
        else:
            raise Wrong("endless", "both sides go on without an end")
        self._look()

    def _answer_closes(self) -> bool:
        if (
            self.client.lazy
            or self.client.blind
            or self._end.disconnecting
            or self.client.exchanging
        ):
            return False
        numbers = self.ledger.channels.to_close()
        for number in numbers:
            self.client.put(_CLOSE + number.to_bytes(4, "big"))
        return bool(numbers)

    def _to_server(self) -> bool:
        if not self._end.reading or not self._client_end.stream:
            return False
        data = self._client_end.getOutBuffer()
        if data:
            self._receiver.dataReceived(data)
        return bool(data)

    def _to_client(self) -> bool:
        resumed = self._end.paused and not self._end.deaf
        data = self._end.drain()
        if data and not self.client.blind:
            self.client.dataReceived(data)
        return bool(data) or resumed

    def _look(self) -> None:
        if self._end.runaway:
            raise Runaway(self._end.runaway)
        if self._end.late:
            raise Wrong("after-disconnect", "the server wrote after it had closed")
        if self._end.disconnecting:
            self._over = True
            self._look_at_the_end()
            return
        if not (self.client.blind or self._end.deaf or self.client.exchanging):
            if self.ledger.reason is not None:
                raise Wrong("disconnect", "DISCONNECT, and the connection goes on")
            if self._end.reading and self.ledger.secure:
                self.ledger.settle()
        opened = len(self._world.guests.opened) > self._guests_before
        if opened and not self.ledger.logged_in:
            raise Wrong("login", "a console was opened before the login")
        self._look_at_login(opened)

    def _look_at_login(self, opened: bool) -> None:
        logins = self.ledger.logins if self.ledger.logged_in else []
        for event in self._world.events.named("login_accepted"):
            if logins and event["user"] not in [each.user for each in logins]:
                raise Wrong("user", f"{event['user']}, and it is {logins[0].user}")
        if opened and logins and not self.ledger.channels.terminals:
            raise Wrong("forced", "a console without a terminal")
        if opened and logins and all(_lists(each) for each in logins):
            raise Wrong("forced", "a console, by a certificate whose command is list")

    def _look_at_the_end(self) -> None:
        told = self.ledger.reason is not None or self._client_left or self.client.stranger
        if not (told or self.client.blind or self._end.deaf):
            raise Wrong("disconnect", "the server closed without a word")
        self._endings[f"reason {self.ledger.reason}" if told else "not to be read"] += 1
        # What is still on its way when the server has closed is void.
        guests = len(self._world.guests.opened)
        self._client_end.stream = []
        try:
            self.client.put(_AFTER_THE_END)
        except Wrong:
            return
        for piece in self._client_end.stream:
            self._receiver.dataReceived(piece)
        self._world.clock.advance(0)
        if self._end.late or len(self._world.guests.opened) > guests:
            raise Wrong("after-disconnect", "a packet was handled after the server had closed")

    def _finish(self) -> None:
        if not self._over:
            self._endings["the client leaves"] += 1
        held = weigh(self.server, self._world.shared).size
        known = self.ledger.logged_in or self.client.blind
        if held > (MOST_HELD if known else MOST_HELD_BEFORE_LOGIN):
            raise Wrong("growth", f"the connection holds {held} bytes")
        self._end.disconnecting = True
        self._receiver.connectionLost(Failure(ConnectionDone()))
        self._world.clock.advance(_AFTERMATH)
        left = self._world.timers()
        if left:
            raise Wrong("timers", f"of a connection that is gone: {left[0]}")
        if any(guest.open for guest in self._world.guests.opened):
            raise Wrong("attached", "a guest is still attached when the connection is gone")
        for event in self._world.events.seen:
            if ip_address(event.get("address", self._address)) != ip_address(self._address):
                raise Wrong("address", f"{event['address']} is told, not {self._address}")
        self._world.forget()


def _lists(login: Request) -> bool:
    return login.certificate is not None and login.certificate.forced == b"list"
