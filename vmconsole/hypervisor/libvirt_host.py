"""The hosts, as libvirt's clients see them: their URIs, threads and connections."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, TypeVar

from twisted.application.service import Service
from twisted.internet.defer import Deferred, DeferredList, succeed
from twisted.internet.interfaces import IStreamClientEndpoint
from twisted.internet.task import LoopingCall
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.python.threadpool import ThreadPool
from zope.interface import implementer

from vmconsole import config
from vmconsole.errors import ConfigError, ConsoleGone, ConsoleUnavailable, HostUnreachable
from vmconsole.hypervisor.host_threads import HostThreads
from vmconsole.hypervisor.libvirt_connection import Connection
from vmconsole.hypervisor.libvirt_control import Control
from vmconsole.hypervisor.libvirt_domains import LifecycleEvent, after, list_domains, news
from vmconsole.hypervisor.libvirt_errors import host_unreachable
from vmconsole.hypervisor.libvirt_eventloop import IHostReactor, LibvirtEventLoop
from vmconsole.hypervisor.libvirt_guest import send_break, send_sysrq
from vmconsole.hypervisor.libvirt_stream import ConsoleEndpoint, ConsoleStream
from vmconsole.hypervisor.libvirt_uri import host_uri
from vmconsole.interfaces import (
    ConsoleInfo,
    Domain,
    DomainState,
    GuestNews,
    IConsoleEndpoints,
    IDomainObserver,
    IDomainSource,
    IGuestObserver,
)
from vmconsole.text import printable

__all__ = ["Host", "HostPool", "list_domains"]

T = TypeVar("T")

# Seconds.
_STOPPING = 3.0
_UNUSED = 60.0
# Leaving a console takes longer than this only if its guest, or its host, is stuck; then it takes
# libvirtd up to so long to find out.
_CLEAN = 1.0
_BELIEVING = 30.0
# Domains of a host of which the last event is kept.
_EVENTS = 1000

MakePool = Callable[[int, int, str], ThreadPool]


class Host:
    """One host: its URI, its threads, its control connection, its open consoles."""

    # Threads for each console: one for a call that a stuck guest holds up, one to leave it.
    _THREADS = 2

    def __init__(
        self,
        reactor: IHostReactor,
        libvirt: Any,
        name: str,
        uri: str,
        pki: str = "",
        make_pool: MakePool | None = None,
        timeout: float = 10.0,
        news: Callable[[str, GuestNews], None] = lambda vm_id, news: None,
    ) -> None:
        """``pki`` is named in errors; ``timeout`` is for the opening of anything, in seconds;
        ``news`` is told what happens to any domain."""
        self.reactor = reactor
        self.libvirt = libvirt
        self.name = name
        self.uri = uri
        self.timeout = timeout
        self.last_events: dict[str, LifecycleEvent] = {}
        """The last one of each domain, since its console was opened here; of the newest ones."""
        self.threads = HostThreads(reactor, name, make_pool)
        self._pki = pki
        self._news = news
        self._control: Control | None = None
        self._observer: IDomainObserver | None = None
        self._consoles = 0
        self._streams: set[ConsoleStream] = set()
        self._leaving: dict[ConsoleStream, tuple[float, Deferred[None]]] = {}
        # When a VM's console was left in a way that its libvirtd may not have noticed.
        self._left_behind: dict[str, float] = {}

    @property
    def is_watched(self) -> bool:
        """Somebody is told of its domains."""
        return self._observer is not None

    @property
    def in_use(self) -> bool:
        """It is watched, or a console is open, being opened or being closed."""
        return self._observer is not None or self._consoles > 0

    def connect(self) -> Connection:
        """A new connection. It waits: for a thread. Raises HostUnreachable."""
        try:
            return Connection(self.reactor, self.libvirt, self.uri)
        except self.libvirt.libvirtError as error:
            problem = host_unreachable(error, self.name, self._pki)
        raise problem

    def open_connection(self) -> Deferred[Connection]:
        """A new connection. Fails with HostUnreachable, at the latest after ``timeout``."""
        return self.threads.call(self.connect, self.timeout, Connection.close)

    async def ask(self, function: Callable[[Any], T], limit: float | None = None) -> T:
        """What ``function``, called in a thread with the control connection's virConnect, returns.

        Raises HostUnreachable, also after ``limit`` seconds (None: ``timeout``).
        """
        if self._control is None:
            raise HostUnreachable(f"There is no connection to {printable(self.name)} now.")
        return await self._control.ask(function, self.timeout if limit is None else limit)

    def watch(self, observer: IDomainObserver | None) -> None:
        """Tell ``observer`` of the domains, from a new control connection; None: stop that."""
        self._observer = observer
        self._drop_control()
        self._keep_control()

    def move(self, uri: str) -> None:
        """Use another URI from now on; open consoles stay."""
        self.uri = uri
        self._drop_control()
        self._keep_control()

    # What consoles tell of themselves.

    def console_opening(self) -> None:
        """A console is about to be opened; ``console_closed`` follows in any case."""
        self._consoles += 1
        self.threads.lend(self._THREADS)
        self._keep_control()

    def console_opened(self, stream: ConsoleStream) -> None:
        """It is open."""
        self._streams.add(stream)
        self.last_events.pop(stream.console.vm_id, None)

    def console_ended(self, stream: ConsoleStream) -> None:
        """It is of no more use, and its traces on the host are about to be removed."""
        self._streams.discard(stream)
        self._leaving[stream] = (self.reactor.seconds(), Deferred())

    def console_closed(self, stream: ConsoleStream | None = None) -> None:
        """The host has let go of it, or it was never opened."""
        self._consoles -= 1
        self.threads.lend(-self._THREADS)
        if stream is not None:
            now = self.reactor.seconds()
            since, closed = self._leaving.pop(stream)
            if now - since > _CLEAN:
                self._left_behind[stream.console.vm_id] = now
            closed.callback(None)

    def left(self, vm_id: str, limit: float) -> Deferred[bool]:
        """Fires when no console of the VM is being left any more, or after ``limit`` seconds.

        The result tells whether the host may still believe that we have it.
        """
        now = self.reactor.seconds()
        self._left_behind = {
            id: since for id, since in self._left_behind.items() if now - since < _BELIEVING
        }
        leaving = [
            closed for stream, (_, closed) in self._leaving.items() if stream.console.vm_id == vm_id
        ]
        ours = bool(leaving) or vm_id in self._left_behind
        return self._all(leaving, limit).addCallback(lambda _: ours)

    async def stop(self) -> None:
        """End all consoles and connections; takes 3 s at most, whatever the host does."""
        self._observer = None
        self._drop_control()
        gone = Failure(ConsoleGone("vmconsole is stopping."))
        for stream in tuple(self._streams):
            stream.end(gone)
        leaving = [closed for _, closed in self._leaving.values()]
        await self._all(leaving, _STOPPING * 2 / 3)
        await self._all([self.threads.stop()], _STOPPING / 3)

    def _keep_control(self) -> None:
        if self._control is None and self.in_use:
            self._control = Control(
                self.reactor,
                self.libvirt,
                self.name,
                self.threads,
                self.open_connection,
                self._changed,
                self._lost,
                self._observer,
            )

    def _drop_control(self) -> None:
        control, self._control = self._control, None
        if control is not None:
            control.stop()

    def _changed(self, vm_id: str, event: LifecycleEvent) -> None:
        before = self.last_events.pop(vm_id, None)
        self.last_events[vm_id] = after(before, event)
        if len(self.last_events) > _EVENTS:
            del self.last_events[next(iter(self.last_events))]
        told = news(event)
        if told is not None:
            self._news(vm_id, told)

    def _lost(self) -> None:
        # A console's own connection notices nothing when a host falls silent: have it ask.
        for stream in self._streams:
            stream.prove_alive()

    def _all(self, events: Iterable[Deferred[None]], limit: float) -> Deferred[None]:
        """Fires when all of ``events`` have, or after ``limit`` seconds."""
        waiting: Deferred[None] = Deferred()
        left = set(events)

        def happened(event: Deferred[None], _result: None) -> None:
            left.discard(event)
            if not left and not waiting.called:
                waiting.callback(None)

        for event in tuple(left):
            event.addCallback(partial(happened, event))
        if not left:
            return succeed(None)
        return waiting.addTimeout(limit, self.reactor, lambda _result, _limit: None)


@implementer(IConsoleEndpoints, IDomainSource)
class HostPool(Service):
    """All hosts that are watched, or on which a console is open."""

    name = "hosts"
    observer: IDomainObserver | None = None
    guest_observer: IGuestObserver | None = None
    """Who is told of what happens to guests; None: nobody."""

    def __init__(
        self,
        reactor: IHostReactor,
        libvirt: Any,
        hosts: config.Hosts,
        make_pool: MakePool | None = None,
        *,
        may_force: bool = False,
        monitor: Any = None,
    ) -> None:
        """``libvirt`` is the module; ``hosts.pki`` an absolute path or empty.

        ``may_force``: consoles may be taken from other programs. ``monitor``: the module
        libvirt_qemu, if BREAK may go through QEMU's monitor.
        """
        self._reactor = reactor
        self._libvirt = libvirt
        self._config = hosts
        self._make_pool = make_pool
        self._may_force = may_force
        self._monitor = monitor
        self._watched: dict[str, str] = {}
        self._hosts: dict[str, Host] = {}
        self._sweeping = LoopingCall(self._sweep)
        self._sweeping.clock = reactor

    def startService(self) -> None:
        super().startService()
        LibvirtEventLoop(self._reactor, self._libvirt).register()
        for host in self._watched:
            self._watch(host)
        self._sweeping.start(_UNUSED, now=False)

    def stopService(self) -> Deferred[None]:
        """Fires when all is closed, or after 3 s."""
        super().stopService()
        if self._sweeping.running:
            self._sweeping.stop()
        stopping = [Deferred.fromCoroutine(host.stop()) for host in self._hosts.values()]
        self._hosts.clear()
        return DeferredList(stopping).addCallback(lambda _: None)

    def console_endpoint(self, console: ConsoleInfo, force: bool = False) -> IStreamClientEndpoint:
        """The way to a guest's console; see ConsoleEndpoint."""
        return ConsoleEndpoint(partial(self._host_of, console, force), console, force)

    async def send_break(self, console: ConsoleInfo) -> None:
        """See IConsoleEndpoints."""
        send = partial(send_break, monitor=self._monitor, console=console)
        await self._host_of(console).ask(send)

    async def send_sysrq(self, console: ConsoleInfo, letter: str) -> bytes:
        """See IConsoleEndpoints."""
        send = partial(send_sysrq, monitor=self._monitor, console=console, letter=letter)
        return await self._host_of(console).ask(send)

    def watch(self, host: str, uri: str) -> None:
        """See IDomainSource."""
        host_uri(host, uri, self._config)
        self._watched[host] = uri
        if self.running:
            self._watch(host)

    def unwatch(self, host: str) -> None:
        """See IDomainSource."""
        if self._watched.pop(host, None) is not None and host in self._hosts:
            self._hosts[host].watch(None)

    def _watch(self, name: str) -> None:
        host = self._host(name)
        if not host.is_watched:
            host.watch(_Told(self))

    def _host_of(self, console: ConsoleInfo, force: bool = False) -> Host:
        """Raises ConsoleError."""
        if not self.running:
            raise HostUnreachable("vmconsole is stopping.")
        if force and not self._may_force:
            raise ConsoleUnavailable(
                "Consoles may not be taken from other programs by force: set console.force in the "
                "proxy's configuration."
            )
        if not console.host:
            raise ConsoleUnavailable(
                f"{printable(console.vm_name)} stands on no host: it is shut off, perhaps. Start "
                "it, then connect again."
            )
        try:
            return self._host(console.host)
        except ConfigError as error:
            raise HostUnreachable(str(error)) from error

    def _host(self, name: str) -> Host:
        """Raises ConfigError."""
        uri = host_uri(name, self._watched.get(name, ""), self._config)
        host = self._hosts.get(name)
        if host is None:
            host = self._hosts[name] = Host(
                self._reactor,
                self._libvirt,
                name,
                uri,
                self._config.pki,
                self._make_pool,
                news=self._guest_changed,
            )
        elif host.uri != uri:
            host.move(uri)
        return host

    def _guest_changed(self, vm_id: str, news: GuestNews) -> None:
        if self.guest_observer is not None:
            self.guest_observer.guest_changed(vm_id, news)

    def _sweep(self) -> None:
        """Give up what hosts hold that nobody uses."""
        for name, host in tuple(self._hosts.items()):
            if not host.in_use:
                del self._hosts[name]
                Deferred.fromCoroutine(host.stop())


@implementer(IDomainObserver)
class _Told:
    """Passes on to the pool's observer of the day, whose mistakes are its own."""

    _log = Logger()

    def __init__(self, hosts: HostPool) -> None:
        self._hosts = hosts

    def domains_listed(self, host: str, domains: Sequence[Domain]) -> None:
        self._tell(lambda observer: observer.domains_listed(host, domains))
        # Nobody heard of those that started while the host was away.
        for each in (domain for domain in domains if domain.state is DomainState.RUNNING):
            self._hosts._guest_changed(each.id, GuestNews(runs=True))

    def domain_changed(self, host: str, domain: Domain) -> None:
        self._tell(lambda observer: observer.domain_changed(host, domain))

    def domain_removed(self, host: str, domain_id: str) -> None:
        self._tell(lambda observer: observer.domain_removed(host, domain_id))

    def host_lost(self, host: str, reason: str) -> None:
        self._tell(lambda observer: observer.host_lost(host, reason))

    def _tell(self, call: Callable[[IDomainObserver], None]) -> None:
        if self._hosts.observer is not None:
            with self._log.failuresHandled("the observer of the hosts failed"):
                call(self._hosts.observer)
