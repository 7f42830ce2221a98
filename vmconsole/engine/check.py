"""What is wrong with the engine's part of the configuration, before anybody runs into it."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from cryptography.x509 import Certificate

from vmconsole.config import Config
from vmconsole.engine.credentials import (
    expiries,
    load_authorities,
    load_engine_authorities,
    load_ticket_identity,
    ticket_certificate_problems,
)
from vmconsole.engine.embedded.database import Database, database_file, database_url
from vmconsole.engine.embedded.https import load_server_certificate
from vmconsole.engine.embedded.listen import https_endpoint, serves_https, unix_address
from vmconsole.engine.embedded.upgrade import newest_version, version
from vmconsole.errors import VMConsoleError
from vmconsole.pki import alternative_names, is_authority, issued_by
from vmconsole.text import printable


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
            yield from _check_embedded(config, now)
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


def _check_embedded(config: Config, now: datetime) -> Iterator[Finding]:
    settings = config.engine.embedded
    unix_address(config)
    if serves_https(config):
        https_endpoint(None, config)
        yield from _check_server(config, now)
    elif settings.certificate:
        yield Finding(
            f"engine.embedded.listen = {settings.listen!r}: engine.embedded.certificate is not "
            "used, which is for HTTPS: listen on tcp:8443, say.",
            fatal=False,
        )
    if settings.ticket_ca:
        path = config.path(settings.ticket_ca)
        authorities = load_authorities("engine.embedded.ticket_ca", path)
        yield from _check_ticket_authorities(path, authorities, now)
    yield from _check_database(database_url(config))


def _check_ticket_authorities(
    path: Path, certificates: Sequence[Certificate], now: datetime
) -> Iterator[Finding]:
    setting = "engine.embedded.ticket_ca"
    for certificate in certificates:
        subject = printable(certificate.subject.rfc4514_string())
        if not is_authority(certificate):
            yield Finding(
                f"{setting} ({path}): the certificate of {subject} is no CA's (basicConstraints): "
                "it counts for nothing there.",
                fatal=False,
            )
            continue
        if now < certificate.not_valid_before_utc:
            yield Finding(
                f"{setting} ({path}): the certificate of {subject} is valid only from "
                f"{certificate.not_valid_before_utc} on.",
                fatal=False,
            )
        for expiry in expiries(setting, path, [certificate], now):
            yield Finding(expiry.text, fatal=False)


def _check_server(config: Config, now: datetime) -> Iterator[Finding]:
    path = config.path(config.engine.embedded.certificate)
    chain = load_server_certificate(config).chain
    for expiry in expiries("engine.embedded.certificate", path, chain, now):
        yield Finding(expiry.text, fatal=expiry.expired)
    if now < chain[0].not_valid_before_utc:
        yield Finding(
            f"engine.embedded.certificate ({path}) is valid only from "
            f"{chain[0].not_valid_before_utc} on."
        )
    try:
        names = alternative_names(chain[0])
    except ValueError:
        names = []
    if not names:
        yield Finding(
            f"engine.embedded.certificate ({path}) has no subjectAltName, by which clients know "
            "the engine: have one issued with the names that stand in their engine.url.",
            fatal=False,
        )
    key = config.path(config.engine.embedded.key)
    if stat.S_IMODE(key.stat().st_mode) & 0o007:
        yield Finding(
            f"engine.embedded.key ({key}) can be read by others: chmod o-rwx it.", fatal=False
        )


def _check_database(url: str) -> Iterator[Finding]:
    file = database_file(url)
    if file is not None and not os.path.exists(file):
        # It is made at the first start.
        return
    database = Database(url)
    try:
        database.check()
        with database.reading() as connection:
            found = version(connection, "of engine.embedded.database")
    finally:
        database.close()
    if found and found != newest_version():
        yield Finding(
            f"The database has version {found}: the next start upgrades it to "
            f"{newest_version()}, and then an older vmconsole does not open it any more.",
            fatal=False,
        )


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
