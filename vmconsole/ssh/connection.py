"""The ssh-connection service: session channels only, and windows that hold clients back."""

from __future__ import annotations

import struct
from typing import Any

from twisted.conch.ssh import connection
from twisted.conch.ssh.common import NS, getNS

from vmconsole.ssh.logs import conch_logger


class ConsoleConnection(connection.SSHConnection):
    """RFC 4254 without forwarding of any kind."""

    transport: Any
    _log = conch_logger("vmconsole.ssh.conch")

    def ssh_CHANNEL_OPEN(self, packet: bytes) -> None:
        """Section 5.1: open a session, or say which of them are open already."""
        kind, rest = getNS(packet)
        sender = rest[:4]
        if kind != b"session":
            self._refuse(sender, connection.OPEN_ADMINISTRATIVELY_PROHIBITED, b"only sessions here")
        elif len(self.channels) >= self.transport.avatar.max_sessions:
            self._refuse(sender, connection.OPEN_RESOURCE_SHORTAGE, b"too many sessions")
        else:
            super().ssh_CHANNEL_OPEN(packet)

    def _refuse(self, sender: bytes, reason: int, text: bytes) -> None:
        self.transport.sendPacket(
            connection.MSG_CHANNEL_OPEN_FAILURE,
            sender + struct.pack(">L", reason) + NS(text) + NS(b""),
        )

    def gotGlobalRequest(self, requestType: bytes, data: bytes) -> int:
        """Section 4: none is granted. To a keepalive, a failure is an answer too."""
        return 0

    def adjustWindow(self, channel: Any, bytesToAdd: int) -> None:
        """Let the client send more, unless the channel holds it back."""
        if not channel.held:
            super().adjustWindow(channel, bytesToAdd)
