"""What the embedded engine makes for itself at first start: a CA, and its ticket certificate."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from twisted.logger import Logger

from vmconsole import pki
from vmconsole.engine.credentials import ticket_certificate_problems
from vmconsole.errors import EngineError

_log = Logger()
# A certificate that ends sooner is made anew at start.
_RENEWED_BEFORE = timedelta(days=90)
_BAD_FILE = (ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion)


class TicketIdentities(NamedTuple):
    """Who issues tickets' certificates here, and what our own proxy signs with.

    ``former`` are CAs of ours that were replaced because they ended soon, and are still valid:
    proxies on other machines have certificates of them.
    """

    authority: pki.Identity
    proxy: pki.Identity
    former: Sequence[x509.Certificate] = ()


def ticket_identities(directory: Path, now: datetime) -> TicketIdentities:
    """Read ``ticket-ca`` and ``ticket`` (.cer, .key) in ``directory``; make what is missing.

    Also what ends soon is made again, and our proxy's when anything is wrong with it. A CA that is
    damaged is an error. Waits (disk, RSA, others who do the same). Raises EngineError.
    """
    with _making(directory):
        authority = _authority(directory, now, renews=True)
        proxy = _proxy(directory)
        if proxy is None or _ends_soon(proxy, now) or not _is_good(proxy, authority, now):
            proxy = pki.issue(authority, "vmconsole proxy", "ticket", now)
            _save(proxy, directory, "ticket")
        return TicketIdentities(authority, proxy, _former(directory, now))


def ticket_authority(directory: Path, now: datetime) -> pki.Identity:
    """The CA alone, as it is, for who works beside a running engine; it is made when there is none.

    Otherwise as ticket_identities.
    """
    with _making(directory):
        return _authority(directory, now, renews=False)


@contextmanager
def _making(directory: Path) -> Iterator[None]:
    """Alone among the service and the commands beside it. Raises EngineError."""
    path = directory / "ticket-ca.lock"
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        pki.make_private_directory(directory)
        with suppress(FileExistsError):
            made = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                pki.give_to_owner_of(directory, made)
            finally:
                os.close(made)
        lock = os.open(path, flags)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)
    except OSError as error:
        raise EngineError(
            f"The ticket certificates in {directory} cannot be made: {error.strerror}."
        ) from error


def _authority(directory: Path, now: datetime, renews: bool) -> pki.Identity:
    certificate, key = _paths(directory, "ticket-ca")
    former = directory / "ticket-ca.former.cer"
    if not os.path.lexists(certificate):
        # There was none, or it was withdrawn with all that it issued: so are those before it. A
        # key alone is what a killed first start left.
        former.unlink(missing_ok=True)
    else:
        wrong = ""
        try:
            authority = pki.Identity.load(certificate, key)
            if not authority.is_pair():
                wrong = f"{key} is not the key of {certificate}"
        except FileNotFoundError as error:
            wrong = f"{error.filename} is missing"
        except _BAD_FILE:
            wrong = f"{certificate if _certificate_in(certificate) is None else key} is damaged"
        if not wrong and not (renews and _ends_soon(authority, now)):
            if now < authority.certificate.not_valid_before_utc:
                _log.warn("{path} is not valid yet: is the clock wrong?", path=str(certificate))
            return authority
        if not wrong:
            pki.write_public(former, certificate.read_bytes())
        elif not _is_same(certificate, former):
            # Whatever it issued would be void, on other machines.
            raise EngineError(
                f"{wrong}: restore it, or remove both files: then proxies on other machines need "
                "new certificates (vmconsole pki ticket --renew)."
            )
        # Else a renewal was killed between the new key and its certificate.
    authority = pki.make_authority("vmconsole tickets", now)
    _save(authority, directory, "ticket-ca")
    return authority


def _proxy(directory: Path) -> pki.Identity | None:
    try:
        identity = pki.Identity.load(*_paths(directory, "ticket"))
        return identity if identity.is_pair() else None
    except FileNotFoundError:
        return None
    except (OSError, *_BAD_FILE):
        _log.warn("ticket in {directory} is damaged", directory=str(directory))
        return None


def _former(directory: Path, now: datetime) -> Sequence[x509.Certificate]:
    path = directory / "ticket-ca.former.cer"
    if not path.exists():
        return ()
    certificate = _certificate_in(path)
    if certificate is None:
        _log.warn("{path} is damaged", path=str(path))
        return ()
    return (certificate,) if now <= certificate.not_valid_after_utc else ()


def _certificate_in(path: Path) -> x509.Certificate | None:
    """None: it is no whole certificate. Raises OSError."""
    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
        certificate.public_key()
    except _BAD_FILE:
        return None
    return certificate


def _is_same(one: Path, other: Path) -> bool:
    return other.exists() and one.exists() and one.read_bytes() == other.read_bytes()


def _paths(directory: Path, name: str) -> tuple[Path, Path]:
    return directory / f"{name}.cer", directory / f"{name}.key"


def _save(identity: pki.Identity, directory: Path, name: str) -> None:
    _log.info("Making {name}.cer in {directory}", name=name, directory=str(directory))
    identity.save(*_paths(directory, name))


def _ends_soon(identity: pki.Identity, now: datetime) -> bool:
    return identity.certificate.not_valid_after_utc - now < _RENEWED_BEFORE


def _is_good(proxy: pki.Identity, authority: pki.Identity, now: datetime) -> bool:
    return pki.issued_by(
        proxy.certificate, authority.certificate
    ) and not ticket_certificate_problems(proxy.certificate, now)
