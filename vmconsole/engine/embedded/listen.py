"""Where the embedded engine listens: the server's side and the client's read the same setting."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from vmconsole.config import Config
from vmconsole.errors import ConfigError

# What fits into sockaddr_un with its closing zero byte.
_LONGEST_PATH = 107


class UnixAddress(NamedTuple):
    """A unix socket, and the mode of its file."""

    path: Path
    mode: int


def unix_address(config: Config) -> UnixAddress:
    """``engine.embedded.listen``, as Twisted's endpoint strings are. Raises ConfigError."""
    text = config.engine.embedded.listen
    kind, *arguments = [re.sub(r"\\(.)", r"\1", part) for part in re.split(r"(?<!\\):", text)]
    if kind != "unix" or not arguments:
        raise ConfigError(
            f"engine.embedded.listen = {text!r}: a unix socket is needed, such as "
            "unix:engine.sock:mode=600."
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
