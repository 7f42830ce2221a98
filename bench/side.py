"""What both sides have in common: a server that leads ssh to consoles."""

from __future__ import annotations

import socket
from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path

from bench.server import ADDRESS, Server


@dataclass(frozen=True)
class Access:
    """How ssh reaches a server."""

    user: str
    port: int
    key: Path
    known_hosts: Path


class Side(Server):
    """One of the two servers that are compared."""

    attached: bytes
    """How the words end that a user sees before the console."""
    leave: bytes
    """What a user types to leave."""
    access: Access

    @abstractmethod
    def configuration(self) -> str:
        """How it was set up, to be printed."""

    @abstractmethod
    def settle(self) -> None:
        """Wait until the server is done with a connection that has ended."""

    def answers(self) -> bool:
        try:
            with socket.create_connection((ADDRESS, self.access.port), timeout=1) as connection:
                return connection.recv(4) == b"SSH-"
        except OSError:
            return False
