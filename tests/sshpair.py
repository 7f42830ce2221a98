"""A Conch client and our server, joined in memory by iosim, on one task.Clock."""

from __future__ import annotations

import struct
from copy import copy
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ed25519
from msgspec.structs import replace
from twisted.conch.ssh import channel, connection, transport, userauth
from twisted.conch.ssh.common import NS, getNS
from twisted.conch.ssh.keys import Key
from twisted.conch.ssh.service import SSHService
from twisted.cred.portal import Portal
from twisted.internet.address import IPv4Address
from twisted.internet.defer import Deferred, maybeDeferred, succeed
from twisted.internet.interfaces import IDelayedCall
from twisted.internet.task import Clock
from twisted.logger import Logger
from twisted.test import iosim

from tests.fakes import Engine, Events, Guests
from vmconsole.audit import Audit
from vmconsole.config import SSH, Config
from vmconsole.config import Console as ConsoleSettings
from vmconsole.console.pool import ConsolePool
from vmconsole.engine.last_answer import Lifetimes
from vmconsole.engine.permissions import Permissions
from vmconsole.interfaces import AuthorizedKey, User
from vmconsole.ssh.admission import Admission
from vmconsole.ssh.avatar import ConsoleRealm
from vmconsole.ssh.checker import EngineKeyChecker
from vmconsole.ssh.commands import Commands
from vmconsole.ssh.factory import ConsoleSSHFactory
from vmconsole.ssh.hostkeys import HostKeys
from vmconsole.ssh.trust import Trust

HOST_KEY = Key(ed25519.Ed25519PrivateKey.generate())
ALICE = User(id="u-alice", name="alice@internal")
ALICE_KEY = Key(ed25519.Ed25519PrivateKey.generate())
# Seconds.
_FOR_EVER = 1e9
PTY = NS(b"xterm") + struct.pack(">4L", 80, 24, 0, 0) + NS(b"")


class ClientTransport(transport.SSHClientTransport):
    """Trusts the host, and starts the service that it was given once the line is secure."""

    def __init__(self, service: Any) -> None:
        self._first = service
        self.disconnected: tuple[int, bytes] | None = None

    def verifyHostKey(self, hostKey: bytes, fingerprint: bytes) -> Deferred[int]:
        return succeed(1)

    def connectionSecure(self) -> None:
        # Comes after each key exchange.
        if self.service is None:
            self.requestService(self._first)

    def receiveError(self, reasonCode: int, description: bytes) -> None:
        self.disconnected = (reasonCode, description)


class ClientConnection(connection.SSHConnection):
    """Notes when it is up, and opens no window that its channel holds shut."""

    up = False

    def adjustWindow(self, channel: Any, bytesToAdd: int) -> None:
        if not channel.reads_no_more:
            self.grant(channel, bytesToAdd)

    def grant(self, channel: Any, size: int) -> None:
        """Let the server send ``size`` bytes more."""
        super().adjustWindow(channel, size)

    def serviceStarted(self) -> None:
        self.up = True
        super().serviceStarted()


class ClientAuth(SSHService):
    """Sends what the test tells it to, and collects the answers."""

    name = b"ssh-userauth"

    def __init__(self, connection: ClientConnection) -> None:
        self.answers: list[int] = []
        self.banners: list[str] = []
        self._connection = connection

    def packetReceived(self, messageNum: int, packet: bytes) -> None:
        if messageNum == 53:
            self.banners.append(getNS(packet)[0].decode())
            return
        self.answers.append(messageNum)
        if messageNum == userauth.MSG_USERAUTH_SUCCESS:
            self.transport.setService(self._connection)

    def request(self, user: bytes, method: bytes, rest: bytes) -> None:
        self.transport.sendPacket(
            userauth.MSG_USERAUTH_REQUEST, NS(user) + NS(b"ssh-connection") + NS(method) + rest
        )

    def query(
        self, user: bytes, key: Key | None, algorithm: bytes = b"", blob: bytes = b""
    ) -> None:
        """Ask whether a key would do, or the certificate that is given as ``blob``."""
        name = algorithm or (getNS(blob)[0] if key is None else key.sshType())
        public = blob or key.public().blob()  # type: ignore[union-attr]
        self.request(user, b"publickey", b"\x00" + NS(name) + NS(public))

    def sign(
        self,
        user: bytes,
        key: Key,
        algorithm: bytes = b"",
        signed_with: Key | None = None,
        signature_algorithm: bytes = b"",
        blob: bytes = b"",
    ) -> None:
        """Log in with a key, or with the certificate that is given as ``blob``."""
        name = algorithm or key.sshType()
        rest = b"\x01" + NS(name) + NS(blob or key.public().blob())
        message = (
            NS(self.transport.sessionID)
            + bytes((userauth.MSG_USERAUTH_REQUEST,))
            + NS(user)
            + NS(b"ssh-connection")
            + NS(b"publickey")
            + rest
        )
        signature = (signed_with or key).sign(message, signature_algorithm or name)
        self.request(user, b"publickey", rest + NS(signature))


