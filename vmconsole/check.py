"""What is wrong with a configuration, all of it, before anybody runs into it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from vmconsole.config import Config
from vmconsole.engine.check import Finding, check_engine
from vmconsole.engine.credentials import HOST_CERTIFICATES, host_expiries
from vmconsole.errors import ConfigError
from vmconsole.hypervisor.libvirt_uri import host_uri
from vmconsole.ssh.algorithms import choose_all_algorithms
from vmconsole.ssh.certificates import Certificate, moment
from vmconsole.ssh.factory import make_endpoint
from vmconsole.ssh.hostkeys import HostKeys, load_host_certificates, load_host_keys
from vmconsole.ssh.trust import (
    host_certificate_expiries,
    load_revocation_list,
    load_user_authorities,
)
from vmconsole.text import printable_bytes


def check(config: Config, now: datetime) -> Iterator[Finding]:
    """One Finding for each thing that is wrong. Reads files; asks nobody, and makes nothing."""
    yield from check_engine(config, now)
    yield from _check_ssh(config, now)
    yield from _check_hosts(config, now)


def _check_ssh(config: Config, now: datetime) -> Iterator[Finding]:
    for look in (_check_endpoints, load_user_authorities, load_revocation_list):
        try:
            look(config)
        except ConfigError as error:
            yield Finding(str(error))
    if not config.ssh.listen:
        # An engine alone needs no host keys.
        return
    try:
        keys = load_host_keys(config, make_missing=False)
        host_keys = HostKeys(keys, load_host_certificates(config, keys))
        choose_all_algorithms(config.ssh, host_keys.algorithms)
    except ConfigError as error:
        yield Finding(str(error))
        return
    for expiry in host_certificate_expiries(host_keys, now):
        yield Finding(expiry.text, fatal=False)
    for certificate in host_keys.certificates:
        for doubt in _doubts(certificate, now):
            yield Finding(
                f"ssh.host_certificates: {printable_bytes(certificate.id, 80)} {doubt}.",
                fatal=False,
            )


def _doubts(certificate: Certificate, now: datetime) -> Iterator[str]:
    """Why clients may not take a host's certificate that is in order."""
    if now.timestamp() < certificate.valid_after:
        yield f"is not valid before {moment(certificate.valid_after)}"
    if not certificate.principals:
        yield "names no host, and clients may refuse it (ssh-keygen -n HOSTNAME)"
    if certificate.critical_options:
        yield "has critical options, with which OpenSSH's client refuses it"


def _check_endpoints(config: Config) -> None:
    for description in config.ssh.listen:
        make_endpoint(None, description)


def _check_hosts(config: Config, now: datetime) -> Iterator[Finding]:
    for name in (*config.hosts.overrides, "host.example.com"):
        try:
            host_uri(name, "", config.hosts)
        except ConfigError as error:
            yield Finding(f"hosts: {error}")
    if config.hosts.pki:
        for name in (*HOST_CERTIFICATES, "clientkey.pem"):
            path = Path(config.hosts.pki, name)
            if not os.access(path, os.R_OK):
                yield Finding(f"hosts.pki: {path} cannot be read.")
            elif name in HOST_CERTIFICATES:
                yield from _check_expiry(path, now)


def _check_expiry(path: Path, now: datetime) -> Iterator[Finding]:
    try:
        for expiry in host_expiries(path, now):
            yield Finding(expiry.text, fatal=False)
    except ConfigError as error:
        # libvirt's TLS is another one than ours: it may read what we cannot.
        yield Finding(str(error), fatal=False)
