"""The client of the embedded engine, in a process of its own: asks, and takes the time.

``python -m bench.asking DIRECTORY PID ROUNDS`` prints the samples as JSON. Requests and replies go
through the proxy's own code, but for reading what is in them. Tickets are signed before the time
is taken: that is the proxy's work, and takes longer than the server's answer.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from functools import partial
from itertools import count, cycle
from pathlib import Path
from typing import Any, NamedTuple

from cryptography import x509
from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater, react

from bench import embedded, filling, processes
from bench.errors import BenchError
from vmconsole import pki
from vmconsole.config import Config
from vmconsole.engine.client import MAX_REPLY_BYTES, SERVLET
from vmconsole.engine.embedded.store import Store
from vmconsole.engine.exchange import Exchange, Reply
from vmconsole.engine.http import make_http_client
from vmconsole.engine.ticket import LONGEST_LIFETIME, SALT_BYTES, TicketVerifier, sign_ticket

OURS, MEMORY = "ours", "memory"
AT_A_TIME = 8
_FEATURES = "role,key_options,console_problem"
_TIMEOUT = 30.0
# Seconds for which the probe looks when nothing is asked, and after a key was added: the engine
# looks at its database once a second.
_IDLE = 1.3
_WATCHED = 3
_TICKETS = 300


class Kind(NamedTuple):
    """One question, and how often it is asked in a round: one after the other, and in a row of
    AT_A_TIME at a time (0: never)."""

    name: str
    words: str
    alone: int
    together: int
    change: str = ""
    """What is changed before each: ``key`` or ``vm``."""


KINDS = (
    Kind("keys", f"{filling.KEYS:,} keys", 3, AT_A_TIME),
    Kind("keys-new", f"{filling.KEYS:,} keys, one added", 1, 0, "key"),
    Kind("one", "1 VM", 20, 6 * AT_A_TIME),
    Kind("hundred", "100 VMs", 20, 6 * AT_A_TIME),
    Kind("all", f"{filling.VMS:,} VMs", 10, 2 * AT_A_TIME),
    Kind("all-new", f"{filling.VMS:,} VMs, one changed", 3, 0, "vm"),
)


class _Samples:
    """Of one side and one kind."""

    def __init__(self) -> None:
        self.alone: list[float] = []
        self.together: list[float] = []
        self.cpu: list[float] = []
        self.held: list[float] = []
        self.held_together: list[float] = []


class _Asker:
    """Both ways to the server's process."""

    def __init__(self, reactor: Any, directory: Path, pid: int) -> None:
        self._reactor = reactor
        self._directory = directory
        self._pid = pid
        self._engine = embedded.engine_config(directory)
        self._bench = embedded.bench_config(directory)
        self._identity = pki.Identity.load(
            directory / embedded.TICKET_CERTIFICATE, directory / embedded.TICKET_KEY
        )
        self._store = Store(embedded.database(directory))
        self._numbers = count()
        self._users = (filling.User(number) for number in cycle(range(2, filling.KEYS)))
        self._servlet = self._exchange(self._engine, SERVLET)
        self._memory = {
            kind.name: self._exchange(self._bench, f"{embedded.MEMORY}/{kind.name}")
            for kind in KINDS
        }
        self.samples = {side: {kind.name: _Samples() for kind in KINDS} for side in (OURS, MEMORY)}

    async def prepare(self) -> None:
        """Write what is served from memory, and ask for all once. Raises BenchError."""
        expected = {"keys": filling.KEYS, "one": 1, "hundred": 100, "all": filling.VMS}
        for kind in KINDS:
            reply = b"".join((await self._ask(OURS, kind, self._ticket(kind))).pieces)
            what = expected[kind.name.removesuffix("-new")]
            lists = json.loads(reply)
            entries = lists["keys" if kind.name.startswith("keys") else "consoles"]
            if len(entries) != what:
                raise BenchError(f"{kind.words}: {len(entries)} instead of {what}")
            embedded.reply_file(self._directory, kind.name).write_bytes(reply)
            if len((await self._ask(MEMORY, kind, b"")).pieces) == 0:
                raise BenchError(f"{kind.words}: nothing from memory")

    async def measure(self, side: str, kind: Kind) -> None:
        """One round."""
        samples = self.samples[side][kind.name]
        gc.collect()
        for ticket in self._tickets(side, kind, kind.alone):
            await self._change(side, kind)
            cpu, start = processes.own_cpu(self._pid), time.perf_counter()
            await self._ask(side, kind, ticket)
            samples.alone.append((time.perf_counter() - start) * 1000)
            samples.cpu.append((processes.own_cpu(self._pid) - cpu) * 1000)
        if kind.together:
            tickets = self._tickets(side, kind, kind.together)
            start = time.perf_counter()
            await self._all(side, kind, tickets)
            samples.together.append((time.perf_counter() - start) * 1000 / kind.together)
        for at_a_time, held in ((1, samples.held), (AT_A_TIME, samples.held_together)):
            await self._change(side, kind)
            tickets = self._tickets(side, kind, at_a_time)
            held.append(await self.held(partial(self._all, side, kind, tickets)))

    async def held(self, work: Callable[[], Awaitable[object]]) -> float:
        """Milliseconds for which the server's reactor was held at most during ``work``."""
        await self._command(embedded.PROBE_START)
        await work()
        return float(await self._command(embedded.PROBE_END)) * 1000

    async def rest(self) -> None:
        """Ask nothing for a while."""
        await deferLater(self._reactor, _IDLE)

    async def add_key(self) -> None:
        """As ``vmconsole key add`` does, which is a process of its own, too; and rest."""
        self._add_key()
        await self.rest()

    def ticket_cost(self) -> list[float]:
        """Milliseconds of CPU to verify a ticket, each."""
        certificate = (self._directory / "ticket-ca.cer").read_bytes()
        verifier = TicketVerifier([x509.load_pem_x509_certificate(certificate)])
        milliseconds = []
        for _ in range(_TICKETS):
            ticket = self._ticket(KINDS[0])
            start = time.process_time()
            verifier.verify(ticket, datetime.now(UTC))
            milliseconds.append((time.process_time() - start) * 1000)
        return milliseconds

    async def _change(self, side: str, kind: Kind) -> None:
        if side == MEMORY:
            return
        if kind.change == "key":
            self._add_key()
        elif kind.change == "vm":
            await self._command(embedded.CHANGE)

    def _add_key(self) -> None:
        number = next(self._numbers)
        self._store.add_keys(filling.ADMIN.name, filling.key_line(f"new{number}"))

    async def _all(self, side: str, kind: Kind, tickets: list[bytes]) -> None:
        waiting = iter(tickets)

        async def some() -> None:
            for ticket in waiting:
                await self._ask(side, kind, ticket)

        await gatherResults(
            [Deferred.fromCoroutine(some()) for _ in range(AT_A_TIME)], consumeErrors=True
        )

    async def _ask(self, side: str, kind: Kind, ticket: bytes) -> Reply:
        exchange = self._servlet if side == OURS else self._memory[kind.name]
        reply = await exchange.post(ticket, MAX_REPLY_BYTES)
        if reply.status != 200:
            raise BenchError(f"{kind.words}: HTTP status {reply.status}")
        return reply

    def _tickets(self, side: str, kind: Kind, number: int) -> list[bytes]:
        if side == OURS:
            return [self._ticket(kind) for _ in range(number)]
        # Nobody looks at it: it is only of the right size.
        return [self._ticket(kind)] * number

    def _ticket(self, kind: Kind) -> bytes:
        command = {"version": 1, "features": _FEATURES}
        if kind.name.startswith("keys"):
            command |= {"command": "public_keys", "key_fp": "", "key_type": "", "key_content": ""}
        else:
            users = {"one": None, "hundred": filling.TEAM}
            # Another one each time: nothing is remembered for them.
            user = users.get(kind.name, filling.ADMIN) or next(self._users)
            command |= {"command": "available_consoles", "user_id": user.id}
        return sign_ticket(
            json.dumps(command),
            self._identity,
            datetime.now(UTC),
            os.urandom(SALT_BYTES),
            LONGEST_LIFETIME,
        )

    def _exchange(self, config: Config, path: str) -> Exchange:
        return Exchange(
            make_http_client(self._reactor, config),
            f"http://localhost/{path}",
            IReactorTime(self._reactor),
            timeout=_TIMEOUT,
            who="The server",
        )

    async def _command(self, path: str) -> bytes:
        reply = await self._exchange(self._bench, path).post(b"", MAX_REPLY_BYTES)
        return b"".join(reply.pieces)


async def _run(reactor: Any, directory: str, pid: str, rounds: str) -> None:
    asker = _Asker(reactor, Path(directory), int(pid))
    await asker.prepare()
    gc.collect()
    gc.freeze()
    # A pass of this process's collector is nothing of the server's.
    gc.disable()
    for number in range(int(rounds)):
        for kind in KINDS:
            for side in (OURS, MEMORY) if number % 2 == 0 else (MEMORY, OURS):
                await asker.measure(side, kind)
    watched = range(min(int(rounds), _WATCHED))
    found = {
        "samples": {
            side: {name: vars(samples) for name, samples in of.items()}
            for side, of in asker.samples.items()
        },
        "idle": [await asker.held(asker.rest) for _ in watched],
        "adding": [await asker.held(asker.add_key) for _ in watched],
        "ticket": asker.ticket_cost(),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    react(lambda reactor: Deferred.fromCoroutine(_run(reactor, *sys.argv[1:])))