class ClientChannel(channel.SSHChannel):
    """Collects what the server sends on a session."""

    name = b"session"

    def __init__(self, window: int = 1 << 20, reads_no_more: bool = False) -> None:
        super().__init__(localWindow=window)
        self.reads_no_more = reads_no_more
        self.output = b""
        self.error = b""
        self.status: int | None = None
        self.output_ended = False
        self.gone = False
        self.open_failed = False

    def openFailed(self, reason: Any) -> None:
        self.open_failed = True

    def channelOpen(self, data: bytes) -> None:
        pass

    def dataReceived(self, data: bytes) -> None:
        self.output += data

    def extReceived(self, dataType: int, data: bytes) -> None:
        self.error += data

    def eofReceived(self) -> None:
        self.output_ended = True

    def request_exit_status(self, data: bytes) -> None:
        (self.status,) = struct.unpack(">L", data)

    def closed(self) -> None:
        self.gone = True


class SSHPair:
    """Our server with doubles behind its seams, and a client that the test plays."""

    def __init__(
        self,
        config: Config | None = None,
        recordings: Any = None,
        host_keys: HostKeys | None = None,
    ) -> None:
        self.clock = Clock()
        # A guest that is left is closed at once, so that a test sees it.
        self.config = config or Config(console=ConsoleSettings(linger=0.0))
        # Conch's client knows none of the packets that are offered by default.
        known = {"ciphers": ("aes256-ctr",), "macs": ("hmac-sha2-256",)}
        chosen: dict[str, Any] = {
            name: getattr(self.config.ssh, name) or known[name] for name in known
        }
        # Time passes in leaps here, in which a client cannot answer.
        for name in ("keepalive", "rekey_seconds"):
            if getattr(self.config.ssh, name) == getattr(SSH(), name):
                chosen[name] = _FOR_EVER
        self.config = replace(self.config, ssh=replace(self.config.ssh, **chosen))
        self.engine = Engine(AuthorizedKey(ALICE.id, ALICE.name, ALICE_KEY.public().blob()))
        settings = self.config.engine
        self.permissions = Permissions(
            self.engine,
            self.clock,
            Lifetimes(settings.cache_ttl, settings.stale_grace),
            settings.recheck,
            placed_only=bool(settings.url),
        )
        self.guests = Guests()
        self.pool = ConsolePool(self.guests, self.clock, self.config.console, recordings)
        self.events = Events()
        self.audit = Audit(Logger("vmconsole.audit", observer=self.events))
        self.commands = Commands(
            self.permissions, self.pool, self.audit, self.clock, self.config.escape_byte
        )
        realm = ConsoleRealm(
            self.permissions,
            self.commands,
            self.audit,
            self.clock,
            self.config.limits.sessions_per_connection,
        )
        self.trust = Trust(self.clock, self.config, maybeDeferred)
        self.trust.observe(lambda: realm.end_refused(self.trust.refusal))
        checker = EngineKeyChecker(self.permissions, self.config.ssh.users, self.trust, self.clock)
        portal = Portal(realm, [checker])
        self.admission = Admission(
            self.clock, self.config.limits, lambda below: 0, lambda: None, lambda: None
        )
        self.factory = ConsoleSSHFactory(
            portal,
            self.config,
            self.audit,
            self.clock,
            lambda size: bytes(range(size)),
            self.admission,
        )
        self.factory.use_host_keys(host_keys or HostKeys([HOST_KEY]))
        self.factory.doStart()
        self._connect()

    def beside(self) -> SSHPair:
        """Another connection to the same server."""
        other = copy(self)
        other._connect()
        return other

    def _connect(self) -> None:
        self.server: Any = self.factory.buildProtocol(None)
        self.connection = ClientConnection()
        self.auth = ClientAuth(self.connection)
        self.client = ClientTransport(self.auth)
        self.client_io = iosim.FakeTransport(self.client, False)
        self.server_io = iosim.FakeTransport(
            self.server, True, peerAddress=IPv4Address("TCP", "192.0.2.7", 4711)
        )
        self.pump = iosim.connect(self.server, self.server_io, self.client, self.client_io)

    def flush(self) -> None:
        """Let both sides finish what they have to say."""
        for _ in range(2):
            # Output that is gathered waits for some milliseconds.
            self.clock.advance(0.005)
            self.pump.flush()
        while self.server._resting:
            self.clock.advance(0)
            self.pump.flush()

    def advance(self, seconds: float) -> None:
        """Time passes."""
        self.clock.advance(seconds)
        self.flush()

    def timers(self) -> list[IDelayedCall]:
        """What still waits for its time, apart from keepalives and the like."""
        soon = self.clock.seconds() + _FOR_EVER / 2
        return [call for call in self.clock.getDelayedCalls() if call.getTime() < soon]

    def login(self) -> None:
        """Alice logs in."""
        self.auth.sign(b"vmproxy", ALICE_KEY)
        self.flush()
        assert self.connection.up, (self.auth.answers, self.client.disconnected)

    def open(self, window: int = 1 << 20, reads_no_more: bool = False) -> ClientChannel:
        """Open a session channel; its client may stop reading after the first window."""
        opened = ClientChannel(window, reads_no_more)
        self.connection.openChannel(opened)
        self.flush()
        return opened

    def run(self, line: bytes = b"", pty: bool = False, **options: Any) -> ClientChannel:
        """Open a session and run a command line on it, or the shell."""
        opened = self.open(**options)
        if pty:
            self.connection.sendRequest(opened, b"pty-req", PTY)
        if line:
            self.connection.sendRequest(opened, b"exec", NS(line))
        else:
            self.connection.sendRequest(opened, b"shell", b"")
        self.flush()
        return opened

    def type(self, opened: ClientChannel, data: bytes) -> None:
        """The user types."""
        opened.write(data)
        self.flush()
