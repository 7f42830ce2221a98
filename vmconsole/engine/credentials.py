"""The files that prove who we are to an engine, and who the engine is to us."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm

from vmconsole import pki
from vmconsole.config import Config
from vmconsole.errors import ConfigError
from vmconsole.text import printable
from vmconsole.watched import Expiry

# What libvirt wants in hosts.pki, and reads anew for each connection.
HOST_CERTIFICATES = ("cacert.pem", "clientcert.pem")

_EXPIRES_SOON = timedelta(days=30)
_CURES = {
    "engine.certificate": "Have the engine's CA issue a new one, and put it into this file",
    "engine.ca": "Put the engine's new CA certificate into this file",
    "engine.embedded.certificate": "Put a new one into this file, and its key into "
    "engine.embedded.key",
    "engine.embedded.ticket_ca": "Put the CA's new certificate into this file",
    "hosts.pki": "Put a new one into this file",
}


def load_ticket_identity(config: Config) -> pki.Identity:
    """``engine.certificate`` with ``engine.key``. Raises ConfigError, which names the file."""
    certificate = config.path(config.engine.certificate)
    key = config.path(config.engine.key)
    for setting, path in (("engine.certificate", certificate), ("engine.key", key)):
        read_file(setting, path)
    try:
        identity = pki.Identity.load(certificate, key)
        pair = identity.is_pair()
    except (ValueError, TypeError, OSError, UnsupportedAlgorithm) as error:
        raise ConfigError(
            f"engine.certificate ({certificate}) or engine.key ({key}) is no PEM file with an RSA "
            "certificate, or RSA private key without a passphrase."
        ) from error
    if not pair:
        raise ConfigError(
            f"engine.key ({key}) is not the key of engine.certificate ({certificate})."
        )
    return identity


def load_engine_authorities(config: Config) -> Sequence[x509.Certificate]:
    """``engine.ca``; nothing: the system's own count. Raises ConfigError, which names the file."""
    if not config.engine.ca:
        return ()
    return load_authorities("engine.ca", config.path(config.engine.ca))


def load_authorities(setting: str, path: Path) -> Sequence[x509.Certificate]:
    """The certificates in a PEM file, one at least. Raises ConfigError, which names ``setting``."""
    content = read_file(setting, path)
    try:
        certificates = x509.load_pem_x509_certificates(content)
    except ValueError as error:
        raise ConfigError(f"{setting} ({path}) has no certificate in PEM.") from error
    # A last one without an end is silently left out.
    if len(certificates) < content.count(b"-----BEGIN CERTIFICATE-----"):
        raise ConfigError(f"{setting} ({path}) is cut off within a certificate.")
    return certificates


def expiries(
    setting: str, path: Path, certificates: Sequence[x509.Certificate], now: datetime
) -> Iterator[Expiry]:
    """Those of the file's ``certificates`` that end within 30 days, or have ended."""
    for certificate in certificates:
        end = certificate.not_valid_after_utc
        if end - now <= _EXPIRES_SOON:
            expired = end < now
            yield Expiry(
                f"{setting} ({path}): the certificate of "
                f"{printable(certificate.subject.rfc4514_string())} "
                f"{'expired' if expired else 'expires'} on {end:%F}. "
                f"{_CURES[setting]}; no restart is needed.",
                expired,
            )


def host_expiries(path: Path, now: datetime) -> Iterator[Expiry]:
    """The same for a file in ``hosts.pki``. Raises ConfigError."""
    yield from expiries("hosts.pki", path, load_authorities("hosts.pki", path), now)


def ticket_certificate_problems(certificate: x509.Certificate, now: datetime) -> list[str]:
    """Why an engine would refuse tickets signed with this certificate, as far as it shows."""
    problems = []
    if now < certificate.not_valid_before_utc:
        problems.append(f"it is valid from {certificate.not_valid_before_utc} on")
    if now > certificate.not_valid_after_utc:
        problems.append(f"it expired at {certificate.not_valid_after_utc}")
    if certificate.subject == certificate.issuer:
        problems.append("it is self-signed: the engine's CA has to issue it")
    try:
        usages = pki.extended_key_usages(certificate)
    except ValueError:
        problems.append("its extensions cannot be read")
    else:
        if usages is None or pki.TICKET_OID not in usages:
            problems.append(f"its extended key usage lacks {pki.TICKET_OID.dotted_string}")
    return problems


def read_file(setting: str, path: Path) -> bytes:
    """What is in it. Raises ConfigError, which names ``setting``."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{setting} ({path}) cannot be read: {error.strerror}.") from error
