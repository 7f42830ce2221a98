"""A libvirt in memory, and threads and a reactor that move only when a test lets them."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from twisted.internet.task import Clock
from twisted.python.failure import Failure

from vmconsole import config
from vmconsole.hypervisor.libvirt_host import HostPool

RUNNING, PAUSED, SHUT_OFF, CRASHED = 1, 3, 5, 6
# Seconds.
_TURN = 1e-9
_TURNS = 10_000
PTY = "<domain><devices><console type='pty'/></devices></domain>"


class LibvirtError(Exception):
    """As libvirt.libvirtError, as far as it is used."""

    def __init__(self, message: str, code: int = 1, domain: int = 10) -> None:
        super().__init__(message)
        self._code = code
        self._domain = domain

    def get_error_code(self) -> int:
        return self._code

    def get_error_domain(self) -> int:
        return self._domain

    def get_error_message(self) -> str:
        return self.args[0]


class FakeReactor(Clock):
    """A clock to which threads may hand calls; ``settle`` does all that is due now."""

    def __init__(self) -> None:
        super().__init__()
        self._handed: list[tuple[Callable[..., object], Any, Any]] = []
        self._lock = threading.Lock()

    def callFromThread(self, call: Callable[..., object], *args: Any, **kwargs: Any) -> None:
        with self._lock:
            self._handed.append((call, args, kwargs))

    def callLater(self, delay: float, call: Any, *args: Any, **kwargs: Any) -> Any:
        # As in a real reactor, what is made in a turn is done in the next one at the earliest.
        return super().callLater(delay or _TURN, call, *args, **kwargs)

    def settle(self, seconds: float = 0.0) -> None:
        """Advance, in steps of at most 0.1 s, and do all that becomes due."""
        while True:
            self._settle_now()
            if seconds <= 1e-9:
                return
            step = min(0.1, seconds)
            seconds -= step
            self.advance(step)

    def _settle_now(self) -> None:
        for _ in range(_TURNS):
            with self._lock:
                handed, self._handed = self._handed, []
            for call, args, kwargs in handed:
                call(*args, **kwargs)
            soon = self.seconds() + 2 * _TURN
            if not handed and not any(call.getTime() <= soon for call in self.getDelayedCalls()):
                return
            self.advance(_TURN)
        # Something is done in each turn: a timer of 0, for one.


class FakeThreadPool:
    """Runs each call in a later turn of the reactor; while ``held``, when it is released. While
    ``slow`` a call begins, and ends when it is released."""

    def __init__(self, reactor: FakeReactor, largest: int) -> None:
        self.max = largest
        self.started = False
        self.stopped = False
        self.held = self.slow = False
        self.waiting: list[Callable[[], None]] = []
        self.on_call: Callable[[], None] = lambda: None
        self._reactor = reactor

    def start(self) -> None:
        self.started = True

    def stop(self) -> None:
        self.stopped = True

    def adjustPoolsize(self, smallest: int, largest: int) -> None:
        self.max = largest

    def callInThread(self, call: Callable[..., object], *args: Any) -> None:
        self.callInThreadWithCallback(None, call, *args)

    def callInThreadWithCallback(
        self, done: Callable[[bool, Any], None] | None, call: Callable[..., object], *args: Any
    ) -> None:
        def run() -> None:
            try:
                result, succeeded = call(*args), True
            except BaseException:
                result, succeeded = Failure(), False
            if done is None:
                return
            if self.slow:
                self.waiting.append(lambda: done(succeeded, result))
            else:
                done(succeeded, result)

        def start() -> None:
            if self.held:
                self.waiting.append(run)
            else:
                run()

        self.on_call()
        if not self.stopped:
            self._reactor.callLater(0, start)

    def release(self, number: int | None = None) -> None:
        """Run the first so many calls of those that wait; None: all, and hold no more."""
        if number is None:
            self.held = self.slow = False
        run, self.waiting = self.waiting[:number], self.waiting[number or len(self.waiting) :]
        for call in run:
            call()


@dataclass
class FakeDomain:
    """A guest on a FakeDaemon."""

    uuid: str
    name: str
    state: tuple[int, int] = (RUNNING, 1)
    xml: str = PTY
    typed: bytearray = field(default_factory=bytearray)
    stream: FakeStream | None = None
    open_error: LibvirtError | None = None
    sends: list[int] = field(default_factory=list)
    """What the next sends return instead of taking everything."""
    keys: list[tuple[int, list[int]]] = field(default_factory=list)
    """What was pressed on its keyboard: milliseconds, and codes."""
    commands: list[Any] = field(default_factory=list)
    """What QEMU was told on its monitor."""
    answer: str = '{"return": {}, "id": "libvirt-1"}'


class FakeDaemon:
    """The libvirtd of one URI: what it has, and what was done to it."""

    def __init__(self, reactor: FakeReactor) -> None:
        self.reactor = reactor
        self.domains: dict[str, FakeDomain] = {}
        self.connections: list[FakeConnection] = []
        self.open_error: LibvirtError | None = None
        self.call_error: LibvirtError | None = None
        self.opened = 0
        self.leaked: list[str] = []

    def add(self, uuid: str, name: str, **fields: Any) -> FakeDomain:
        domain = self.domains[uuid] = FakeDomain(uuid, name, **fields)
        return domain

    def tell(self, uuid: str, name: str = "", event: int = 0, detail: int = 0) -> None:
        """Send a lifecycle event to all who want them."""
        for connection in tuple(self.connections):
            for callback in tuple(connection.callbacks.values()):
                callback(connection, FakeDomainObject(connection, uuid, name), event, detail, None)

    def drop(self, reason: int = 1) -> None:
        """End all connections from the daemon's side. No stream event fires."""
        for connection in tuple(self.connections):
            connection.drop(reason)


