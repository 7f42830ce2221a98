"""Conch's server transport, hardened: algorithms, a grace period, limits before login."""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence
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
from vmconsole.ssh.logs import conch_logger
from vmconsole.ssh.session import SessionChannel

if TYPE_CHECKING:
    from vmconsole.ssh.factory import ConsoleSSHFactory


# What Conch raises for unknown channels, short packets, undecodable strings, bad key shares.
_CLIENTS_DOING = (LookupError, ValueError, TypeError, struct.error, ConchError)

# RFC 4253, section 6.1: what every implementation must take. More, before login, is an attack.
MAX_PACKET_BEFORE_LOGIN = 35000
_FINGERPRINTS_KEPT = 16
# Answers that wait for the end of a key exchange; guest output waits elsewhere.
_MAX_BLOCKED = 256
# Seconds that a client has to take our last words.
LAST_WORDS = 5.0


class Tries:
    """What was tried before the login. It outlives a userauth service that is asked for twice."""

    def __init__(self) -> None:
        self.signatures = 0
        self.queries = 0
        self.waiting = 0
        self.name = ""
        self.fingerprints: list[str] = []
        self.refusal = ""
        self.told: set[str] = set()
        self.lock = DeferredLock()

    def note_key(self, shown: str) -> None:
        """Remember a key's fingerprint for the audit."""
        if shown not in self.fingerprints and len(self.fingerprints) < _FINGERPRINTS_KEPT:
            self.fingerprints.append(shown)


@implementer(IPushProducer)
class ConsoleTransport(transport.SSHServerTransport):
    """One client's connection.

    A packet that makes no sense ends it with a word, and one line in the log. A login has to be
    there ``limits.login_grace`` seconds after the TCP connection.
    """

    factory: ConsoleSSHFactory
    transport: Any
    ourVersionString = b"SSH-2.0-vmconsole"
    supportedCompressions = [b"none"]  # noqa: RUF012 - Conch's own way to say it
    _log = conch_logger("vmconsole.ssh.conch")
    log = Logger()
    _grace: IDelayedCall | None = None
    _login: Login | None = None
    _goodbye: IDelayedCall | None = None
    ending = False
    """Set once the connection is being closed: what still comes in is void."""
    _tcp_takes_output = True

    def connectionMade(self) -> None:
        """Start the clock at the TCP accept, and watch how fast the client reads."""
        self.session_id = self.factory.make_session_id()
        self.tries = Tries()
        self._grace = self.factory.clock.callLater(self.factory.limits.login_grace, self._too_slow)
        # A keystroke's echo must not wait for the client's delayed acknowledgement.
        self.transport.setTcpNoDelay(True)
        self.transport.setTcpKeepAlive(True)
        self.transport.registerProducer(self, True)
        super().connectionMade()

    @property
    def address(self) -> str:
        """The client's IP address."""
        return str(getattr(self.transport.getPeer(), "host", "unknown"))

    def logged_in(self, login: Login) -> None:
        """The client proved who it is."""
        self._login = login
        self._stop_grace()
        self.factory.audit.login_accepted(login)

    def connectionLost(self, reason: Failure | None = None) -> None:
        """The client is gone; its channels end."""
        self.ending = True
        self._stop_grace()
        if self._goodbye is not None and self._goodbye.active():
            self._goodbye.cancel()
        if self._login is None and self.tries.name:
            self.factory.audit.login_refused(
                self.session_id,
                self.address,
                self.tries.name,
                self.tries.fingerprints,
                self.tries.refusal or "no key was offered",
            )
        super().connectionLost(reason)

    def dataReceived(self, data: bytes) -> None:
        """Take bytes from the client; a packet that nobody needs before login is refused."""
        if self._login is None:
            self._acknowledge()
        super().dataReceived(data)
        # What is left here is one packet that is not whole yet.
        if self._login is None and len(self.buf) > MAX_PACKET_BEFORE_LOGIN:
            self.buf = b""
            self._protocol_error("a packet before login is too large")

    def dispatchMessage(self, messageNum: int, payload: bytes) -> None:
        """Handle one packet. What Conch cannot make sense of ends this connection only."""
        if self.ending:
            return
        if self._login is None and len(payload) > MAX_PACKET_BEFORE_LOGIN:
            self._protocol_error("a packet before login is too large")
            return
        if len(self._blockedByKeyExchange or ()) > _MAX_BLOCKED:
            self._protocol_error("too many requests during a key exchange")
            return
        try:
            super().dispatchMessage(messageNum, payload)
        except Exception:
            self.broken_packet(Failure())

    def broken_packet(self, failure: Failure) -> None:
        """A packet could not be handled: end this connection, and no other."""
        if failure.check(*_CLIENTS_DOING):
            self._protocol_error(repr(failure.value))
        else:
            self.log.failure("session {session}", failure, session=self.session_id)
            self._protocol_error(f"{type(failure.value).__name__}")

    def receiveError(self, reasonCode: int, description: bytes) -> None:
        """The client says that it goes, and why; going is no error."""

    def sendDisconnect(self, reason: int, desc: bytes) -> None:
        """Say why, and close: some seconds later also to a client that does not take it."""
        if not self.ending:
            self.ending = True
            super().sendDisconnect(reason, desc)
            self.transport.unregisterProducer()
            self._goodbye = self.factory.clock.callLater(LAST_WORDS, self.transport.abortConnection)

    def sendExtInfo(self, extensions: Sequence[tuple[bytes, bytes]]) -> None:
        """RFC 8308: tell which keys users may log in with, not which host keys we have."""
        super().sendExtInfo([(b"server-sig-algs", b",".join(self.factory.user_key_algorithms))])

    # --- the TCP connection's word on how fast the client reads

    @property
    def takes_output(self) -> bool:
        """Whether channels may send now: the client reads, and no key exchange is under way."""
        exchanging = self._keyExchangeState != self._KEY_EXCHANGE_NONE
        return self._tcp_takes_output and not exchanging and not self.ending

    def pauseProducing(self) -> None:
        """The TCP connection is full: whoever reads nothing gets no answers to more requests."""
        self._tcp_takes_output = False
        self.transport.pauseProducing()

    def resumeProducing(self) -> None:
        """The TCP connection takes bytes again."""
        self._tcp_takes_output = True
        self.transport.resumeProducing()
        self._flush_channels()

    def stopProducing(self) -> None:
        """The TCP connection is gone; connectionLost follows."""
        self._tcp_takes_output = False

    def _newKeys(self) -> None:
        super()._newKeys()
        self._flush_channels()

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

    def _protocol_error(self, what: str) -> None:
        self.log.info(
            "session {session}: {address} broke the protocol: {what}",
            session=self.session_id,
            address=self.address,
            what=what,
        )
        self.sendDisconnect(transport.DISCONNECT_PROTOCOL_ERROR, b"protocol error")
