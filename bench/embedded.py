"""The embedded engine alone, as the server of its protocol, with many keys and VMs.

All of it is the product's but the hosts: so many libvirts do not fit on one machine, and a double
says what would stand on them.

``python -m bench.embedded DIRECTORY`` serves, and on a second socket the bench's own requests.
"""

from __future__ import annotations

import gc
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.internet.task import react
from twisted.python.log import startLogging
from twisted.web.resource import Resource
from twisted.web.server import Request, Site
from zope.interface import implementer

from bench import filling
from bench.server import Server
from vmconsole.config import Config, EmbeddedEngine, Engine, State
from vmconsole.engine.embedded import service
from vmconsole.interfaces import DomainState, IDomainObserver, IDomainSource

_TOP = Path(__file__).parents[1]
_SOCKET, _DATABASE, _REPLIES = "bench.sock", "engine.db", "replies"
TICKET_CERTIFICATE, TICKET_KEY = "bench-ticket.cer", "bench-ticket.key"
# Paths on the bench's own socket.
MEMORY, CHANGE, PROBE_START, PROBE_END = "memory", "change", "probe-start", "probe-end"
# Seconds from one look of the probe to the next.
_PROBE = 0.001


class EmbeddedServer(Server):
    """The server's process, and where everything of it is."""

    label = "our embedded engine"

    def __init__(self, directory: Path) -> None:
        """Makes ``directory``, with the database in it. Raises StoreError."""
        super().__init__()
        self._directory = directory
        (directory / _REPLIES).mkdir(parents=True)
        filling.fill(database(directory))

    def start(self) -> None:
        """Start it, and wait until it knows all VMs. Raises BenchError."""
        command = [sys.executable, "-P", "-m", "bench.embedded", str(self._directory)]
        environment = {**os.environ, "PYTHONPATH": str(_TOP)}
        self._spawn(command, self._directory / "log", self._directory, environment)

    def answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as connection:
            return connection.connect_ex(str(self._directory / _SOCKET)) == 0


def database(directory: Path) -> str:
    """The URL of the database."""
    return f"sqlite:///{directory / _DATABASE}"


def reply_file(directory: Path, name: str) -> Path:
    """What is served from memory by this name."""
    return directory / _REPLIES / name


def engine_config(directory: Path) -> Config:
    """The configuration of the engine, and of a client of it."""
    return Config(state=State(directory=str(directory)))


def bench_config(directory: Path) -> Config:
    """The configuration of a client of the bench's own socket."""
    embedded = EmbeddedEngine(listen=f"unix:{_SOCKET}")
    return Config(state=State(directory=str(directory)), engine=Engine(embedded=embedded))


@implementer(IDomainSource)
class _Hosts:
    """Lists the VMs of a host as soon as it is watched; ``listed`` fires when all have been."""

    def __init__(self, reactor: IReactorTime) -> None:
        self.observer: IDomainObserver | None = None
        self.listed: Deferred[None] = Deferred()
        self._reactor = reactor
        self._awaited = set(filling.host_names())
        self._paused = False

    def watch(self, host: str, uri: str) -> None:
        self._reactor.callLater(0, self._list, host)

    def unwatch(self, host: str) -> None:
        """Nothing was kept for it."""

    def change(self) -> None:
        """A VM is paused, or goes on."""
        self._paused = not self._paused
        host = filling.host_names()[0]
        domain = filling.domains(host)[-1]
        state = DomainState.PAUSED if self._paused else DomainState.RUNNING
        assert self.observer is not None
        self.observer.domain_changed(host, msgspec.structs.replace(domain, state=state))

    def _list(self, host: str) -> None:
        assert self.observer is not None
        self.observer.domains_listed(host, filling.domains(host))
        self._awaited.discard(host)
        if not self._awaited and not self.listed.called:
            self.listed.callback(None)


class _Probe:
    """The longest time for which the reactor was held, in seconds, as a timer sees it.

    It is later than it should be by what is left of the turn in which it fell due, and by the wait
    for the interpreter's lock, which a thread may have: both hold up a keystroke as well. The time
    that turns take would miss the second. A look each millisecond costs some 2 % of a core; a
    timer of 0 would never let the reactor wait, and would take the lock from the threads.
    """

    def __init__(self, reactor: IReactorTime) -> None:
        self._reactor = reactor
        self._call: IDelayedCall | None = None
        self._due = self._longest = 0.0

    def start(self) -> None:
        """Begin anew."""
        self.stop()
        self._longest = 0.0
        self._wait()

    def stop(self) -> float:
        """The longest since the start."""
        if self._call is not None:
            self._look()
            self._call.cancel()
            self._call = None
        return self._longest

    def _wait(self) -> None:
        self._due = time.perf_counter() + _PROBE
        self._call = self._reactor.callLater(_PROBE, self._tick)

    def _tick(self) -> None:
        self._look()
        self._wait()

    def _look(self) -> None:
        self._longest = max(self._longest, time.perf_counter() - self._due)


class _Bench(Resource):
    """What the bench asks for: what HTTP alone costs, the probe, and a change of a VM."""

    isLeaf = True

    def __init__(self, directory: Path, hosts: _Hosts, probe: _Probe) -> None:
        super().__init__()
        self._directory = directory
        self._hosts = hosts
        self._probe = probe
        self._replies: dict[str, bytes] = {}

    def render_POST(self, request: Request) -> bytes:
        word, _, name = request.path.decode().strip("/").partition("/")
        if word == MEMORY:
            request.setHeader(b"Content-Type", b"application/json")
            return self._reply(name)
        if word == CHANGE:
            self._hosts.change()
        elif word == PROBE_START:
            self._probe.start()
        elif word == PROBE_END:
            return b"%r" % self._probe.stop()
        return b""

    def _reply(self, name: str) -> bytes:
        if name not in self._replies:
            self._replies[name] = reply_file(self._directory, name).read_bytes()
        return self._replies[name]


class _QuietSite(Site):
    def log(self, request: object) -> None:
        """Ours has no access log either."""


async def _serve(reactor: Any, directory: Path) -> None:
    hosts = _Hosts(reactor)
    engine = service.EmbeddedEngine(reactor, engine_config(directory), hosts)
    engine.startService()
    identity = await engine.ready()
    identity.save(directory / TICKET_CERTIFICATE, directory / TICKET_KEY)
    await hosts.listed
    # As vmconsole's own process does when it has started.
    gc.collect()
    gc.freeze()
    site = _QuietSite(_Bench(directory, hosts, _Probe(reactor)))
    reactor.listenUNIX(str(directory / _SOCKET), site)
    # Until the process is ended.
    await Deferred()


if __name__ == "__main__":
    startLogging(sys.stdout, setStdout=False)
    react(lambda reactor: Deferred.fromCoroutine(_serve(reactor, Path(sys.argv[1]))))
