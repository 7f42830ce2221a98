"""Holes that are opened in the server on purpose, to see that the harness finds each."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from twisted.conch.ssh.transport import MSG_IGNORE, MSG_UNIMPLEMENTED
from twisted.cred.checkers import ICredentialsChecker
from twisted.cred.credentials import ISSHPrivateKey
from zope.interface import implementer

from tests.fuzz import holes_crowd, holes_lives, holes_trust
from tests.fuzz.holes_crowd import with_connection
from tests.fuzz.keyring import PROVE, Known, sign
from tests.fuzz.world import World
from vmconsole.ssh.connection import ConsoleConnection
from vmconsole.ssh.transport import ConsoleTransport


class _Unguarded(ConsoleTransport):
    """Errors in packets are nobody's business."""

    def broken_packet(self, error: Exception) -> None:
        """See PacketTransport."""
        raise error


class _Boundless(ConsoleTransport):
    """Packets before the login may be as large as those after it."""

    def connectionMade(self) -> None:
        """See IProtocol."""
        super().connectionMade()
        self.max_packet = 1 << 24


class _Lingering(ConsoleTransport):
    """A timer of a connection goes on when that is gone."""

    def connectionLost(self, reason: Any = None) -> None:
        """See IProtocol."""
        super().connectionLost(reason)
        self.factory.clock.callLater(3600, self.abort)

    def abort(self) -> None:
        """There is nothing left to do."""


class _Immortal(ConsoleTransport):
    """Connections that ended are kept."""

    def connectionMade(self) -> None:
        """See IProtocol."""
        self.factory.__dict__.setdefault("kept", []).append(self)
        super().connectionMade()


class _Collecting(ConsoleTransport):
    """Something of each connection is kept."""

    def connectionMade(self) -> None:
        """See IProtocol."""
        self.factory.__dict__.setdefault("kept", []).append(bytes(65536))
        super().connectionMade()


class _Abrupt(ConsoleTransport):
    """No client is told why it has to go."""

    def sendDisconnect(self, reason: int, desc: bytes) -> None:
        """See SSHTransportBase."""
        self.close()


class _Miscounting(ConsoleTransport):
    """UNIMPLEMENTED names the packet that comes next."""

    def sendUnimplemented(self) -> None:
        """See SSHTransportBase."""
        self.sendPacket(MSG_UNIMPLEMENTED, struct.pack(">L", self.incomingPacketSequence))


class _Careless(ConsoleTransport):
    """Packets are handled after a DISCONNECT, too."""

    def sendDisconnect(self, reason: int, desc: bytes) -> None:
        """See SSHTransportBase."""
        super().sendDisconnect(reason, desc)
        self.ending = False

    def close(self) -> None:
        """See PacketTransport."""
        self.transport.loseConnection()


class _Crowded(ConsoleConnection):
    """As many sessions as anybody likes."""

    def serviceStarted(self) -> None:
        """See SSHService."""
        self.transport.avatar.max_sessions = 1000
        super().serviceStarted()


class _Remembering(ConsoleConnection):
    """Every request is kept."""

    def ssh_CHANNEL_REQUEST(self, packet: bytes) -> Any:
        """See SSHConnection."""
        self.__dict__.setdefault("requests", []).append([len(packet)])
        return super().ssh_CHANNEL_REQUEST(packet)


class _Hoarding(ConsoleConnection):
    """The data of requests for the whole connection are kept."""

    def ssh_GLOBAL_REQUEST(self, packet: bytes) -> None:
        """See SSHConnection."""
        self.__dict__.setdefault("data", bytearray()).extend(packet * 4)
        super().ssh_GLOBAL_REQUEST(packet)


class _Noisy(ConsoleConnection):
    """What every client does is an error in the log."""

    def ssh_CHANNEL_EOF(self, packet: bytes) -> None:
        """See SSHConnection."""
        self._log.error("the client has said all")
        super().ssh_CHANNEL_EOF(packet)


