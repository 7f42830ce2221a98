"""The embedded engine as a service: its certificates, its database, its socket, its hosts."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from threading import Thread
from typing import Any, TypeVar

from twisted.application.internet import backoffPolicy
from twisted.application.service import Service
from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.defer import CancelledError, Deferred, fail, maybeDeferred, succeed
from twisted.internet.endpoints import UNIXServerEndpoint
from twisted.internet.error import CannotListenError
from twisted.internet.interfaces import IAddress, IListeningPort
from twisted.internet.task import LoopingCall, deferLater
from twisted.internet.threads import deferToThreadPool
from twisted.logger import Logger
from twisted.python.failure import Failure

from vmconsole import pki
from vmconsole.audit import Audit
from vmconsole.clocks import posix_clock, utc_now
from vmconsole.config import Config
from vmconsole.engine.embedded.answers import Answers
from vmconsole.engine.embedded.changes import ChangeWatch
from vmconsole.engine.embedded.database import database_file, database_url
from vmconsole.engine.embedded.files import EmbeddedFiles
from vmconsole.engine.embedded.https import listen_https
from vmconsole.engine.embedded.identity import TicketIdentities, ticket_identities
from vmconsole.engine.embedded.inventory import Inventory
from vmconsole.engine.embedded.listen import https_endpoint, unix_address
from vmconsole.engine.embedded.servlet import ConsoleProxyServlet, make_site
from vmconsole.engine.embedded.store import Store
from vmconsole.engine.embedded.watch import HostWatch
from vmconsole.engine.ticket import TicketVerifier
from vmconsole.errors import (
    EngineError,
    EngineUnreachable,
    StoreError,
    StoreUnavailable,
    VMConsoleError,
)
from vmconsole.flight import Flight
from vmconsole.interfaces import IDomainSource
from vmconsole.threads import DaemonThreadPool

T = TypeVar("T")

_POLL_SECONDS = 1.0
_DAY_SECONDS = 86400.0
_THREADS = 4
# Of HTTPS, at a time.
_CONNECTIONS = 256
# A database that hangs holds up the end of the service no longer, in seconds.
_STOPPING = 3.0
_delay = backoffPolicy(initialDelay=1.0, maxDelay=29.0, factor=2.0)


class EmbeddedEngine(Service):
    """Serves the engine protocol on a unix socket, and by HTTPS if ``engine.embedded.listen`` says.

    ``source`` is told which hosts to watch, and tells what stands on them; ``audit`` of what
    people change. startService only begins: ``ready`` says when requests are answered, or why they
    never will be. A database server that is not there yet is waited for, and requests are answered
    with 503 until it is. ``files`` is a service of its own, for its owner to start. The constructor
    reads files, and raises ConfigError.
    """

    _log = Logger()

    def __init__(
        self, reactor: Any, config: Config, source: IDomainSource, audit: Audit | None = None
    ) -> None:
        self._reactor = reactor
        self._config = config
        self._address = unix_address(config)
        self._https = https_endpoint(reactor, config)
        self.files = EmbeddedFiles(reactor, config, self._trust)
        url = database_url(config)
        self._waits_for_database = database_file(url) is None
        self._store = Store(url, posix_clock(reactor))
        self._inventory = Inventory()
        self._answers = Answers(self._store, self._inventory, self._in_store, reactor)
        self._watch = HostWatch(source, self._inventory)
        self._changes = ChangeWatch(self._store, self._watch, audit or Audit(), self._in_store)
        self._threads: DaemonThreadPool | None = None
        self._started: Flight[pki.Identity] | None = None
        self._lock: int | None = None
        self._ports: list[IListeningPort] = []
        self._verifier = TicketVerifier(())
        self._identities: TicketIdentities | None = None
        self._renewal = LoopingCall(self._renew)
        self._renewal.clock = reactor
        self._open = False
        self._opening: Deferred[None] = succeed(None)
        self._poll = LoopingCall(lambda: Deferred.fromCoroutine(self._changes.look()))
        self._polling: Deferred[Any] = succeed(None)

    def ready(self) -> Deferred[pki.Identity]:
        """What our own proxy signs tickets with, once they are taken. Fails as the start did."""
        if self._started is None:
            return fail(EngineUnreachable("The embedded engine is not running."))
        return self._started.wait()

    async def credentials(self) -> pki.Identity:
        """For EngineClient: as ``ready``, and what it was renewed by. Raises EngineUnreachable."""
        try:
            first = await self.ready()
        except VMConsoleError as error:
            raise EngineUnreachable(f"The embedded engine did not start: {error}") from error
        return self._identities.proxy if self._identities else first

    def startService(self) -> None:
        """See IService."""
        super().startService()
        self._threads = DaemonThreadPool(0, _THREADS, "embedded engine")
        self._threads.start()
        self._started = Flight(Deferred.fromCoroutine(self._start()))
        self._started.wait().addErrback(self._say_failed)

    def stopService(self) -> Deferred[None]:
        """See IService. Fires when the socket is closed and all threads have ended, or hang."""
        super().stopService()
        started, self._started = self._started, None
        if started is None:
            return succeed(None)
        return Deferred.fromCoroutine(self._stop(started.wait()))

    async def _start(self) -> pki.Identity:
        identities = await self._in_thread(self._prepare)
        self._use(identities)
        if not self._waits_for_database:
            await self._open_store()
        await self._listen(ConsoleProxyServlet(self._answers, self._verifier, self._reactor))
        self._renewal.start(_DAY_SECONDS, now=False)
        self._opening = Deferred.fromCoroutine(self._open_and_watch())
        self._opening.addErrback(self._say_broken)
        return identities.proxy

    def _prepare(self) -> TicketIdentities:
        """In a thread: all that waits for the disk, or computes long."""
        # First: what follows is for one process at a time.
        self._take_address()
        return self._read_identities()

    def _read_identities(self) -> TicketIdentities:
        """In a thread."""
        return ticket_identities(self._config.state_directory, utc_now(self._reactor))

    async def _renew(self) -> None:
        try:
            self._use(await self._in_thread(self._read_identities))
        except VMConsoleError as error:
            self._log.error("{reason} The next try is tomorrow.", reason=str(error))
        except Exception:
            # It would end the LoopingCall.
            self._log.failure("Renewing the ticket certificates")

    def _use(self, identities: TicketIdentities) -> None:
        self._identities = identities
        self._trust()

    def _trust(self) -> None:
        if self._identities is not None:
            own = self._identities.authority.certificate
            former = self._identities.former
            self._verifier.trust([own, *former, *self.files.ticket_authorities])

    async def _open_store(self) -> None:
        done = await self._in_thread(self._store.open)
        if done:
            self._log.info("{done}", done=done)
        self._open = True

    async def _open_and_watch(self) -> None:
        tries = 0
        while not self._open:
            try:
                await self._open_store()
            except StoreError as error:
                # It may be made good on the server, by whoever runs that one.
                self._log.error("The embedded engine waits: {reason}", reason=str(error))
                await deferLater(self._reactor, _delay(tries))
                tries += 1
        self._watch.start()
        self._poll.clock = self._reactor
        self._polling = self._poll.start(_POLL_SECONDS)
        self._polling.addErrback(self._say_broken)

    def _take_address(self) -> None:
        # The kernel drops the lock with its process, and not sooner: who holds it may remove
        # the socket that a killed one left.
        path = self._address.path
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            self._lock = lock
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.is_socket():
                path.unlink()
        except BlockingIOError:
            raise EngineError(
                f"Another vmconsole listens on {path}: stop it, or give this one another "
                "state.directory."
            ) from None
        except OSError as error:
            raise EngineError(f"{path} cannot be listened on: {error.strerror}.") from error

    async def _listen(self, servlet: ConsoleProxyServlet) -> None:
        path, mode = self._address
        endpoint = UNIXServerEndpoint(self._reactor, str(path), mode=mode, wantPID=False)
        try:
            self._ports.append(await endpoint.listen(make_site(servlet, self._reactor)))
        except CannotListenError as error:
            reason = getattr(error.socketError, "strerror", None) or error.socketError
            raise EngineError(f"{path} cannot be listened on: {reason}.") from error
        if self._https is not None:
            site = make_site(servlet, self._reactor, _CONNECTIONS)
            port = await listen_https(self._https, site, lambda: self.files.server, self._reactor)
            self._ports.append(port)
            self._log.info("The engine serves HTTPS on {address}", address=_shown(port.getHost()))

    async def _stop(self, started: Deferred[pki.Identity]) -> None:
        # What failed was told by _say_failed.
        await started.addErrback(lambda _: None)
        self._opening.cancel()
        for looking in (self._poll, self._renewal):
            if looking.running:
                looking.stop()
        self._watch.stop()
        ports, self._ports = self._ports, []
        for port in ports:
            await maybeDeferred(port.stopListening)
        self._identities = None
        self._open = False
        threads, self._threads = self._threads, None
        if threads is not None:
            ended: Deferred[None] = Deferred()
            # It joins the threads, of which one may hang.
            Thread(target=self._end, args=[threads, ended], daemon=True).start()
            await ended.addTimeout(_STOPPING, self._reactor, lambda _result, _limit: None)
        # A look that was under way is over, too, unless it hangs.
        lock, self._lock = self._lock, None
        if lock is not None:
            os.close(lock)

    def _end(self, threads: DaemonThreadPool, ended: Deferred[None]) -> None:
        """In a thread."""
        threads.stop()
        self._store.close()

        def tell() -> None:
            if not ended.called:
                ended.callback(None)

        self._reactor.callFromThread(tell)

    def _say_failed(self, failure: Failure) -> None:
        if isinstance(failure.value, VMConsoleError):
            self._log.critical("The embedded engine did not start: {error}", error=failure.value)
        else:
            self._log.failure("The embedded engine did not start", failure)

    def _say_broken(self, failure: Failure) -> None:
        if not failure.check(CancelledError):
            self._log.failure("Looking at the embedded engine's database", failure)

    def _in_store(self, function: Callable[[], T]) -> Deferred[T]:
        if not self._open:
            return fail(StoreUnavailable("The database of the embedded engine is not open."))
        return self._in_thread(function)

    def _in_thread(self, function: Callable[[], T]) -> Deferred[T]:
        if self._threads is None:
            return fail(EngineUnreachable("The embedded engine is not running."))
        return deferToThreadPool(self._reactor, self._threads, function)


def _shown(address: IAddress) -> str:
    if isinstance(address, IPv4Address | IPv6Address):
        return f"{address.host}, port {address.port}"
    return str(address)