class FakeConnection:
    """A virConnect. Closing it while streams or callbacks live is noted as a leak."""

    def __init__(self, daemon: FakeDaemon) -> None:
        self.daemon = daemon
        self.callbacks: dict[int, Any] = {}
        self.streams: set[FakeStream] = set()
        self.close_callback: Any = None
        self.keepalive: list[tuple[int, int]] = []
        self.pings = 0
        self.dead = False
        daemon.connections.append(self)
        daemon.opened += 1

    def drop(self, reason: int) -> None:
        self.dead = True
        self.daemon.connections.remove(self)
        if self.close_callback is not None:
            callback, self.close_callback = self.close_callback, None
            callback(self, reason, None)

    def check(self) -> None:
        if self.dead:
            raise LibvirtError("client socket is closed", 1, 7)
        if self.daemon.call_error is not None:
            raise self.daemon.call_error

    def registerCloseCallback(self, callback: Any, _opaque: None) -> None:
        self.close_callback = callback

    def unregisterCloseCallback(self) -> None:
        if self.close_callback is None:
            raise LibvirtError("A different callback was requested")
        self.close_callback = None

    def domainEventRegisterAny(self, _domain: None, _event: int, callback: Any, _: None) -> int:
        self.check()
        self.callbacks[len(self.callbacks)] = callback
        return len(self.callbacks) - 1

    def domainEventDeregisterAny(self, number: int) -> None:
        del self.callbacks[number]
        self.check()

    def setKeepAlive(self, interval: int, count: int) -> int:
        if self.keepalive:
            raise LibvirtError("keepalive interval already set")
        self.keepalive.append((interval, count))
        return 0

    def getLibVersion(self) -> int:
        self.pings += 1
        self.check()
        return 9000000

    def listAllDomains(self) -> list[FakeDomainObject]:
        self.check()
        return [FakeDomainObject(self, uuid, "") for uuid in self.daemon.domains]

    def lookupByUUIDString(self, uuid: str) -> FakeDomainObject:
        self.check()
        domain = FakeDomainObject(self, uuid, "")
        domain.record  # noqa: B018 - raises when there is none
        return domain

    def newStream(self, _flags: int) -> FakeStream:
        return FakeStream(self)

    def close(self) -> int:
        kept = [
            word
            for word, some in (
                ("stream", self.streams),
                ("event callback", self.callbacks),
                ("close callback", self.close_callback),
            )
            if some
        ]
        self.daemon.leaked += kept
        if not self.dead:
            self.dead = True
            self.daemon.connections.remove(self)
        return 1 if kept else 0


