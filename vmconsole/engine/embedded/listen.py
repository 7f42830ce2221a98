"""Where the embedded engine listens: the server's side and the client's read the same setting."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from twisted.internet.interfaces import IStreamServerEndpoint

from vmconsole.config import Config, EmbeddedEngine
from vmconsole.endpoints import server_endpoint
from vmconsole.errors import ConfigError

# What fits into sockaddr_un with its closing zero byte.
_LONGEST_PATH = 107
_HTTPS = ("tcp", "ssl", "systemd")


class UnixAddress(NamedTuple):
    """A unix socket, and the mode of its file."""

    path: Path
    mode: int


def unix_address(config: Config) -> UnixAddress:
    """The unix socket that our own proxy uses: there always is one. Raises ConfigError.

    It is that of ``engine.embedded.listen``, or the default one when that is for HTTPS.
    """
    if serves_https(config):
        return _unix_address(config, EmbeddedEngine().listen)
    return _unix_address(config, config.engine.embedded.listen)


def serves_https(config: Config) -> bool:
    """Whether ``engine.embedded.listen`` is for HTTPS. Raises ConfigError without its files."""
    settings = config.engine.embedded
    missing = [name for name in ("certificate", "key") if not getattr(settings, name)]
    if len(missing) == 1:
        [other] = {"certificate", "key"} - {*missing}
        raise ConfigError(
            f"engine.embedded.{missing[0]} is missing, which belongs to engine.embedded.{other}: "
            "name its PEM file."
        )
    https = settings.listen.partition(":")[0] in _HTTPS
    if https and missing:
        raise ConfigError(
            f"engine.embedded.listen = {settings.listen!r} is HTTPS, without which whoever is on "
            "the way could log in as anybody: engine.embedded.certificate and engine.embedded.key "
            "have to name PEM files. `vmconsole pki host NAME` makes some."
        )
    return https


def https_endpoint(reactor: Any, config: Config) -> IStreamServerEndpoint | None:
    """Where HTTPS is served; None: nowhere. Opens nothing. Raises ConfigError."""
    if not serves_https(config):
        return None
    text = config.engine.embedded.listen
    try:
        # TLS is ours to add: its certificates change.
        return server_endpoint(reactor, re.sub(r"^ssl:", "tcp:", text))
    except ValueError as error:
        raise ConfigError(
            f"engine.embedded.listen = {text!r} is no Twisted endpoint (tcp:8443, "
            f"tcp:8443:interface=127.0.0.1): {error}."
        ) from error


def _unix_address(config: Config, text: str) -> UnixAddress:
    kind, *arguments = [re.sub(r"\\(.)", r"\1", part) for part in re.split(r"(?<!\\):", text)]
    if kind != "unix" or not arguments:
        raise ConfigError(
            f"engine.embedded.listen = {text!r}: a unix socket is needed, such as "
            "unix:engine.sock:mode=600, or tcp:8443 for HTTPS."
        )
    path = config.path(arguments[0].removeprefix("address="))
    mode = 0o600
    for argument in arguments[1:]:
        match = re.fullmatch(r"mode=([0-7]{3,4})", argument)
        if match is None:
            raise ConfigError(f"engine.embedded.listen = {text!r}: only mode= may follow the path.")
        mode = int(match[1], 8)
    if len(bytes(path)) > _LONGEST_PATH:
        raise ConfigError(
            f"{path} is too long for a unix socket: give a shorter state.directory, or a shorter "
            "absolute path in engine.embedded.listen."
        )
    return UnixAddress(path, mode)
