"""The ways to an engine: HTTPS to a remote one, a unix socket to the embedded one."""

from __future__ import annotations

from http.cookiejar import DefaultCookiePolicy
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.serialization import Encoding
from treq.client import HTTPClient
from treq.cookies import IndexableCookieJar
from twisted.internet.endpoints import UNIXClientEndpoint
from twisted.internet.interfaces import (
    IReactorCore,
    IReactorTime,
    IReactorUNIX,
    IStreamClientEndpoint,
)
from twisted.internet.ssl import Certificate, trustRootFromCertificates
from twisted.logger import Logger
from twisted.web.client import URI, Agent, BrowserLikePolicyForHTTPS, HTTPConnectionPool
from twisted.web.iweb import IAgent, IAgentEndpointFactory
from zope.interface import implementer

from vmconsole.config import Config
from vmconsole.engine.client import Credentials, EngineClient
from vmconsole.engine.credentials import load_authorities, load_ticket_identity
from vmconsole.engine.embedded.listen import unix_address
from vmconsole.pki import Identity

_log = Logger()


def make_engine_client(
    reactor: IReactorCore, config: Config, credentials: Credentials | None = None
) -> EngineClient:
    """The client of the configured engine.

    ``credentials`` give what signs the tickets; None: the configured files. Reads files, opens
    no connection. Raises ConfigError.
    """
    if credentials is None:
        identity = load_ticket_identity(config)

        async def credentials() -> Identity:
            return identity

    return EngineClient(
        make_http_client(reactor, config),
        # Over the unix socket the name is only for the Host header.
        config.engine.url or "http://localhost/",
        credentials,
        IReactorTime(reactor),
        timeout=config.engine.timeout,
        cache_ttl=config.engine.cache_ttl,
        called="" if config.engine.url else "The embedded engine",
    )


def make_http_client(reactor: IReactorCore, config: Config) -> HTTPClient:
    """A treq client that reaches nothing but the configured engine. Raises ConfigError.

    Each request has a connection of its own: a kept one may end just when it is used again, and
    a POST is not simply repeated.
    """
    pool = _QuietPool(reactor, persistent=False)
    if config.engine.url:
        agent = Agent(reactor, _tls_policy(config), config.engine.timeout, pool=pool)
    else:
        endpoints = _UnixEndpoints(IReactorUNIX(reactor), unix_address(config).path)
        agent = Agent.usingEndpointFactory(reactor, endpoints, pool)
    return without_cookies(agent)


def without_cookies(agent: IAgent) -> HTTPClient:
    """A treq client that keeps and sends no cookies: the protocol has none."""
    jar = IndexableCookieJar(policy=DefaultCookiePolicy(allowed_domains=()))
    return HTTPClient(agent, cookiejar=jar)


def _tls_policy(config: Config) -> BrowserLikePolicyForHTTPS:
    if config.engine.url.startswith("http://"):
        _log.critical(
            "engine.url = {url} is not protected by TLS: whoever is on the way can log in as "
            "anybody. Use https://.",
            url=config.engine.url,
        )
    if not config.engine.ca:
        return BrowserLikePolicyForHTTPS()
    authorities = load_authorities("engine.ca", config.path(config.engine.ca))
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
