"""The engine's certificates and key as their files are now, and when certificates expire."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from cryptography import x509
from twisted.application.service import Service
from twisted.internet.defer import Deferred, DeferredLock, succeed
from twisted.internet.task import LoopingCall
from twisted.internet.threads import deferToThreadPool
from twisted.logger import Logger
from twisted.python.failure import Failure

from vmconsole import pki
from vmconsole.config import Config
from vmconsole.engine.credentials import (
    HOST_CERTIFICATES,
    Expiry,
    expiries,
    host_expiries,
    load_engine_authorities,
    load_ticket_identity,
)
from vmconsole.errors import ConfigError

T = TypeVar("T")
Stamp = tuple[object, ...]

_log = Logger()
_LOOK_SECONDS = 5.0
_DAY_SECONDS = 86400.0


class InThread(Protocol):
    """Calls a function that waits where it holds up nobody."""

    def __call__(self, function: Callable[[], T], /) -> Deferred[T]:
        """What it returns."""


class EngineFiles(Service):
    """``engine.certificate``, ``engine.key`` and ``engine.ca`` of a remote engine.

    Made, it has read them. Running, it looks every few seconds whether they changed, and takes
    what is whole, fits together, and was the same at two looks; until then what was read before
    stays in use, and the log says why. Raises ConfigError when there is nothing good to begin with.
    """

    def __init__(self, reactor: Any, config: Config, in_thread: InThread | None = None) -> None:
        """``in_thread`` runs what waits for the disk; None: in the reactor's threads."""
        self._reactor = reactor
        self._in_thread = in_thread or _threads_of(reactor)
        self._certificate_path = config.path(config.engine.certificate)
        self._ca_path = config.path(config.engine.ca)
        self._pair = _Watched(
            {
                "engine.certificate": self._certificate_path,
                "engine.key": config.path(config.engine.key),
            },
            lambda: load_ticket_identity(config),
            # The key follows from it: it is the pair's.
            lambda identity: identity.certificate,
        )
        self._ca = _Watched(
            {"engine.ca": self._ca_path} if config.engine.ca else {},
            lambda: tuple(load_engine_authorities(config)),
            lambda authorities: authorities,
        )
        self._one_at_a_time = DeferredLock()
        self._looking = LoopingCall(self._look, asked=False)
        self._looking.clock = reactor

    @property
    def identity(self) -> pki.Identity:
        """What signs tickets now."""
        return self._pair.value

    @property
    def authorities(self) -> Sequence[x509.Certificate]:
        """Whom TLS trusts now; nobody: the system's own CAs."""
        return self._ca.value

    async def credentials(self) -> pki.Identity:
        """For EngineClient: ``identity``."""
        return self.identity

    def reload(self) -> Deferred[None]:
        """Read all files now, and log what came of it. Takes also what changed only just now."""
        return self._look(asked=True)

    def expiries(self, now: datetime) -> Iterator[Expiry]:
        """Which certificates in use end soon, or have ended."""
        yield from expiries(
            "engine.certificate", self._certificate_path, [self.identity.certificate], now
        )
        yield from expiries("engine.ca", self._ca_path, self.authorities, now)

    def startService(self) -> None:
        """See IService."""
        super().startService()
        self._looking.start(_LOOK_SECONDS, now=False)

    def stopService(self) -> Deferred[None]:
        """See IService. Fires when no file is read any more."""
        super().stopService()
        if self._looking.running:
            self._looking.stop()
        return self._one_at_a_time.run(lambda: None)

    def _look(self, asked: bool) -> Deferred[None]:
        looked = self._one_at_a_time.run(lambda: Deferred.fromCoroutine(self._look_at_all(asked)))
        # An error would end the LoopingCall.
        return looked.addErrback(_failed)

    async def _look_at_all(self, asked: bool) -> None:
        watched: tuple[_Watched[Any], ...] = (self._pair, self._ca)
        changed = False
        for files in watched:
            sight = await self._in_thread(partial(files.look, asked))
            changed |= files.take(sight, asked)
        if changed:
            _tell(self.expiries(_now(self._reactor)))


