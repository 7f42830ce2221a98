"""From the name of a host to a libvirt URI that may be used."""

from __future__ import annotations

import re
from ipaddress import IPv6Address
from urllib.parse import quote, urlsplit

from vmconsole.config import Hosts
from vmconsole.errors import ConfigError
from vmconsole.text import printable

# What an engine calls a host becomes a part of a URI: nothing that could end that part.
_HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,254}|\[[0-9A-Fa-f:.]+\]")
# test: is libvirt's own mock, which has domains and no consoles.
_SCHEMES = ("qemu", "qemu+tls", "qemu+unix", "test")


def host_uri(host: str, given: str, hosts: Hosts) -> str:
    """The URI of ``host``: the configuration's overrides, ``given``, the configuration's rule.

    Raises ConfigError when there is none, or none that may be used.
    """
    uri = hosts.overrides.get(host) or given or _from_rule(host, hosts.uri)
    return _with_pki(_checked(uri, host), hosts.pki)


def _from_rule(host: str, rule: str) -> str:
    if "{host}" not in rule:
        return rule
    return rule.replace("{host}", _checked_name(host))


def _checked_name(host: str) -> str:
    if not host:
        raise ConfigError("The VM stands on no host, or the engine does not tell which.")
    try:
        return f"[{IPv6Address(host)}]"
    except ValueError:
        pass
    if not _HOST.fullmatch(host):
        raise ConfigError(
            f"{printable(host)} is no name of a host: only letters, digits, '.', '-', '_' and "
            "':' are taken, and an IPv6 address."
        )
    return host


def _checked(uri: str, host: str) -> str:
    where = f"The URI {printable(uri)} of host {printable(host)}"
    try:
        parts = urlsplit(uri)
    except ValueError as error:
        raise ConfigError(f"{where} is none: {printable(str(error))}.") from error
    if not uri.isascii() or not uri.isprintable() or " " in uri:
        raise ConfigError(f"{where} has characters that no URI has; write them as %20 and so on.")
    if parts.scheme not in _SCHEMES:
        raise ConfigError(
            f"{where} cannot be used: only qemu+tls:, qemu: and qemu+unix: are. Transports that "
            "run a command or a shell (+ssh, +libssh, +libssh2, +ext) and +tcp are refused."
        )
    return uri


def _with_pki(uri: str, pki: str) -> str:
    parts = urlsplit(uri)
    # Without a transport, a URI that names a server goes over TLS.
    over_tls = parts.scheme == "qemu+tls" or (parts.scheme == "qemu" and parts.netloc)
    if not pki or not over_tls or re.search(r"(^|[&;])pkipath=", parts.query):
        return uri
    return f"{uri}{'&' if parts.query else '?'}pkipath={quote(pki)}"
