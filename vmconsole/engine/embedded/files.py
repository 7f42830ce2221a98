"""The embedded engine's files as they are now: for HTTPS, and whose tickets it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from typing import Any

from cryptography import x509

from vmconsole.config import Config
from vmconsole.engine.credentials import expiries, load_authorities
from vmconsole.engine.embedded.https import ServerCertificate, load_server_certificate
from vmconsole.engine.embedded.listen import serves_https
from vmconsole.threads import InThread
from vmconsole.watched import Expiry, Watched, WatchedFiles


class EmbeddedFiles(WatchedFiles):
    """``engine.embedded.certificate`` and ``key``, if it serves HTTPS, and ``ticket_ca``.

    Made, it has read them. Raises ConfigError when there is nothing good to begin with.
    """

    def __init__(
        self,
        reactor: Any,
        config: Config,
        changed: Callable[[], object] = lambda: None,
        in_thread: InThread | None = None,
    ) -> None:
        """``in_thread`` and ``changed`` are as for WatchedFiles."""
        settings = config.engine.embedded
        https = serves_https(config)
        self._certificate_path = config.path(settings.certificate)
        self._ca_path = config.path(settings.ticket_ca)
        self._pair: Watched[ServerCertificate | None] = Watched(
            {
                "engine.embedded.certificate": self._certificate_path,
                "engine.embedded.key": config.path(settings.key),
            }
            if https
            else {},
            lambda: load_server_certificate(config) if https else None,
            # The key follows from it: it is the pair's.
            lambda server: server and server.chain,
        )
        self._ticket_ca: Watched[Sequence[x509.Certificate]] = Watched(
            {"engine.embedded.ticket_ca": self._ca_path} if settings.ticket_ca else {},
            lambda: (
                tuple(load_authorities("engine.embedded.ticket_ca", self._ca_path))
                if settings.ticket_ca
                else ()
            ),
            lambda authorities: authorities,
        )
        super().__init__(reactor, (self._pair, self._ticket_ca), in_thread, changed)

    @property
    def server(self) -> ServerCertificate:
        """What HTTPS connections are made with now. There is one if it serves HTTPS."""
        assert self._pair.value is not None
        return self._pair.value

    @property
    def ticket_authorities(self) -> Sequence[x509.Certificate]:
        """Whose tickets are taken now, besides those of our own CA."""
        return self._ticket_ca.value

    def expiries(self, now: datetime) -> Iterator[Expiry]:
        """See WatchedFiles."""
        if self._pair.value is not None:
            chain = self._pair.value.chain
            yield from expiries("engine.embedded.certificate", self._certificate_path, chain, now)
        yield from expiries(
            "engine.embedded.ticket_ca", self._ca_path, self.ticket_authorities, now
        )
