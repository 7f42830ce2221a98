"""A client's connection: its login in time, what it may send, how fast it reads, how it ends."""

from __future__ import annotations

import socket
import struct
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from twisted.conch.error import ConchError
from twisted.conch.ssh import transport
from twisted.conch.ssh.connection import SSHConnection
from twisted.internet.defer import DeferredLock
from twisted.internet.interfaces import IDelayedCall, IPushProducer
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from vmconsole.audit import Login
from vmconsole.ssh.algorithms import NothingInCommonError
from vmconsole.ssh.ciphers import BadPacketError
from vmconsole.ssh.handshakes import ExchangeBudget
from vmconsole.ssh.hostkeys import HostKeys
from vmconsole.ssh.logs import conch_logger
from vmconsole.ssh.packets import (
    MAX_PACKET,
    PacketTransport,
    ProtocolError,
)
from vmconsole.ssh.proxy_protocol import Client, when_known
from vmconsole.ssh.session import SessionChannel
from vmconsole.ssh.upkeep import Upkeep
from vmconsole.text import printable

if TYPE_CHECKING:
    from vmconsole.ssh.factory import ConsoleSSHFactory

# What Conch raises for unknown channels, short packets, undecodable strings, bad key shares.
_CLIENTS_DOING = (LookupError, ValueError, TypeError, struct.error, ConchError, BadPacketError)

_FINGERPRINTS_KEPT = 16
# Packets that a client may send before its login, beside its queries and signatures: a login takes
# ten or so. Every 30,000 cost a second of everybody's time.
MORE_PACKETS_BEFORE_LOGIN = 400
# Bytes of answers that may wait for a client that takes none.
_MAX_ANSWERS = 65536
# Bytes that a packet has besides: its length, number, padding and tag, and what is kept of it.
_OVERHEAD = 64
# Seconds that a client has to take our last words.
LAST_WORDS = 5.0
# Of these, one that is refused: a thousand of them must not hold the places of others for long.
_REFUSAL = 1.0
# RFC 4252, sections 5.3 and 6: before the login these must not come, and after it those are void.
_USERAUTH = range(50, 80)
_AFTER_LOGIN = 80


class Tries:
    """What was tried before the login. It outlives a userauth service that is asked for twice."""

    def __init__(self) -> None:
        self.signatures = 0
        self.queries = 0
        self.waiting = 0
        self.name = ""
        self.fingerprints: list[str] = []
        self.refusal = ""
        self.not_their_fault = False
        """The engine could not be asked."""
        self.told: set[str] = set()
        self.lock = DeferredLock()

    def note_key(self, shown: str) -> None:
        """Remember a key's fingerprint for the audit."""
        if shown not in self.fingerprints and len(self.fingerprints) < _FINGERPRINTS_KEPT:
            self.fingerprints.append(shown)


