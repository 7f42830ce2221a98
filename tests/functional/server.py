"""Our ssh server on a real port, in the test's own process: the doubles of tests/fakes.py stand
behind it, and its commands only move bytes."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, cast

from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
from twisted.conch.ssh.common import getNS
from twisted.conch.ssh.keys import Key
from twisted.cred.portal import Portal
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IHalfCloseableProtocol, IPushProducer
from twisted.internet.protocol import Protocol, connectionDone
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from tests.fakes import Engine, Events
from vmconsole.audit import Audit, Login
from vmconsole.config import Config
from vmconsole.engine.last_answer import Lifetimes
from vmconsole.engine.permissions import Permissions
from vmconsole.interfaces import AuthorizedKey, IWatch
from vmconsole.ssh.admission import Admission
from vmconsole.ssh.avatar import ConsoleRealm
from vmconsole.ssh.checker import EngineKeyChecker
from vmconsole.ssh.commands import Commands
from vmconsole.ssh.factory import ConsoleSSHFactory
from vmconsole.ssh.hostkeys import HostKeys
from vmconsole.ssh.session import SessionChannel
from vmconsole.ssh.transport import ConsoleTransport
from vmconsole.ssh.trust import Trust

# The lists of a KEXINIT (RFC 4253, section 7.1), in their order.
LISTS = ("kex", "host_key", "cipher", "cipher_back", "mac", "mac_back")


class WatchedTransport(ConsoleTransport):
    """Notes what the first key exchange agreed on."""

    def connectionMade(self) -> None:
        self.agreed: dict[str, str] = {}
        self.gone: Deferred[None] = Deferred()
        super().connectionMade()

    def connectionLost(self, reason: Failure | None = None) -> None:
        super().connectionLost(reason)
        self.gone.callback(None)

    def ssh_KEXINIT(self, packet: bytes) -> Any:
        result = super().ssh_KEXINIT(packet)
        if not self.agreed:
            theirs = getNS(packet[16:], len(LISTS))
            ours = getNS(self.ourKexInitPayload[17:], len(LISTS))
            for name, wanted, offered in zip(LISTS, theirs, ours, strict=False):
                known = offered.split(b",")
                both = [each for each in wanted.split(b",") if each in known]
                self.agreed[name] = both[0].decode() if both else ""
        return result


@implementer(IHalfCloseableProtocol)
class _Input(Protocol):
    """Gives each piece of a session's input to ``taken``; ``ended`` fires behind the last."""

    def __init__(self, taken: Callable[[bytes], object]) -> None:
        self.ended: Deferred[None] = Deferred()
        self._taken = taken

    def dataReceived(self, data: bytes) -> None:
        self._taken(data)

    def readConnectionLost(self) -> None:
        self.ended.callback(None)

    def writeConnectionLost(self) -> None:
        pass

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        pass


@implementer(IPushProducer)
class _Giver:
    """Writes a file on a session, as fast as that takes it; ``done`` fires behind the last."""

    def __init__(self, channel: SessionChannel, source: BinaryIO) -> None:
        self.done: Deferred[None] = Deferred()
        self._channel = channel
        self._source = source
        self._paused = True

    def resumeProducing(self) -> None:
        self._paused = False
        while not self._paused:
            data = self._source.read(16384)
            if not data:
                self.stopProducing()
                return
            self._channel.write(data)

    def pauseProducing(self) -> None:
        self._paused = True

    def stopProducing(self) -> None:
        self._paused = True
        self._channel.unregisterProducer()
        if not self.done.called:
            self.done.callback(None)


