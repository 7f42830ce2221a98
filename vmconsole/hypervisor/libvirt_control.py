"""The control connection of a host: kept open, and watched for what stands on the host."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from twisted.application.internet import backoffPolicy
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.python.failure import Failure

from vmconsole.errors import ConsoleError, HostUnreachable
from vmconsole.hypervisor.host_threads import HostThreads
from vmconsole.hypervisor.libvirt_connection import Connection
from vmconsole.hypervisor.libvirt_domains import LifecycleEvent, find_domain, list_domains
from vmconsole.hypervisor.libvirt_errors import connection_lost, message
from vmconsole.hypervisor.libvirt_eventloop import IHostReactor
from vmconsole.interfaces import Domain, IDomainObserver
from vmconsole.text import printable

T = TypeVar("T")

# Seconds between pings, and unanswered ones: a silent host is lost after 20 s.
_KEEPALIVE = (5, 3)
# Seconds for what may be a call for each of hundreds of domains.
_LISTING = 30.0
_delay = backoffPolicy(initialDelay=1.0, maxDelay=29.0, factor=2.0)


class Control:
    """One connection to a host, opened anew after growing delays whenever it is lost.

    ``changed`` is called with each lifecycle event of a domain. When ``observer`` is given it is
    told of the host's domains; ``lost`` is called after each loss and each failed try.
    """

    _log = Logger()

    def __init__(
        self,
        reactor: IHostReactor,
        libvirt: Any,
        host: str,
        threads: HostThreads,
        open_connection: Callable[[], Deferred[Connection]],
        changed: Callable[[str, LifecycleEvent], None],
        lost: Callable[[], None],
        observer: IDomainObserver | None,
    ) -> None:
        self._reactor = reactor
        self._libvirt = libvirt
        self._host = host
        self._threads = threads
        self._open_connection = open_connection
        self._tell_changed = changed
        self._lost = lost
        self._observer = observer
        self._connection: Connection | None = None
        self._failures = 0
        self._outage = ""
        # UUIDs of domains that changed since they were looked at; in order.
        self._stale: dict[str, None] = {}
        self._news: Deferred[None] = Deferred()
        self._keeping = Deferred.fromCoroutine(self._keep())
        self._keeping.addErrback(self._stopped)

    def stop(self) -> None:
        """Close the connection and keep none."""
        self._keeping.cancel()

    async def ask(self, function: Callable[[Any], T], limit: float) -> T:
        """What ``function``, called in a thread with the virConnect, returns.

        Raises HostUnreachable, also when there is no connection just now or after ``limit`` s.
        """
        if self._connection is None:
            raise HostUnreachable(self._outage or connection_lost(self._host))
        return await self._call(partial(self._connection.use, function), limit)

    async def _keep(self) -> None:
        while True:
            try:
                await self._hold(await self._open_connection())
                reason = connection_lost(self._host)
            except ConsoleError as error:
                reason = str(error)
            except CancelledError:
                raise
            except Exception:
                self._log.failure("host {host} cannot be looked at", host=printable(self._host))
                reason = f"vmconsole failed to look at {printable(self._host)}: see its log."
            self._tell_lost(reason)
            await deferLater(self._reactor, _delay(self._failures), lambda: None)
            self._failures += 1

    async def _hold(self, connection: Connection) -> None:
        """Until the connection is lost. Raises HostUnreachable."""
        self._connection = connection
        try:
            await self._threads.call(partial(connection.keep_alive, *_KEEPALIVE))
            # First the events, so that no change is missed.
            await self._call(partial(connection.on_lifecycle, self._changed), _LISTING)
            if self._observer is not None:
                domains = await self._call(partial(connection.use, list_domains), _LISTING)
                self._observer.domains_listed(self._host, domains)
            self._tell_found()
            connection.lost.addCallback(self._wake)
            while not connection.lost.called:
                if self._stale and self._observer is not None:
                    await self._look_again(connection, self._observer)
                else:
                    self._news = Deferred()
                    await self._news
        finally:
            self._connection = None
            self._threads.call(connection.close).addErrback(lambda _: None)

    async def _look_again(self, connection: Connection, observer: IDomainObserver) -> None:
        ids = tuple(self._stale)
        self._stale.clear()

        def look(raw: Any) -> list[Domain | None]:
            return [find_domain(raw, id) for id in ids]

        found = await self._call(partial(connection.use, look), _LISTING)
        for id, domain in zip(ids, found, strict=True):
            if domain is None:
                observer.domain_removed(self._host, id)
            else:
                observer.domain_changed(self._host, domain)

    def _changed(self, id: str, event: int, detail: int) -> None:
        self._tell_changed(id, (event, detail))
        if self._observer is not None:
            self._stale[id] = None
            self._wake()

    def _wake(self, _reason: int | None = None) -> None:
        if not self._news.called:
            self._news.callback(None)

    async def _call(self, function: Callable[[], T], limit: float) -> T:
        try:
            return await self._threads.call(function, limit)
        except self._libvirt.libvirtError as error:
            raise HostUnreachable(
                f"The libvirtd of {printable(self._host)} failed: {message(error)}."
            ) from None

    def _tell_lost(self, reason: str) -> None:
        if not self._outage:
            self._log.warn(
                "host {host} is lost: {reason}", host=printable(self._host), reason=reason
            )
        if self._observer is not None and reason != self._outage:
            self._observer.host_lost(self._host, reason)
        self._outage = reason
        self._lost()

    def _tell_found(self) -> None:
        if self._outage:
            self._log.info("host {host} answers again", host=printable(self._host))
        self._outage = ""
        self._failures = 0

    def _stopped(self, failure: Failure) -> None:
        failure.trap(CancelledError)
