"""The ssh-connection service: session channels only, and windows that hold clients back."""

from __future__ import annotations

import struct
from typing import Any

from twisted.conch.ssh import connection
from twisted.conch.ssh.common import NS, getNS
from twisted.conch.ssh.transport import DISCONNECT_BY_APPLICATION
from twisted.internet.interfaces import IDelayedCall

from vmconsole.ssh.logs import conch_logger
from vmconsole.ssh.session import LAST_OUTPUT


class ConsoleConnection(connection.SSHConnection):
    """RFC 4254 without forwarding of any kind."""

    transport: Any
    _last_call: IDelayedCall | None = None
    _log = conch_logger("vmconsole.ssh.conch")

    def ssh_CHANNEL_OPEN(self, packet: bytes) -> None:
        """Section 5.1: open a session, or say which of them are open already."""
        kind, rest = getNS(packet)
        sender = rest[:4]
        revoked = self.transport.avatar.revoked
        if revoked:
            self._refuse(sender, connection.OPEN_ADMINISTRATIVELY_PROHIBITED, revoked.encode())
        elif kind != b"session":
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

    def end_all(self, reason: str) -> None:
        """End every session with ``reason``, and then the connection; a client that does not
        take its last output is not waited for longer than that output would be."""
        for channel in list(self.channels.values()):
            channel.revoke(reason)
        if self.channels:
            clock = self.transport.factory.clock
            self._last_call = clock.callLater(LAST_OUTPUT, self._end, reason)
        else:
            self._end(reason)

    def channelClosed(self, channel: Any) -> None:
        """The last session of a login that was revoked takes the connection with it."""
        super().channelClosed(channel)
        revoked = self.transport.avatar.revoked
        if revoked and not self.channels:
            self._end(revoked)

    def serviceStopped(self) -> None:
        """The connection is gone."""
        self._stop_waiting()
        super().serviceStopped()

    def _end(self, reason: str) -> None:
        self._stop_waiting()
        self.transport.sendDisconnect(DISCONNECT_BY_APPLICATION, reason.encode())

    def _stop_waiting(self) -> None:
        if self._last_call is not None and self._last_call.active():
            self._last_call.cancel()

    def gotGlobalRequest(self, requestType: bytes, data: bytes) -> int:
        """Section 4: none is granted. To a keepalive, a failure is an answer too."""
        return 0

    def adjustWindow(self, channel: Any, bytesToAdd: int) -> None:
        """Let the client send more, unless the channel holds it back."""
        if not channel.held:
            super().adjustWindow(channel, bytesToAdd)
