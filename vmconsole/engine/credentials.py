"""The files that prove who we are to an engine, and who the engine is to us."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from cryptography import x509

from vmconsole import pki
from vmconsole.config import Config
from vmconsole.errors import ConfigError


def load_ticket_identity(config: Config) -> pki.Identity:
    """``engine.certificate`` with ``engine.key``. Raises ConfigError, which names the file."""
    certificate = config.path(config.engine.certificate)
    key = config.path(config.engine.key)
    for setting, path in (("engine.certificate", certificate), ("engine.key", key)):
        _read(setting, path)
    try:
        identity = pki.Identity.load(certificate, key)
    except (ValueError, TypeError, OSError) as error:
        raise ConfigError(
            f"engine.certificate ({certificate}) or engine.key ({key}) is no PEM file with an RSA "
            "certificate, or RSA private key without a passphrase."
        ) from error
    if not identity.is_pair():
        raise ConfigError(
            f"engine.key ({key}) is not the key of engine.certificate ({certificate})."
        )
    return identity


def load_authorities(setting: str, path: Path) -> Sequence[x509.Certificate]:
    """The CA certificates in a PEM file. Raises ConfigError, which names ``setting``."""
    content = _read(setting, path)
    try:
        return x509.load_pem_x509_certificates(content)
    except ValueError as error:
        raise ConfigError(f"{setting} ({path}) has no certificate in PEM.") from error


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


def _read(setting: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{setting} ({path}) cannot be read: {error.strerror}.") from error
