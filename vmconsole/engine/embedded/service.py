"""The embedded engine as a service: its certificates, its database, its socket, its hosts."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, TypeVar

from twisted.application.service import Service
from twisted.internet.defer import Deferred, fail, maybeDeferred, succeed
from twisted.internet.endpoints import UNIXServerEndpoint
from twisted.internet.error import CannotListenError
from twisted.internet.interfaces import IListeningPort
from twisted.internet.task import LoopingCall
from twisted.internet.threads import deferToThreadPool
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.python.threadpool import ThreadPool
from twisted.web.server import Site

from vmconsole import pki
from vmconsole.config import Config
from vmconsole.engine.credentials import load_authorities
from vmconsole.engine.embedded.answers import Answers
from vmconsole.engine.embedded.database import database_url
from vmconsole.engine.embedded.identity import ticket_identities
from vmconsole.engine.embedded.inventory import Inventory
from vmconsole.engine.embedded.listen import unix_address
from vmconsole.engine.embedded.servlet import ConsoleProxyServlet, make_site
from vmconsole.engine.embedded.store import Store
from vmconsole.engine.embedded.watch import HostWatch
from vmconsole.engine.ticket import TicketVerifier
from vmconsole.errors import EngineError, EngineUnreachable, VMConsoleError
from vmconsole.flight import Flight
from vmconsole.interfaces import IDomainSource

T = TypeVar("T")

_POLL_SECONDS = 1.0
_THREADS = 4


class EmbeddedEngine(Service):
    """Serves the engine protocol on ``engine.embedded.listen``.

    ``source`` is told which hosts to watch, and tells what stands on them. startService only
    begins: ``ready`` says when requests are answered, or why they never will be.
    """

    _log = Logger()

    def __init__(self, reactor: Any, config: Config, source: IDomainSource) -> None:
        self._reactor = reactor
        self._config = config
        self._address = unix_address(config)
        self._store = Store(database_url(config), reactor.seconds)
        self._inventory = Inventory()
        self._answers = Answers(self._store, self._inventory, self._in_thread)
        self._watch = HostWatch(source, self._inventory)
        self._threads: ThreadPool | None = None
        self._started: Flight[pki.Identity] | None = None
        self._lock: int | None = None
        self._port: IListeningPort | None = None
        self._poll = LoopingCall(self._look_at_hosts)
        self._polling: Deferred[Any] = succeed(None)
        self._trouble = ""

    def ready(self) -> Deferred[pki.Identity]:
        """What our own proxy signs tickets with, once they are taken. Fails as the start did."""
        if self._started is None:
            return fail(EngineUnreachable("The embedded engine is not running."))
        return self._started.wait()

    async def credentials(self) -> pki.Identity:
        """For EngineClient: ``ready``. Raises EngineUnreachable."""
        try:
            return await self.ready()
        except VMConsoleError as error:
            raise EngineUnreachable(f"The embedded engine did not start: {error}") from error

    def startService(self) -> None:
        """See IService."""
        super().startService()
        self._threads = ThreadPool(0, _THREADS, "embedded engine")
        self._threads.start()
        self._started = Flight(Deferred.fromCoroutine(self._start()))
        self._started.wait().addErrback(self._say_failed)

    def stopService(self) -> Deferred[None]:
        """See IService. Fires when the socket is closed and all threads have ended."""
        super().stopService()
        started, self._started = self._started, None
        if started is None:
            return succeed(None)
        return Deferred.fromCoroutine(self._stop(started.wait()))

    async def _start(self) -> pki.Identity:
        now = datetime.fromtimestamp(self._reactor.seconds(), UTC)
        authorities, identity = await self._in_thread(lambda: self._prepare(now))
        verifier = TicketVerifier(authorities)
        servlet = ConsoleProxyServlet(self._answers, verifier, self._reactor)
        self._port = await self._listen(make_site(servlet, self._reactor))
        self._watch.start()
        self._poll.clock = self._reactor
        self._polling = self._poll.start(_POLL_SECONDS)
        self._polling.addErrback(lambda failure: self._log.failure("Looking at hosts", failure))
        return identity

    def _prepare(self, now: datetime) -> tuple[list[Any], pki.Identity]:
        """In a thread: all that waits for the disk, or computes long."""
        # First: what follows is for one process at a time.
        self._take_address()
        identities = ticket_identities(self._config.state_directory, now)
        authorities = [identities.authority.certificate]
        ticket_ca = self._config.engine.embedded.ticket_ca
        if ticket_ca:
            path = self._config.path(ticket_ca)
            authorities.extend(load_authorities("engine.embedded.ticket_ca", path))
        self._store.open()
        return authorities, identities.proxy

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

    async def _listen(self, site: Site) -> IListeningPort:
        path, mode = self._address
        endpoint = UNIXServerEndpoint(self._reactor, str(path), mode=mode, wantPID=False)
        try:
            port: IListeningPort = await endpoint.listen(site)
            return port
        except CannotListenError as error:
            reason = getattr(error.socketError, "strerror", None) or error.socketError
            raise EngineError(f"{path} cannot be listened on: {reason}.") from error

    async def _look_at_hosts(self) -> None:
        try:
            snapshot = await self._answers.snapshot()
        except VMConsoleError as error:
            # Once, not every second.
            if str(error) != self._trouble:
                self._log.error("The hosts are not known: {reason}", reason=str(error))
            self._trouble = str(error)
            return
        self._trouble = ""
        if self.running:
            self._watch.follow(snapshot.hosts)

    async def _stop(self, started: Deferred[pki.Identity]) -> None:
        # What failed was told by _say_failed.
        await started.addErrback(lambda _: None)
        if self._poll.running:
            self._poll.stop()
        # Also waits for a look that is under way.
        await self._polling
        self._watch.stop()
        port, self._port = self._port, None
        if port is not None:
            await maybeDeferred(port.stopListening)
        await self._in_thread(self._store.close)
        threads, self._threads = self._threads, None
        if threads is not None:
            threads.stop()
        lock, self._lock = self._lock, None
        if lock is not None:
            os.close(lock)

    def _say_failed(self, failure: Failure) -> None:
        if isinstance(failure.value, VMConsoleError):
            self._log.critical("The embedded engine did not start: {error}", error=failure.value)
        else:
            self._log.failure("The embedded engine did not start", failure)

    def _in_thread(self, function: Callable[[], T]) -> Deferred[T]:
        if self._threads is None:
            return fail(EngineUnreachable("The embedded engine is not running."))
        return deferToThreadPool(self._reactor, self._threads, function)
