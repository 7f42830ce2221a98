"""HTTPS to the embedded engine: its certificate, and TLS in front of its site."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from OpenSSL import SSL
from twisted.internet.error import CannotListenError
from twisted.internet.interfaces import (
    IAddress,
    IListeningPort,
    IOpenSSLServerConnectionCreator,
    IStreamServerEndpoint,
)
from twisted.internet.ssl import CertificateOptions
from twisted.protocols.tls import TLSMemoryBIOFactory, TLSMemoryBIOProtocol
from twisted.web.server import Site
from zope.interface import implementer

from vmconsole.config import Config
from vmconsole.engine.credentials import load_authorities, read_file
from vmconsole.errors import ConfigError, EngineError


class ServerCertificate(NamedTuple):
    """What the engine proves with who it is."""

    chain: Sequence[x509.Certificate]
    """Its own certificate, and after it those of the CAs between, if any."""
    context: SSL.Context
    """TLS 1.2 and 1.3, with the key; no client needs a certificate."""


def load_server_certificate(config: Config) -> ServerCertificate:
    """``engine.embedded.certificate`` with ``key``. Raises ConfigError, which names the file."""
    certificate_path = config.path(config.engine.embedded.certificate)
    key_path = config.path(config.engine.embedded.key)
    chain = tuple(load_authorities("engine.embedded.certificate", certificate_path))
    key_pem = read_file("engine.embedded.key", key_path)
    try:
        key: Any = load_pem_private_key(key_pem, None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(
            f"engine.embedded.key ({key_path}) is no PEM file with a private key without a "
            "passphrase."
        ) from error
    try:
        pair = chain[0].public_key() == key.public_key()
    except (ValueError, UnsupportedAlgorithm):
        pair = False
    if not pair:
        raise ConfigError(
            f"engine.embedded.key ({key_path}) is not the key of engine.embedded.certificate "
            f"({certificate_path}), whose own certificate has to be the first in its file."
        )
    try:
        # Its annotations are for pyOpenSSL's own types, which that deprecates.
        own, *others = cast(Any, chain)
        options = CertificateOptions(privateKey=key, certificate=own, extraCertChain=others)
        context = options.getContext()
    except (SSL.Error, TypeError, ValueError) as error:
        raise ConfigError(
            f"engine.embedded.certificate ({certificate_path}) cannot be used for TLS: "
            f"{_reason(error)}."
        ) from error
    # It would cost us much more than who asks for it.
    context.set_options(SSL.OP_NO_RENEGOTIATION)
    return ServerCertificate(chain, context)


async def listen_https(
    endpoint: IStreamServerEndpoint,
    site: Site,
    current: Callable[[], ServerCertificate],
    clock: Any,
) -> IListeningPort:
    """Serve ``site``; each connection has the certificate that is ``current`` when it is made.

    Raises EngineError.
    """
    try:
        port: IListeningPort = await endpoint.listen(
            _TLSFactory(_CurrentCertificate(current), False, site, clock)
        )
    except CannotListenError as error:
        reason = getattr(error.socketError, "strerror", None) or error.socketError
        raise EngineError(
            f"{error.interface or 'Any address'}, port {error.port}, cannot be listened on: "
            f"{reason}. See engine.embedded.listen."
        ) from error
    except (OSError, OverflowError) as error:
        raise EngineError(
            f"The engine cannot listen: {getattr(error, 'strerror', None) or error}. "
            "See engine.embedded.listen."
        ) from error
    return port


@implementer(IOpenSSLServerConnectionCreator)
class _CurrentCertificate:
    def __init__(self, current: Callable[[], ServerCertificate]) -> None:
        self._current = current

    def serverConnectionForTLS(self, protocol: TLSMemoryBIOProtocol) -> SSL.Connection:
        return SSL.Connection(self._current().context, None)


class _TLSFactory(TLSMemoryBIOFactory):
    def buildProtocol(self, address: IAddress | None) -> Any:
        # The site takes no more connections at times.
        wrapped = self.wrappedFactory.buildProtocol(address)
        return None if wrapped is None else self.protocol(self, wrapped)


def _reason(error: Exception) -> str:
    # OpenSSL's have a list of triples: library, function, reason.
    try:
        return str(error.args[0][-1][-1])
    except (IndexError, TypeError):
        return str(error)
