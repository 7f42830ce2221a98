"""What the embedded engine makes for itself at first start: a CA, and its ticket certificate."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from twisted.logger import Logger

from vmconsole import pki
from vmconsole.engine.credentials import ticket_certificate_problems
from vmconsole.errors import EngineError

_log = Logger()
# A certificate that ends sooner is made anew at start.
_RENEWED_BEFORE = timedelta(days=90)


class TicketIdentities(NamedTuple):
    """Who issues tickets' certificates here, and what our own proxy signs with."""

    authority: pki.Identity
    proxy: pki.Identity


def ticket_identities(directory: Path, now: datetime) -> TicketIdentities:
    """Read ``ticket-ca`` and ``ticket`` (.cer, .key) in ``directory``; make what is missing.

    Also what is half there, is no pair, or ends soon is made again. Waits (disk, RSA). Raises
    EngineError.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        authority = _load(directory, "ticket-ca")
        if authority is None or _ends_soon(authority, now):
            authority = pki.make_authority("vmconsole tickets", now)
            _save(authority, directory, "ticket-ca")
        proxy = _load(directory, "ticket")
        if proxy is None or _ends_soon(proxy, now) or not _is_good(proxy, authority, now):
            proxy = pki.issue(authority, "vmconsole proxy", "ticket", now)
            _save(proxy, directory, "ticket")
    except OSError as error:
        raise EngineError(
            f"The ticket certificates in {directory} cannot be made: {error.strerror}."
        ) from error
    return TicketIdentities(authority, proxy)


def _load(directory: Path, name: str) -> pki.Identity | None:
    try:
        identity = pki.Identity.load(directory / f"{name}.cer", directory / f"{name}.key")
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        _log.warn("{name} in {directory} is damaged", name=name, directory=str(directory))
        return None
    return identity if identity.is_pair() else None


def _save(identity: pki.Identity, directory: Path, name: str) -> None:
    _log.info("Making {name}.cer in {directory}", name=name, directory=str(directory))
    identity.save(directory / f"{name}.cer", directory / f"{name}.key")


def _ends_soon(identity: pki.Identity, now: datetime) -> bool:
    return identity.certificate.not_valid_after_utc - now < _RENEWED_BEFORE


def _is_good(proxy: pki.Identity, authority: pki.Identity, now: datetime) -> bool:
    return pki.issued_by(
        proxy.certificate, authority.certificate
    ) and not ticket_certificate_problems(proxy.certificate, now)
