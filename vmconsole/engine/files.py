"""A remote engine's files as they are now, and when certificates expire."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from cryptography import x509
from twisted.application.service import Service
from twisted.internet.defer import Deferred, succeed
from twisted.internet.task import LoopingCall
from twisted.logger import Logger

from vmconsole import pki
from vmconsole.clocks import utc_now
from vmconsole.config import Config
from vmconsole.engine.credentials import (
    HOST_CERTIFICATES,
    expiries,
    host_expiries,
    load_engine_authorities,
    load_ticket_identity,
)
from vmconsole.errors import ConfigError
from vmconsole.threads import InThread
from vmconsole.watched import (
    Expiry,
    Watched,
    WatchedFiles,
    look_failed,
    tell,
    threads_of,
)

_log = Logger()
_DAY_SECONDS = 86400.0


class EngineFiles(WatchedFiles):
    """``engine.certificate``, ``engine.key`` and ``engine.ca`` of a remote engine.

    Made, it has read them. Raises ConfigError when there is nothing good to begin with.
    """

    def __init__(self, reactor: Any, config: Config, in_thread: InThread | None = None) -> None:
        """``in_thread`` is as for WatchedFiles."""
        self._certificate_path = config.path(config.engine.certificate)
        self._ca_path = config.path(config.engine.ca)
        self._pair = Watched(
            {
                "engine.certificate": self._certificate_path,
                "engine.key": config.path(config.engine.key),
            },
            lambda: load_ticket_identity(config),
            # The key follows from it: it is the pair's.
            lambda identity: identity.certificate,
        )
        self._ca = Watched(
            {"engine.ca": self._ca_path} if config.engine.ca else {},
            lambda: tuple(load_engine_authorities(config)),
            lambda authorities: authorities,
        )
        super().__init__(reactor, (self._pair, self._ca), in_thread)

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

    def expiries(self, now: datetime) -> Iterator[Expiry]:
        """See WatchedFiles."""
        yield from expiries(
            "engine.certificate", self._certificate_path, [self.identity.certificate], now
        )
        yield from expiries("engine.ca", self._ca_path, self.authorities, now)


class ExpiryWatch(Service):
    """Logs at the start and once a day which certificates end within 30 days, or have ended.

    Those of ``files``, and those in ``hosts.pki``.
    """

    def __init__(
        self,
        reactor: Any,
        config: Config,
        files: Sequence[WatchedFiles],
        in_thread: InThread | None = None,
    ) -> None:
        """``in_thread`` is as for WatchedFiles."""
        self._reactor = reactor
        self._in_thread = in_thread or threads_of(reactor)
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
        return Deferred.fromCoroutine(self._look_at_all()).addErrback(look_failed)

    async def _look_at_all(self) -> None:
        now = utc_now(self._reactor)
        for files in self._files:
            tell(files.expiries(now))
        for path in self._host_paths:
            try:
                tell(await self._in_thread(partial(_expiries_of, path, now)))
            except ConfigError as error:
                _log.warn("{text}", text=str(error))


def _expiries_of(path: Path, now: datetime) -> list[Expiry]:
    return list(host_expiries(path, now))