class ByteCommands:
    """In the place of Commands: ``give FILE``, ``flood`` until something is typed, ``digest`` of
    what comes in, ``echo``, ``exit N``, and, without a command, ``echo``."""

    async def run(self, channel: SessionChannel, login: Login, watch: IWatch, line: bytes) -> int:
        verb, _, rest = line.decode().partition(" ")
        return cast(int, await getattr(self, f"_{verb or 'echo'}")(channel, rest))

    async def _give(self, channel: SessionChannel, path: str) -> int:
        with open(path, "rb") as source:
            giver = _Giver(channel, source)
            channel.registerProducer(giver, True)
            giver.resumeProducing()
            await giver.done
        return 0

    async def _flood(self, channel: SessionChannel, rest: str) -> int:
        reader = _Input(lambda data: giver.stopProducing())
        with open("/dev/zero", "rb") as source:
            giver = _Giver(channel, source)
            channel.join(reader)
            channel.registerProducer(giver, True)
            giver.resumeProducing()
            await giver.done
        return 0

    async def _digest(self, channel: SessionChannel, rest: str) -> int:
        digest = hashlib.sha256()
        await self._read(channel, digest.update)
        channel.write(digest.hexdigest().encode() + b"\n")
        return 0

    async def _echo(self, channel: SessionChannel, rest: str) -> int:
        channel.write(b"ready;")
        await self._read(channel, channel.write)
        return 0

    async def _exit(self, channel: SessionChannel, status: str) -> int:
        return int(status)

    async def _read(self, channel: SessionChannel, taken: Callable[[bytes], object]) -> None:
        reader = _Input(taken)
        channel.join(reader)
        await reader.ended


class Server:
    """Listens on a port of the loopback; the owner of each key that it is given may log in."""

    def __init__(
        self,
        reactor: Any,
        config: Config,
        *public_lines: str,
        host_keys: HostKeys | None = None,
    ) -> None:
        self.connections: list[WatchedTransport] = []
        """All that there were, in the order in which they came."""
        self.events = Events()
        self._reactor = reactor
        keys = (Key.fromString(line.encode()) for line in public_lines)
        engine = Engine(*(AuthorizedKey("u-alice", "alice@internal", key.blob()) for key in keys))
        permissions = Permissions(
            engine,
            reactor,
            Lifetimes(5.0, 300.0),
            config.engine.recheck,
            placed_only=False,
            domain="internal",
        )
        audit = Audit(Logger("vmconsole.audit", observer=self.events))
        realm = ConsoleRealm(
            permissions,
            cast(Commands, ByteCommands()),
            audit,
            reactor,
            config.limits.sessions_per_connection,
        )
        trust = Trust(reactor, config)
        checker = EngineKeyChecker(permissions, config.ssh.users, trust, reactor)
        portal = Portal(realm, [checker])
        self._numbers = 0
        admission = Admission(reactor, config.limits, secrets.randbelow, lambda: None, lambda: None)
        self._factory = ConsoleSSHFactory(portal, config, audit, reactor, self._random, admission)
        if host_keys is None:
            host_keys = HostKeys(
                [
                    Key(ed25519.Ed25519PrivateKey.generate()),
                    Key(rsa.generate_private_key(65537, 3072)),
                ]
            )
        self._factory.use_host_keys(host_keys)
        self._factory.protocol = self._make_protocol
        self._host_lines = [key.public().toString("OPENSSH").decode() for key in host_keys.keys]

    def listen(self, known_hosts: Path) -> None:
        """Take connections, and write the host keys in OpenSSH's form."""
        self._port = self._reactor.listenTCP(0, self._factory, interface="127.0.0.1")
        known_hosts.write_text(
            "".join(f"[127.0.0.1]:{self.port} {line}\n" for line in self._host_lines)
        )

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._port.getHost().port)

    async def close(self) -> None:
        """Listen no more, and end what is open."""
        await self._port.stopListening()
        for connection in self.connections:
            connection.transport.abortConnection()
            await connection.gone

    def _make_protocol(self) -> WatchedTransport:
        made = WatchedTransport()
        self.connections.append(made)
        return made

    def _random(self, size: int) -> bytes:
        self._numbers += 1
        return self._numbers.to_bytes(size, "big")
