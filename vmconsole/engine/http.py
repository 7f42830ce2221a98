"""The ways to an engine: HTTPS to a remote one, a unix socket to the embedded one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from http.cookiejar import DefaultCookiePolicy
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from treq.client import HTTPClient
from treq.cookies import IndexableCookieJar
from twisted.internet.endpoints import UNIXClientEndpoint
from twisted.internet.interfaces import (
    IOpenSSLClientConnectionCreator,
    IReactorCore,
    IReactorTime,
    IReactorUNIX,
    IStreamClientEndpoint,
)
from twisted.internet.ssl import Certificate, trustRootFromCertificates
from twisted.logger import Logger
from twisted.web.client import URI, Agent, BrowserLikePolicyForHTTPS, HTTPConnectionPool
from twisted.web.iweb import IAgent, IAgentEndpointFactory, IPolicyForHTTPS
from zope.interface import implementer

from vmconsole.config import Config
from vmconsole.engine.client import Credentials, EngineClient
from vmconsole.engine.credentials import load_engine_authorities, load_ticket_identity
from vmconsole.engine.embedded.listen import unix_address
from vmconsole.engine.replies import warn_if_slow
from vmconsole.pki import Identity

Authorities = Callable[[], Sequence[x509.Certificate]]

_log = Logger()


def make_engine_client(
    reactor: IReactorCore,
    config: Config,
    credentials: Credentials | None = None,
    authorities: Authorities | None = None,
) -> EngineClient:
    """The client of the configured engine.

    ``credentials`` give what signs the tickets, ``authorities`` whom TLS trusts at a connection;
    None: what the configured files hold now. Reads files, opens no connection. Raises ConfigError.
    """
    if credentials is None:
        identity = load_ticket_identity(config)

        async def credentials() -> Identity:
            return identity

    warn_if_slow(_log)
    return EngineClient(
        make_http_client(reactor, config, authorities),
        # Over the unix socket the name is only for the Host header.
        config.engine.url or "http://localhost/",
        credentials,
        IReactorTime(reactor),
        timeout=config.engine.timeout,
        called="" if config.engine.url else "The embedded engine",
    )


def make_http_client(
    reactor: IReactorCore, config: Config, authorities: Authorities | None = None
) -> HTTPClient:
    """A treq client that reaches nothing but the configured engine. Raises ConfigError.

    ``authorities`` is as for make_engine_client; when there are none, the system's own count.
    Each request has a connection of its own: a kept one may end just when it is used again, and
    a POST is not simply repeated.
    """
    pool = _QuietPool(reactor, persistent=False)
    if config.engine.url:
        _shout_without_tls(config.engine.url)
        if authorities is None:
            loaded = load_engine_authorities(config)

            def authorities() -> Sequence[x509.Certificate]:
                return loaded

        agent = Agent(reactor, _CurrentTrust(authorities), config.engine.timeout, pool=pool)
    else:
        endpoints = _UnixEndpoints(IReactorUNIX(reactor), unix_address(config).path)
        agent = Agent.usingEndpointFactory(reactor, endpoints, pool)
    return without_cookies(agent)


def without_cookies(agent: IAgent) -> HTTPClient:
    """A treq client that keeps and sends no cookies: the protocol has none."""
    jar = IndexableCookieJar(policy=DefaultCookiePolicy(allowed_domains=()))
    return HTTPClient(agent, cookiejar=jar)


def _shout_without_tls(url: str) -> None:
    if url.startswith("http://"):
        _log.critical(
            "engine.url = {url} is not protected by TLS: whoever is on the way can log in as "
            "anybody. Use https://.",
            url=url,
        )


@implementer(IPolicyForHTTPS)
class _CurrentTrust:
    """Trusts whom ``authorities`` name when a connection is made; the system's when none."""

    def __init__(self, authorities: Authorities) -> None:
        self._authorities = authorities
        self._trusted: tuple[x509.Certificate, ...] = ()
        self._policy = BrowserLikePolicyForHTTPS()

    def creatorForNetloc(self, hostname: bytes, port: int) -> IOpenSSLClientConnectionCreator:
        authorities = tuple(self._authorities())
        if authorities != self._trusted:
            self._policy = _trusting(authorities)
            self._trusted = authorities
        return self._policy.creatorForNetloc(hostname, port)


def _trusting(authorities: Sequence[x509.Certificate]) -> BrowserLikePolicyForHTTPS:
    if not authorities:
        return BrowserLikePolicyForHTTPS()
    return BrowserLikePolicyForHTTPS(
        trustRootFromCertificates(
            [Certificate.loadPEM(each.public_bytes(Encoding.PEM)) for each in authorities]
        )
    )


class _QuietPool(HTTPConnectionPool):
    """Without two lines in the log for each request."""

    def _factory(self, *arguments: Any) -> Any:  # type: ignore[override]
        factory = HTTPConnectionPool._factory(*arguments)
        factory.noisy = False
        return factory


@implementer(IAgentEndpointFactory)
class _UnixEndpoints:
    """All roads lead to one unix socket."""

    def __init__(self, reactor: IReactorUNIX, path: Path) -> None:
        self._reactor = reactor
        self._path = path

    def endpointForURI(self, uri: URI) -> IStreamClientEndpoint:
        return UNIXClientEndpoint(self._reactor, str(self._path))