class FakeDomainObject:
    """A virDomain."""

    def __init__(self, connection: FakeConnection, uuid: str, name: str) -> None:
        self._connection = connection
        self._uuid = uuid
        self._name = name

    @property
    def record(self) -> FakeDomain:
        self._connection.check()
        try:
            return self._connection.daemon.domains[self._uuid]
        except KeyError:
            raise LibvirtError("Domain not found: no domain with matching uuid", 42) from None

    def UUIDString(self) -> str:
        return self._uuid

    def name(self) -> str:
        return self._name or self.record.name

    def state(self) -> list[int]:
        return list(self.record.state)

    def XMLDesc(self) -> str:
        return self.record.xml

    def openConsole(self, alias: str | None, stream: FakeStream, flags: int) -> int:
        record = self.record
        if record.open_error is not None:
            raise record.open_error
        force = flags == FakeLibvirt.VIR_DOMAIN_CONSOLE_FORCE
        assert force or flags == FakeLibvirt.VIR_DOMAIN_CONSOLE_SAFE
        if record.stream is not None and not force:
            raise LibvirtError("operation failed: Active console session exists for this domain", 9)
        if record.state[0] == SHUT_OFF:
            raise LibvirtError("Requested operation is not valid: domain is not running", 55)
        if record.stream is not None:
            record.stream.put(LibvirtError("stream had I/O failure", 39, 38))
        stream.attach(record, alias)
        return 0

    def sendKey(self, codeset: int, holdtime: int, keycodes: list[int], count: int, _: int) -> int:
        assert (codeset, count) == (0, len(keycodes))
        self._running().keys.append((holdtime, keycodes))
        return 0

    def monitor(self, command: str) -> str:
        """QEMU's answer."""
        record = self._running()
        record.commands.append(json.loads(command))
        return record.answer

    def _running(self) -> FakeDomain:
        if self.record.state[0] == SHUT_OFF:
            raise LibvirtError("Requested operation is not valid: domain is not running", 55)
        return self.record


class FakeStream:
    """A virStream: its events fire in later turns, as long as there is a cause."""

    def __init__(self, connection: FakeConnection) -> None:
        self._o = self
        self.alias: str | None = None
        self.output: list[bytes | LibvirtError] = []
        self.data: dict[str, Any] | None = None
        self.events = 0
        self.aborted = 0
        self._connection = connection
        self._domain: FakeDomain | None = None
        self._firing = False

    def attach(self, domain: FakeDomain, alias: str | None) -> None:
        self._domain = domain
        self.alias = alias
        domain.stream = self
        self._connection.streams.add(self)

    def put(self, *output: bytes | LibvirtError) -> None:
        """The guest prints; empty: the console ends; an error: the stream breaks."""
        self.output += output
        self._arm()

    def recv(self, size: int) -> bytes | int:
        if not self.output:
            return -2
        first = self.output[0]
        if isinstance(first, LibvirtError):
            raise first
        if not first:
            return first
        self.output.pop(0)
        if len(first) > size:
            self.output.insert(0, first[size:])
        return first[:size]

    def send(self, data: bytes) -> int:
        self._connection.check()
        assert self._domain is not None
        assert self.data is not None or not self.aborted
        taken = len(data)
        if self._domain.sends:
            taken = min(taken, self._domain.sends.pop(0))
        if taken > 0:
            self._domain.typed += data[:taken]
        return taken

    def watch(self, events: int, data: dict[str, Any]) -> None:
        self.events, self.data = events, data
        self._arm()

    def eventUpdateCallback(self, events: int) -> None:
        self.events = events
        self._arm()

    def eventRemoveCallback(self) -> None:
        self.data = None

    def abort(self) -> int:
        self.aborted += 1
        self._connection.streams.discard(self)
        if self._domain is not None and self._domain.stream is self:
            self._domain.stream = None
        self._connection.check()
        return 0

    def _cause(self) -> int:
        readable = FakeLibvirt.VIR_STREAM_EVENT_READABLE if self.output else 0
        return self.events & (readable | FakeLibvirt.VIR_STREAM_EVENT_WRITABLE)

    def _arm(self) -> None:
        if self.data is not None and self._cause() and not self._firing:
            self._firing = True
            self._connection.daemon.reactor.callLater(0, self._fire)

    def _fire(self) -> None:
        self._firing = False
        if self.data is not None and (events := self._cause()):
            self.data["stream"]._dispatchStreamEventCallback(events, self.data)
            self._arm()


