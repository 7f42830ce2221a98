"""What is wrong with the engine's part of the configuration, before anybody runs into it."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from vmconsole.config import Config
from vmconsole.engine.credentials import (
    expiries,
    load_authorities,
    load_engine_authorities,
    load_ticket_identity,
    ticket_certificate_problems,
)
from vmconsole.engine.embedded.database import database_file, database_url
from vmconsole.engine.embedded.listen import unix_address
from vmconsole.engine.embedded.store import Store
from vmconsole.errors import VMConsoleError
from vmconsole.pki import issued_by


class Finding(NamedTuple):
    """One sentence; ``fatal`` when vmconsole cannot work like that."""

    text: str
    fatal: bool = True


def check_engine(config: Config, now: datetime) -> Iterator[Finding]:
    """What is wrong. Reads files, asks nobody; makes nothing."""
    yield from _check_state_directory(config.state_directory)
    try:
        if config.engine.url:
            yield from _check_remote(config, now)
        else:
            _check_embedded(config)
    except VMConsoleError as error:
        yield Finding(str(error))


def _check_remote(config: Config, now: datetime) -> Iterator[Finding]:
    if config.engine.url.startswith("http://"):
        yield Finding(
            f"engine.url = {config.engine.url}: without TLS, whoever is on the way can log in as "
            "anybody. Use https://.",
            fatal=False,
        )
    authorities = load_engine_authorities(config)
    for expiry in expiries("engine.ca", config.path(config.engine.ca), authorities, now):
        yield Finding(expiry.text, fatal=False)
    certificate = load_ticket_identity(config).certificate
    path = config.path(config.engine.certificate)
    for problem in ticket_certificate_problems(certificate, now):
        yield Finding(f"engine.certificate ({path}): {problem}.")
    for expiry in expiries("engine.certificate", path, [certificate], now):
        # That it has expired is among the problems.
        if not expiry.expired:
            yield Finding(expiry.text, fatal=False)
    if authorities and not any(issued_by(certificate, each) for each in authorities):
        yield Finding(
            "engine.certificate was not issued by engine.ca: that is right only when the engine's "
            "HTTPS certificate is from another CA than its own.",
            fatal=False,
        )


def _check_embedded(config: Config) -> None:
    unix_address(config)
    if config.engine.embedded.ticket_ca:
        load_authorities("engine.embedded.ticket_ca", config.path(config.engine.embedded.ticket_ca))
    url = database_url(config)
    file = database_file(url)
    if file is None or (os.access(file, os.R_OK) and file.stat().st_size):
        store = Store(url)
        store.open()
        store.close()


def _check_state_directory(directory: Path) -> Iterator[Finding]:
    existing = next(path for path in (directory, *directory.parents) if os.path.exists(path))
    if not existing.is_dir():
        yield Finding(f"{existing}, where state.directory should be, is no directory.")
    elif not os.access(existing, os.W_OK | os.X_OK):
        yield Finding(
            f"state.directory ({directory}) cannot be written by this user: run this as the user "
            "whom the service runs as."
        )
    elif existing == directory and stat.S_IMODE(directory.stat().st_mode) & 0o022:
        yield Finding(
            f"state.directory ({directory}) can be written by others: chmod go-w it.", fatal=False
        )
