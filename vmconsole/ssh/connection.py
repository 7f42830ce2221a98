"""The ssh-connection service: session channels only, and windows that hold clients back."""

from __future__ import annotations

import struct
from typing import Any

from twisted.conch.ssh import connection
from twisted.conch.ssh.common import NS, getNS
from twisted.conch.ssh.transport import DISCONNECT_BY_APPLICATION
from twisted.internet.interfaces import IDelayedCall

from vmconsole.ssh.hostkeys_update import ANNOUNCE, PROVE, HostKeysUpdate
from vmconsole.ssh.logs import conch_logger
from vmconsole.ssh.packets import ProtocolError
from vmconsole.ssh.session import LAST_OUTPUT

# Bytes of the packets that a client takes. Each costs time, however small it is.
_LEAST_PACKET = 256


class ConsoleConnection(connection.SSHConnection):
    """RFC 4254 without forwarding of any kind."""

    transport: Any
    _last_call: IDelayedCall | None = None
    _host_keys: HostKeysUpdate | None = None
    _log = conch_logger("vmconsole.ssh.conch")

    def ssh_CHANNEL_OPEN(self, packet: bytes) -> None:
        """Section 5.1: open a session, or say which of them are open already."""
        kind, rest = getNS(packet)
        sender, _, packet_size = struct.unpack(">4s4sL", rest[:12])
        revoked = self.transport.avatar.revoked
        if revoked:
            self._refuse(sender, connection.OPEN_ADMINISTRATIVELY_PROHIBITED, revoked.encode())
        elif kind != b"session":
            self._refuse(sender, connection.OPEN_ADMINISTRATIVELY_PROHIBITED, b"only sessions here")
        elif packet_size < _LEAST_PACKET:
            self._refuse(sender, connection.OPEN_RESOURCE_SHORTAGE, b"larger packets are needed")
        else:
            self._open(sender, packet)

    def _open(self, sender: bytes, packet: bytes) -> None:
        counts, avatar = self.transport.factory.session_counts, self.transport.avatar
        count = len(self.channels)
        refusal = counts.refusal(avatar.login.user, count, avatar.max_sessions)
        if refusal is not None:
            self._refuse(sender, connection.OPEN_RESOURCE_SHORTAGE, refusal.encode())
            return
        super().ssh_CHANNEL_OPEN(packet)
        if len(self.channels) > count:
            counts.opened(avatar.login.user)

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
        if channel in self.channelsToRemoteChannel:
            self.transport.factory.session_counts.closed(self.transport.avatar.login.user)
        super().channelClosed(channel)
        revoked = self.transport.avatar.revoked
        if revoked and not self.channels:
            self._end(revoked)

    def _end(self, reason: str) -> None:
        if self._last_call is not None and self._last_call.active():
            self._last_call.cancel()
        self.transport.sendDisconnect(DISCONNECT_BY_APPLICATION, reason.encode())

    def serviceStarted(self) -> None:
        """Somebody is logged in: tell their client of all our host keys."""
        super().serviceStarted()
        transport = self.transport
        self._host_keys = HostKeysUpdate(transport.host_keys, transport.sessionID, transport.keyAlg)
        self.sendGlobalRequest(ANNOUNCE, self._host_keys.announcement())

    def gotGlobalRequest(self, requestType: bytes, data: bytes) -> int | tuple[int, bytes]:
        """Section 4: that we have our host keys is proved; else nothing is granted. To a
        keepalive, a failure is an answer too."""
        if requestType == PROVE and self._host_keys is not None:
            proof = self._host_keys.prove(data)
            return 0 if proof is None else (1, proof)
        return 0

    def ssh_CHANNEL_OPEN_CONFIRMATION(self, packet: bytes) -> None:
        """Section 5.1: an answer to what we never ask. Conch would take it for a channel of the
        client's, and forget that one with the other answer."""
        raise ProtocolError("an answer to what was not asked here")

    ssh_CHANNEL_OPEN_FAILURE = ssh_CHANNEL_OPEN_CONFIRMATION
    ssh_CHANNEL_SUCCESS = ssh_CHANNEL_FAILURE = ssh_CHANNEL_OPEN_CONFIRMATION

    def ssh_CHANNEL_REQUEST(self, packet: bytes) -> None:
        """Section 5.4. A channel that we have closed answers nothing more."""
        if not self.channels[struct.unpack(">L", packet[:4])[0]].localClosed:
            super().ssh_CHANNEL_REQUEST(packet)

    def ssh_CHANNEL_DATA(self, packet: bytes) -> None:
        """Section 5.2: no more than the client may send."""
        self._check_size(*struct.unpack(">2L", packet[:8]))
        super().ssh_CHANNEL_DATA(packet)

    def ssh_CHANNEL_EXTENDED_DATA(self, packet: bytes) -> None:
        """Likewise."""
        channel, _, size = struct.unpack(">3L", packet[:12])
        self._check_size(channel, size)
        super().ssh_CHANNEL_EXTENDED_DATA(packet)

    def _check_size(self, number: int, size: int) -> None:
        channel = self.channels[number]
        if size > channel.localWindowLeft or size > channel.localMaxPacket:
            raise ProtocolError("more data than the window has room for")

    def adjustWindow(self, channel: Any, bytesToAdd: int) -> None:
        """Let the client send more, unless the channel holds it back."""
        if not channel.held:
            super().adjustWindow(channel, bytesToAdd)