@implementer(IPushProducer)
class ConsoleTransport(PacketTransport):
    """One client's connection.

    A packet that makes no sense ends it with a word, and one line in the log. A login has to be
    there ``limits.login_grace`` seconds after the TCP connection.
    """

    factory: ConsoleSSHFactory
    ourVersionString = b"SSH-2.0-vmconsole"
    _log = conch_logger("vmconsole.ssh.conch")
    log = Logger()
    _grace: IDelayedCall | None = None
    _login: Login | None = None
    _goodbye: IDelayedCall | None = None
    _upkeep: Upkeep | None = None
    _tcp_takes_output = True
    _answers = 0
    """Bytes that were sent though the TCP connection was full."""
    _waiting = False
    host_keys: HostKeys

    def _getHostKeys(self, keyAlg: bytes) -> tuple[Any, Any]:
        return self.host_keys.identity(keyAlg)

    def connectionMade(self) -> None:
        """Start the clock at the TCP accept, and have it decided when this client is served."""
        self.session_id = self.factory.make_session_id()
        self.tries = Tries()
        clock = self.factory.clock
        self._budget = ExchangeBudget(clock)
        self._grace = clock.callLater(self.factory.limits.login_grace, self._too_slow)
        with suppress(OSError):  # It may be a unix socket.
            # A keystroke's echo must not wait for the client's delayed acknowledgement.
            self.transport.setTcpNoDelay(True)
            self.transport.setTcpKeepAlive(True)
        self.transport.registerProducer(self, True)
        # What comes meanwhile is kept: a connection that is not read would not be seen to end.
        self._held = self._waiting = True
        self._entry = self.factory.admission.accepted(self._evict)
        when_known(self.transport, self._place)

    def _place(self, client: Client) -> None:
        self._entry.place(client.source, self._admit, self._refuse)

    def _admit(self) -> None:
        self._waiting = False
        if not self.ending:
            self.begin()
            self.release()

    def _refuse(self, reason: str) -> None:
        self._waiting = False
        if not self.ending:
            self.send_version()
            self._turn_away(reason, _REFUSAL)

    def _evict(self, reason: str) -> None:
        # Its place is wanted now; what is said leaves at the end of this turn of the reactor.
        self._turn_away(reason, 0.0)

    def _turn_away(self, reason: str, within: float) -> None:
        self.sendDisconnect(transport.DISCONNECT_TOO_MANY_CONNECTIONS, reason.encode())
        if self._goodbye is not None and self._goodbye.active():
            self._goodbye.reset(within)

    @property
    def address(self) -> str:
        """The client's IP address."""
        return str(getattr(self.transport.getPeer(), "host", "unknown"))

    def logged_in(self, login: Login) -> None:
        """The client proved who it is."""
        self._login = login
        self._entry.logged_in()
        self.max_packet = MAX_PACKET
        self._stop_grace()
        self.factory.audit.login_accepted(login)
        self._upkeep = Upkeep(self, self.factory.clock, self.factory.settings)
        self._upkeep.start()

    def connectionLost(self, reason: Failure | None = None) -> None:
        """The client is gone; its channels end."""
        self.ending = True
        self._stop_grace()
        if self._upkeep is not None:
            self._upkeep.stop()
        if self._goodbye is not None and self._goodbye.active():
            self._goodbye.cancel()
        self._entry.left(failed=not self.tries.not_their_fault)
        if self._login is None and self.tries.name:
            self.factory.audit.login_refused(
                self.session_id,
                self.address,
                self.tries.name,
                self.tries.fingerprints,
                self.tries.refusal or "no key was offered",
            )
        super().connectionLost(reason)

    # --- from the client

    def dataReceived(self, data: bytes) -> None:
        """Take bytes from the client."""
        if self.ending:
            return
        if self._login is None:
            self._acknowledge()
        super().dataReceived(data)
        if self._waiting and len(self.buf) > self.max_packet:
            self.transport.pauseProducing()

    def hold(self) -> None:
        """Handle no more packets for now, and let the client's TCP window fill."""
        super().hold()
        self._read_or_not()

    def release(self) -> None:
        """Go on."""
        self._held = False
        self._read_or_not()
        super().release()

    def rest(self) -> None:
        """Go on in a later turn of the reactor."""
        self._resting = True
        self._read_or_not()
        self.factory.turns.add(self._go_on)

    def _go_on(self) -> None:
        self._resting = False
        if not self.ending:
            self._read_or_not()
            self.dataReceived(b"")

    def dispatchMessage(self, messageNum: int, payload: bytes) -> None:
        """Handle one message: some may only come before the login, others only after it."""
        if self._login is None:
            limits = self.factory.limits
            most = limits.auth_queries + limits.auth_tries + MORE_PACKETS_BEFORE_LOGIN
            if self.heard > most:
                raise ProtocolError(f"more than {most} packets before the login")
            if messageNum >= _AFTER_LOGIN:
                raise ProtocolError(f"message {messageNum} before the login")
        if self._login is not None and messageNum in _USERAUTH:
            return
        super().dispatchMessage(messageNum, payload)

    def ssh_SERVICE_REQUEST(self, packet: bytes) -> None:
        """RFC 4253, section 10. A login starts the only other service by itself."""
        if self._login is None:
            super().ssh_SERVICE_REQUEST(packet)
        else:
            self.sendDisconnect(
                transport.DISCONNECT_SERVICE_NOT_AVAILABLE, b"the service is running already"
            )

    def broken_packet(self, error: Exception) -> None:
        """A packet could not be handled: end this connection, and no other."""
        if isinstance(error, ProtocolError | NothingInCommonError):
            self._protocol_error(str(error), error)
        elif isinstance(error, _CLIENTS_DOING):
            self._protocol_error(repr(error), error)
        else:
            self.log.failure("session {session}", Failure(error), session=self.session_id)
            self._protocol_error(type(error).__name__, error)

    def sendDisconnect(self, reason: int, desc: bytes) -> None:
        """Say why, if the client has our version, and close."""
        if self._waiting:
            self.close()
        elif not self.ending:
            super().sendDisconnect(reason, desc)

    def close(self) -> None:
        """End the connection: some seconds later also one whose client takes no last words."""
        if not self.ending:
            self.transport.unregisterProducer()
            # Until then what the client still sends is read, and dropped.
            self.transport.resumeProducing()
            self._goodbye = self.factory.clock.callLater(LAST_WORDS, self.transport.abortConnection)
            super().close()

    # --- key exchange

    def sendKexInit(self) -> None:
        """Begin a key exchange, or answer the client's beginning."""
        super().sendKexInit()
        if self._upkeep is not None:
            self._upkeep.exchange_begun()

    def exchange(self, packet: bytes) -> None:
        """When it is this connection's turn."""

        def answer() -> None:
            if not self.ending:
                self.answer_exchange(packet)

        run, logged_in = self.factory.handshakes.run, self._login is not None
        delay = self._budget.delay(self.bytes_keyed)
        if delay:
            self.factory.clock.callLater(delay, run, answer, logged_in)
        else:
            run(answer, logged_in)

    def _keySetup(self, sharedSecret: bytes, exchangeHash: bytes) -> None:
        super()._keySetup(sharedSecret, exchangeHash)
        self._flush_channels()

    def ssh_NEWKEYS(self, packet: bytes) -> None:
        """There are new keys."""
        super().ssh_NEWKEYS(packet)
        if self._upkeep is not None:
            self._upkeep.exchange_done()

    # --- the TCP connection's word on how fast the client reads

    @property
    def takes_output(self) -> bool:
        """Whether channels may send now: the client reads, and no key exchange is under way."""
        return self._tcp_takes_output and not self.exchanging and not self.ending

    def sendPacket(self, messageType: int, payload: bytes) -> None:
        """Send a message; a client that takes none is heard only until the answers pile up."""
        super().sendPacket(messageType, payload)
        if not self._tcp_takes_output:
            self._answers += len(payload) + _OVERHEAD
            if self._answers > _MAX_ANSWERS:
                self._read_or_not()

    def pauseProducing(self) -> None:
        """The TCP connection is full: channels send nothing more. What the client sends is still
        read, since a flood of output may keep it full for as long as it lasts."""
        self._tcp_takes_output = False
        self._answers = 0

    def resumeProducing(self) -> None:
        """The TCP connection takes bytes again."""
        self._tcp_takes_output = True
        self._answers = 0
        if self._upkeep is not None:
            self._upkeep.alive()
        self._read_or_not()
        self._flush_channels()

    def stopProducing(self) -> None:
        """The TCP connection is gone; connectionLost follows."""
        self._tcp_takes_output = False

    def _read_or_not(self) -> None:
        if self._held or self._resting or self._answers > _MAX_ANSWERS:
            self.transport.pauseProducing()
        else:
            self.transport.resumeProducing()

    def _acknowledge(self) -> None:
        # Nothing of ours answers the client's KEXINIT and NEWKEYS, and its next packet waits
        # (Nagle) for the acknowledgement, which the kernel delays by 40 ms: twice in a login.
        handle = getattr(self.transport, "getHandle", None)
        if handle is not None and hasattr(socket, "TCP_QUICKACK"):
            with suppress(OSError):
                handle().setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)

    def _flush_channels(self) -> None:
        if isinstance(self.service, SSHConnection):
            for channel in list(self.service.channels.values()):
                if isinstance(channel, SessionChannel):
                    channel.flush()

    # ---

    def _too_slow(self) -> None:
        self._grace = None
        self.sendDisconnect(transport.DISCONNECT_BY_APPLICATION, b"no login within the time limit")

    def _stop_grace(self) -> None:
        if self._grace is not None:
            self._grace.cancel()
            self._grace = None

    def _protocol_error(self, what: str, error: Exception) -> None:
        what = printable(what)
        if self._login is None:
            # Strangers may do so as often as they like.
            self.factory.refusals.tell(f"{self.address} broke the protocol", what)
        else:
            self.log.info(
                "session {session}: {address} broke the protocol: {what}",
                session=self.session_id,
                address=self.address,
                what=what,
            )
        reason, text = transport.DISCONNECT_PROTOCOL_ERROR, "protocol error"
        if isinstance(error, NothingInCommonError):
            reason, text = transport.DISCONNECT_KEY_EXCHANGE_FAILED, str(error)
        elif isinstance(error, BadPacketError) and error.mac:
            reason, text = transport.DISCONNECT_MAC_ERROR, str(error)
        self.sendDisconnect(reason, text.encode())