class ExpiryWatch(Service):
    """Logs at the start and once a day which certificates end within 30 days, or have ended.

    Those of ``files``, which only a remote engine has, and those in ``hosts.pki``.
    """

    def __init__(
        self,
        reactor: Any,
        config: Config,
        files: EngineFiles | None,
        in_thread: InThread | None = None,
    ) -> None:
        """``in_thread`` is as for EngineFiles."""
        self._reactor = reactor
        self._in_thread = in_thread or _threads_of(reactor)
        self._files = files
        self._host_paths = [
            Path(config.hosts.pki, name) for name in HOST_CERTIFICATES if config.hosts.pki
        ]
        self._daily = LoopingCall(self._look)
        self._daily.clock = reactor
        self._looking: Deferred[Any] = succeed(None)

    def startService(self) -> None:
        """See IService."""
        super().startService()
        self._looking = self._daily.start(_DAY_SECONDS)

    def stopService(self) -> Deferred[Any]:
        """See IService. Fires when no file is read any more."""
        super().stopService()
        if self._daily.running:
            self._daily.stop()
        return self._looking

    def _look(self) -> Deferred[None]:
        # An error would end the LoopingCall.
        return Deferred.fromCoroutine(self._look_at_all()).addErrback(_failed)

    async def _look_at_all(self) -> None:
        now = _now(self._reactor)
        if self._files is not None:
            _tell(self._files.expiries(now))
        for path in self._host_paths:
            try:
                _tell(await self._in_thread(partial(_expiries_of, path, now)))
            except ConfigError as error:
                _log.warn("{text}", text=str(error))


class _Sight(NamedTuple, Generic[T]):
    """What one look saw; without a value and a problem there was no reason to read."""

    stamp: Stamp
    value: T | None = None
    problem: str = ""


class _Watched(Generic[T]):
    """Files that belong together: ``value`` is what ``load`` last made of them.

    Two values are the same when ``essence`` of them is. ``look`` is for a thread; ``take`` and
    ``value`` are not, and no two looks go on at a time.
    """

    def __init__(
        self,
        files: Mapping[str, Path],
        load: Callable[[], T],
        essence: Callable[[T], object],
    ) -> None:
        self._files = files
        self._load = load
        self._essence = essence
        # From before the reading: a change in the middle of it shows at the first look.
        self._taken = self._seen = self._stamp()
        self._refused: tuple[Stamp, str] | None = None
        self.value = load()

    def look(self, asked: bool) -> _Sight[T]:
        """See whether there is something to take; ``asked``: whatever was seen before."""
        stamp = self._stamp()
        known = stamp == self._taken and self._refused is None
        if not asked and (known or stamp != self._seen):
            return _Sight(stamp)
        value, problem = None, ""
        try:
            value = self._load()
        except ConfigError as error:
            problem = str(error)
        after = self._stamp()
        if after == stamp:
            return _Sight(stamp, value, problem)
        return _Sight(after, problem=f"{self} changed while being read." if asked else "")

    def take(self, sight: _Sight[T], asked: bool) -> bool:
        """Go by what a look saw, and log that. Whether there is a new value."""
        self._seen = sight.stamp
        if sight.problem:
            refused = (sight.stamp, sight.problem)
            if asked or refused != self._refused:
                _log.warn("{text} What was read before stays in use.", text=sight.problem)
            self._refused = refused
            return False
        if sight.value is None:
            return False
        was_refused = self._refused is not None
        self._refused = None
        self._taken = sight.stamp
        if self._essence(sight.value) != self._essence(self.value):
            self.value = sight.value
            _log.info("{files}: changed, and in use from now on.", files=str(self))
            return True
        if self._files and (was_refused or asked):
            _log.info("{files}: in order, and the same as before.", files=str(self))
        return False

    def _stamp(self) -> Stamp:
        return tuple(_stamp(path) for path in self._files.values())

    def __str__(self) -> str:
        return ", ".join(f"{setting} ({path})" for setting, path in self._files.items())


def _stamp(path: Path) -> Stamp:
    try:
        status = os.stat(path)
    except OSError as error:
        return (error.errno,)
    return (status.st_ino, status.st_size, status.st_mtime_ns)


def _expiries_of(path: Path, now: datetime) -> list[Expiry]:
    return list(host_expiries(path, now))


def _tell(found: Iterator[Expiry] | Sequence[Expiry]) -> None:
    for expiry in found:
        if expiry.expired:
            _log.error("{text}", text=expiry.text)
        else:
            _log.warn("{text}", text=expiry.text)


def _failed(failure: Failure) -> None:
    _log.failure("Looking at the certificates", failure)


def _now(reactor: Any) -> datetime:
    return datetime.fromtimestamp(reactor.seconds(), UTC)


def _threads_of(reactor: Any) -> InThread:
    # The pool is not there before it is needed: twistd forks in between.
    return lambda function: deferToThreadPool(reactor, reactor.getThreadPool(), function)
