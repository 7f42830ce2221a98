"""``pki``: certificates for libvirt's TLS, and for proxies on other machines."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from ipaddress import ip_address
from pathlib import Path

import click
from cryptography import x509

from vmconsole.cli.certificates import (
    Files,
    Issuer,
    authority_in,
    refuse_existing,
    refuse_half,
    write,
)
from vmconsole.cli.common import refuse_remote, with_config
from vmconsole.cli.complete import completes, host_names
from vmconsole.config import Config
from vmconsole.engine.embedded.identity import ticket_authority
from vmconsole.engine.embedded.listen import serves_https
from vmconsole.errors import ConfigError
from vmconsole.pki import Identity, alternative_names, make_authority
from vmconsole.text import printable

_AUTHORITY = "vmconsole hosts CA"
_PROXY = "vmconsole proxy"
_LABEL = "[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_DNS_NAME = re.compile(rf"(?=.{{1,253}}\Z)(?:{_LABEL}\.)*(?![0-9]+\Z){_LABEL}")
# With what stands before it, it is a common name, which has at most 64 characters.
_TICKET_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,47}")

_renew_option = click.option(
    "--renew", is_flag=True, help="Replace the certificate, and its key, that is there already."
)


@click.group()
def pki() -> None:
    """Certificates for libvirt's TLS, from a CA of its own, and for other proxies.

    They are kept in hosts.pki of the configuration, or else in the state directory's folder pki.
    Begin with `vmconsole pki init`. A certificate is valid for 825 days, the CA for 10 years.
    """


@pki.command("init")
@with_config
def pki_init(config: Config) -> None:
    """Make the CA that issues the certificates of hosts, and the proxy's.

    Whoever has its key, cakey.pem, can pose as any host: keep it here, or move it to a safe place.
    """
    files = Files.of_authority(_directory(config))
    refuse_half(files)
    for path in files:
        if os.path.lexists(path):
            raise ConfigError(
                f"{path} exists already, and a CA is never overwritten: every certificate that "
                "it issued would be void."
            )
    identity = make_authority(_AUTHORITY, datetime.now(UTC))
    write(files, identity)
    click.echo(f"Made a CA, {_end(identity)}: {files.certificate}, {files.key}")
    click.echo("Next: vmconsole pki host NAME for each host, vmconsole pki proxy")


@pki.command("host")
@click.argument(
    "names", nargs=-1, required=True, metavar="NAME...", shell_complete=completes(host_names)
)
@_renew_option
@with_config
def pki_host(config: Config, names: Sequence[str], renew: bool) -> None:
    """Make a server certificate for a host: for all NAMEs, DNS names and IP addresses.

    The files are in a folder named after the first of them. They are fit for HTTPS, too, as
    engine.embedded.certificate and engine.embedded.key. To renew, the first NAME is enough.

    For example: vmconsole pki host node1.example.com node1 10.0.0.1
    """
    checked = list(dict.fromkeys(map(_checked_name, names)))
    directory = _directory(config)
    folder = directory / "hosts" / checked[0]
    files = Files(folder / "servercert.pem", folder / "serverkey.pem")
    now = datetime.now(UTC)
    authority = authority_in(directory, now)
    there = refuse_existing(files, now, renew)
    if there is not None and len(checked) == 1:
        checked = _names_of(there) or checked
    # A common name has at most 64 characters, and the names that count are elsewhere.
    common_name = checked[0] if len(checked[0]) <= 64 else checked[0].split(".")[0]
    identity = authority.issue(common_name, "server", checked)
    write(files, identity, authority.certificate)
    click.echo(f"Made a certificate for {', '.join(checked)}, {_end(identity)}.")
    click.echo("Copy to the host:")
    for name, target in (
        ("cacert.pem", "/etc/pki/CA/cacert.pem"),
        ("servercert.pem", "/etc/pki/libvirt/servercert.pem"),
        ("serverkey.pem", "/etc/pki/libvirt/private/serverkey.pem (mode 0600)"),
    ):
        click.echo(f"  {folder / name} -> {target}")
    click.echo(
        "Then, there: systemctl stop libvirtd; systemctl enable --now libvirtd-tls.socket\n"
        "(virtproxyd, virtproxyd-tls.socket where libvirt's daemons are separate). Guests run on."
    )


@pki.command("proxy")
@_renew_option
@with_config
def pki_proxy(config: Config, renew: bool) -> None:
    """Make the client certificate with which this proxy connects to the hosts."""
    directory = _directory(config)
    files = Files(directory / "clientcert.pem", directory / "clientkey.pem")
    now = datetime.now(UTC)
    authority = authority_in(directory, now)
    refuse_existing(files, now, renew)
    identity = authority.issue(_PROXY, "client")
    write(files, identity)
    click.echo(
        f"Made the proxy's certificate, CN={_PROXY}, {_end(identity)}: "
        f"{files.certificate}, {files.key}"
    )
    if not config.hosts.pki:
        click.echo('Set in vmconsole.toml, and restart the service:\n[hosts]\npki = "pki"')


@pki.command("ticket")
@click.argument("name", default="proxy")
@_renew_option
@with_config
def pki_ticket(config: Config, name: str, renew: bool) -> None:
    """Make a ticket certificate for a proxy on another machine, which asks this engine.

    NAME tells several apart. Whoever has such a certificate may ask for every user's keys and
    consoles. This engine has to listen on TCP for it, with a certificate (engine.embedded).
    """
    refuse_remote(config)
    https = serves_https(config)
    if not _TICKET_NAME.fullmatch(name):
        raise ConfigError(
            f"'{printable(name, 80)}' is no name for a proxy: at most 48 letters, digits, '.', "
            "'_', '-', the first one a letter, a digit or '_'."
        )
    folder = config.state_directory / "tickets"
    files = Files(folder / f"{name}.cer", folder / f"{name}.key")
    now = datetime.now(UTC)
    refuse_existing(files, now, renew)
    # Renewing it is the service's, which has it in its memory.
    own = ticket_authority(config.state_directory, now)
    authority = Issuer(own, now, "Restart the service, which makes a new one.")
    identity = authority.issue(f"{_PROXY} {name}", "ticket")
    write(files, identity)
    click.echo(f"Made a ticket certificate, {_end(identity)}: {files.certificate}, {files.key}")
    if config.engine.embedded.ticket_ca:
        path = config.path(config.engine.embedded.ticket_ca)
        click.echo(f"Certificates of engine.embedded.ticket_ca ({path}) are taken here, too.")
    if not https:
        click.echo(
            "First, here: engine.embedded.listen (such as tcp:8443), certificate and key, which "
            "`vmconsole pki host` makes."
        )
    port = config.engine.embedded.listen.split(":")[1] if https else ""
    click.echo(
        "Copy both into the other proxy's state directory, and there, as engine-ca.pem, the CA of "
        "engine.embedded.certificate. Set in its vmconsole.toml:\n"
        f'[engine]\nurl = "https://THIS-HOST:{port if port.isdigit() else "PORT"}/"\n'
        f'ca = "engine-ca.pem"\ncertificate = "{files.certificate.name}"\n'
        f'key = "{files.key.name}"'
    )


def _directory(config: Config) -> Path:
    return Path(config.hosts.pki or config.path("pki"))


def _checked_name(name: str) -> str:
    """A DNS name as it is, an IP address in its usual form. Raises ConfigError."""
    try:
        if "%" not in name:
            return str(ip_address(name))
    except ValueError:
        if _DNS_NAME.fullmatch(name):
            return name
    raise ConfigError(
        f"'{printable(name, 80)}' is no name for a host: a DNS name without wildcards is needed, "
        "or an IP address."
    )


def _names_of(certificate: x509.Certificate) -> list[str]:
    try:
        return alternative_names(certificate)
    except ValueError:
        return []


def _end(identity: Identity) -> str:
    return f"valid until {identity.certificate.not_valid_after_utc:%F}"