class FakeLibvirt:
    """The module: ``daemons`` by URI; an event loop implementation is only remembered."""

    VIR_STREAM_NONBLOCK = 1
    VIR_DOMAIN_CONSOLE_FORCE, VIR_DOMAIN_CONSOLE_SAFE = 1, 2
    VIR_STREAM_EVENT_READABLE, VIR_STREAM_EVENT_WRITABLE = 1, 2
    VIR_STREAM_EVENT_ERROR, VIR_STREAM_EVENT_HANGUP = 4, 8
    VIR_EVENT_HANDLE_READABLE, VIR_EVENT_HANDLE_WRITABLE = 1, 2
    VIR_EVENT_HANDLE_ERROR, VIR_EVENT_HANDLE_HANGUP = 4, 8
    VIR_DOMAIN_EVENT_ID_LIFECYCLE = 0
    libvirtError = LibvirtError

    def __init__(self) -> None:
        self.daemons: dict[str, FakeDaemon] = {}
        self.registered: list[tuple[Any, ...]] = []
        self.freed: list[Any] = []
        self.libvirtmod = SimpleNamespace(virStreamEventAddCallback=self._watch_stream)

    def open(self, uri: str) -> FakeConnection:
        daemon = self.daemons.get(uri)
        if daemon is None:
            raise LibvirtError(
                f"Unable to resolve address '{uri}' service '16514': Name or service not known",
                38,
                7,
            )
        if daemon.open_error is not None:
            raise daemon.open_error
        return FakeConnection(daemon)

    def registerErrorHandler(self, handler: Any, context: None) -> None:
        handler(context, ())

    def virEventRegisterImpl(self, *functions: Any) -> None:
        self.registered.append(functions)

    def virEventInvokeFreeCallback(self, opaque: Any) -> None:
        self.freed.append(opaque)

    @staticmethod
    def _watch_stream(stream: FakeStream, events: int, data: dict[str, Any]) -> int:
        stream.watch(events, data)
        return 0


class FakeMonitor:
    """The module libvirt_qemu."""

    def qemuMonitorCommand(self, domain: FakeDomainObject, command: str, flags: int) -> str:
        assert flags == 0
        return domain.monitor(command)


class Site:
    """A started HostPool over daemons in memory: ``node1`` and ``node2`` at overridden URIs."""

    def __init__(
        self, may_force: bool = False, monitor: FakeMonitor | None = None, **hosts: Any
    ) -> None:
        self.reactor = FakeReactor()
        self.libvirt = FakeLibvirt()
        self.threads: list[FakeThreadPool] = []
        for name in ("node1", "node2"):
            self.libvirt.daemons[f"qemu+tls://{name}/system"] = FakeDaemon(self.reactor)
        self.daemon = self.libvirt.daemons["qemu+tls://node1/system"]
        self.hosts = HostPool(
            self.reactor,  # type: ignore[arg-type]
            self.libvirt,
            config.Hosts(**hosts),
            self._make_pool,
            may_force=may_force,
            monitor=monitor,
        )
        self.hosts.startService()

    def _make_pool(self, _smallest: int, largest: int, _name: str) -> Any:
        self.threads.append(FakeThreadPool(self.reactor, largest))
        return self.threads[-1]

    def settle(self, seconds: float = 0.0) -> None:
        self.reactor.settle(seconds)

    def stop(self) -> float:
        """Stop the service. Returns how many seconds, on the clock, it took."""
        start = self.reactor.seconds()
        stopped: list[object] = []
        self.hosts.stopService().addBoth(stopped.append)
        while not stopped:
            self.settle(0.1)
            # The pools are stopped by threads of their own.
            time.sleep(0.001)
        return self.reactor.seconds() - start
