"""Certificates as files: what is there already, and what is made."""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding

from vmconsole import pki
from vmconsole.errors import ConfigError

_DAYS = 825


class Files(NamedTuple):
    """Where a certificate is, and its key."""

    certificate: Path
    key: Path

    @classmethod
    def of_authority(cls, directory: Path) -> Files:
        """Those of the CA in the directory."""
        return cls(directory / "cacert.pem", directory / "cakey.pem")


class Issuer:
    """A CA as of ``now``. Raises ConfigError when it has expired."""

    def __init__(
        self,
        authority: pki.Identity,
        now: datetime,
        cure: str = "Move its files away, and make a new one with `vmconsole pki init`.",
    ) -> None:
        self.certificate = authority.certificate
        self._authority = authority
        self._now = now
        left = authority.certificate.not_valid_after_utc - now
        # What outlives its CA only seems to be valid.
        self._days = min(_DAYS, left.days)
        if self._days < 1:
            raise ConfigError(
                f"The CA {authority.certificate.subject.rfc4514_string()} is valid until "
                f"{authority.certificate.not_valid_after_utc:%F} only: it can issue nothing. {cure}"
            )

    def issue(
        self, common_name: str, usage: pki.Usage, names: list[str] | None = None
    ) -> pki.Identity:
        """A new certificate."""
        return pki.issue(self._authority, common_name, usage, self._now, names or (), self._days)


def authority_in(directory: Path, now: datetime) -> Issuer:
    """The CA that ``pki init`` made there. Raises ConfigError."""
    files = Files.of_authority(directory)
    if not any(map(os.path.lexists, files)):
        raise ConfigError(f"There is no CA in {directory}: make one with `vmconsole pki init`.")
    refuse_half(files)
    try:
        authority = pki.Identity.load(*files)
        is_pair = authority.is_pair()
    except OSError as error:
        raise ConfigError(f"{error.filename} cannot be read: {error.strerror}.") from error
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(
            f"{files.certificate} or {files.key} is no PEM file with a certificate, or an RSA "
            "private key without a passphrase."
        ) from error
    if not is_pair:
        raise ConfigError(f"{files.key} is not the key of {files.certificate}.")
    return Issuer(authority, now)


def refuse_half(files: Files) -> None:
    """Raises ConfigError for a CA's key without its certificate."""
    certificate, key = files
    if os.path.lexists(key) and not os.path.lexists(certificate):
        raise ConfigError(
            f"There is {key} without {certificate.name}, as an interrupted `vmconsole pki init` "
            "leaves it: it may be removed, unless it issued certificates; then put back "
            f"{certificate.name}, which the hosts have."
        )


def refuse_existing(files: Files, now: datetime, renew: bool) -> x509.Certificate | None:
    """The certificate that is to be renewed. Raises ConfigError when one is there otherwise."""
    there = next(filter(os.path.lexists, files), None)
    if there is None:
        return None
    certificate = _load(files.certificate)
    if not renew:
        until = ""
        if certificate is not None:
            end = certificate.not_valid_after_utc
            until = f", {'expired on' if end < now else 'valid until'} {end:%F}"
        raise ConfigError(f"{there} exists{until}: use --renew to replace it.")
    return certificate


def write(files: Files, identity: pki.Identity, authority: x509.Certificate | None = None) -> None:
    """Keep it in its files, and its CA's certificate beside it. Raises ConfigError."""
    directory = files.certificate.parent
    try:
        pki.make_private_directory(directory)
        identity.save(*files)
        if authority is not None:
            content = authority.public_bytes(Encoding.PEM)
            pki.write_public(directory / "cacert.pem", content)
    except OSError as error:
        raise ConfigError(
            f"The files in {directory} cannot be written: {error.strerror}."
        ) from error


def _load(path: Path) -> x509.Certificate | None:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError):
        return None