class _Touchy(ConsoleConnection):
    """Who does what the RFC allows is put out."""

    def ssh_CHANNEL_EOF(self, packet: bytes) -> None:
        """See SSHConnection."""
        raise ValueError("no more?")


class _Generous(ConsoleConnection):
    """Requests for the whole connection are granted, whatever they are about."""

    def gotGlobalRequest(self, requestType: bytes, data: bytes) -> int | tuple[int, bytes]:
        """See SSHConnection."""
        return super().gotGlobalRequest(requestType, data) if requestType == PROVE else 1


class _Mute(ConsoleConnection):
    """One kind of request is never answered."""

    def ssh_CHANNEL_REQUEST(self, packet: bytes) -> Any:
        """See SSHConnection."""
        return None if b"window-change" in packet else super().ssh_CHANNEL_REQUEST(packet)


class _Endless(ConsoleConnection):
    """One kind of request is answered for ever."""

    def ssh_CHANNEL_REQUEST(self, packet: bytes) -> Any:
        """See SSHConnection."""
        while b"endless" in packet:
            self.transport.sendPacket(MSG_IGNORE, bytes(4))
        return super().ssh_CHANNEL_REQUEST(packet)


class _Chatty(ConsoleConnection):
    """A client that opens its window gets twice of what it said."""

    def ssh_CHANNEL_WINDOW_ADJUST(self, packet: bytes) -> None:
        """See SSHConnection."""
        number, size = struct.unpack(">2L", packet[:8])
        super().ssh_CHANNEL_WINDOW_ADJUST(struct.pack(">2L", number, size // 2 * 4 & 0xFFFFFFFF))


class _Forgetful(ConsoleConnection):
    """Sessions are not ended with their connection."""

    def serviceStopped(self) -> None:
        """See SSHService."""


@implementer(ICredentialsChecker)
class _Credulous:
    """Whoever shows a key that is known has it: their signature is made for them."""

    credentialInterfaces = (ISSHPrivateKey,)

    def __init__(self, checker: Any, ring: dict[str, Known]) -> None:
        self._checker, self._ring = checker, ring

    def requestAvatarId(self, credentials: Any) -> Any:
        """See ICredentialsChecker."""
        for known in self._ring.values():
            # Of a security key more is signed than the message.
            if known.blob == credentials.blob and not known.kind.startswith(b"sk-"):
                if credentials.signature is not None:
                    made = sign(known, credentials.sigData, credentials.algName, "")
                    credentials.signature = made
        return self._checker.requestAvatarId(credentials)


def _with_transport(transport: type[ConsoleTransport]) -> Callable[[Any], World]:
    def make(ring: Any) -> World:
        world = World(ring)
        world.transport = transport
        return world

    return make


def _credulous(ring: Any) -> World:
    world = World(ring)
    portal = world.factory.portal
    portal.registerChecker(_Credulous(portal.checkers[ISSHPrivateKey], world.ring))
    return world


HOLES: dict[str, Callable[[Any], World]] = {
    "unguarded": _with_transport(_Unguarded),
    "boundless": _with_transport(_Boundless),
    "lingering": _with_transport(_Lingering),
    "careless": _with_transport(_Careless),
    "immortal": _with_transport(_Immortal),
    "collecting": _with_transport(_Collecting),
    "abrupt": _with_transport(_Abrupt),
    "miscounting": _with_transport(_Miscounting),
    "noisy": with_connection(_Noisy),
    "touchy": with_connection(_Touchy),
    "generous": with_connection(_Generous),
    "crowded": with_connection(_Crowded),
    "remembering": with_connection(_Remembering),
    "hoarding": with_connection(_Hoarding),
    "mute": with_connection(_Mute),
    "endless": with_connection(_Endless),
    "chatty": with_connection(_Chatty),
    "forgetful": with_connection(_Forgetful),
    "credulous": _credulous,
    **holes_crowd.HOLES,
    **holes_trust.HOLES,
    **holes_lives.HOLES,
}
"""What each is called -> how a server that has it is made."""
