"""The client of the harness, and the two ends of its TCP connection, in memory."""

from __future__ import annotations

from typing import Any

from twisted.internet.address import IPv4Address, IPv6Address, UNIXAddress
from twisted.internet.interfaces import IAddress
from twisted.test import iosim

from tests.fuzz.channels import Wrong
from tests.fuzz.edits import edit
from tests.fuzz.ledger import Ledger
from tests.fuzz.sealed import SealedClient
from tests.fuzz.steps import Maker

_GLOBAL_REQUEST, _REQUEST_FAILURE = 80, 82
# What the server may write in one turn; more is taken for an endless loop.
_MOST_WRITES = 20_000
_MOST_BYTES = 64 << 20
# Bytes that wait, above which Twisted's TCP connections pause their producer.
_HIGH_WATER = 65536


class Runaway(BaseException):
    """The server does not stop writing. Not an Exception, so that nothing there catches it."""


def peer_address(address: str) -> IAddress:
    """Of a TCP connection from an IP address; empty: of one to a unix socket."""
    if not address:
        return UNIXAddress(None)
    return (IPv6Address if ":" in address else IPv4Address)("TCP", address, 4711)


class ServerEnd(iosim.FakeTransport):
    """The server's TCP connection: it counts, and notices what is written after the end."""

    def __init__(self, protocol: Any, address: str) -> None:
        super().__init__(protocol, True, peerAddress=peer_address(address))
        self.reading = True
        self.aborted = False
        self.deaf = False
        self.paused = False
        """The producer is."""
        self._waiting = 0
        self.late = b""
        """What was written after loseConnection."""
        self.runaway = ""
        """The server did not stop writing, whoever may have caught that."""
        # Since they last were taken to the client.
        self._writes = self._size = 0

    def abortConnection(self) -> None:
        """The server waits no more for the client."""
        self.aborted = True
        super().abortConnection()

    def loseWriteConnection(self) -> None:
        """Our half is closed; a client closes the other one at once."""
        self.loseConnection()

    def write(self, data: bytes) -> None:
        """See ITransport."""
        self._writes += 1
        self._size += len(data)
        if self._writes > _MOST_WRITES or self._size > _MOST_BYTES:
            self.runaway = f"{self._writes} writes of {self._size} bytes in one turn"
            raise Runaway(self.runaway)
        if self.disconnecting:
            self.late += data
        super().write(data)
        self._waiting += len(data)
        if self._waiting > _HIGH_WATER:
            self._pause()

    def _pause(self) -> None:
        if self.producer is not None and not self.paused:
            self.paused = True
            self.producer.pauseProducing()

    def fill(self, deaf: bool) -> None:
        """The client does not read, so that the connection is full; or it reads again."""
        self.deaf = deaf
        if deaf:
            self._pause()

    def drain(self) -> bytes:
        """What the server wrote arrives at the client, if that reads."""
        if self.deaf:
            return b""
        data = bytes(self.getOutBuffer() or b"")
        self._waiting = self._writes = self._size = 0
        if self.paused:
            self.paused = False
            if self.producer is not None:
                self.producer.resumeProducing()
        return data

    def pauseProducing(self) -> None:
        """The server reads no more."""
        self.reading = False

    def resumeProducing(self) -> None:
        """The server reads again."""
        self.reading = True


class Client(SealedClient):
    """A Conch client that keeps the ledger, and does to its packets what the program says.

    ``tampers`` are for the packets of the handshake: ``[N, "drop"|"twice"]``,
    ``[N, "edit", EDITS]``, ``[N, "wire", EDITS]``, ``[N, "before"|"after"|"instead", FIELDS]``.
    """

    _by_hand = False
    cooperative = True
    """Takes part in key exchanges, and asks for the userauth service."""
    blind = False
    """What the server sends cannot be told any more, and need not be."""
    lazy = False
    """Answers neither keepalives nor CLOSE."""
    stranger = False
    """Not a client that speaks ssh at all: it need not understand the answers."""

    def __init__(
        self, ledger: Ledger, maker: Maker, version: bytes, tampers: list[Any], suite: str
    ) -> None:
        super().__init__(suite, strict=not suite.endswith("hmac-sha2-256"))
        self.ourVersionString = version
        self.ledger, self._maker = ledger, maker
        self._tampers: dict[int, list[Any]] = {each[0]: each[1:] for each in tampers}
        self._ordinal = 0

    def connectionSecure(self) -> None:
        """The handshake is over; called after each key exchange."""
        self.ledger.session = self._maker.session = self.sessionID
        if not self.ledger.secure:
            self.ledger.secure = True
            self.sendPacket(5, b"\x00\x00\x00\x0cssh-userauth")

    def dispatchMessage(self, messageNum: int, payload: bytes) -> None:
        """Each message of the server goes to the ledger first."""
        if not self.blind:
            self.ledger.exchanging = self.exchanging
            self.ledger.received(messageNum, payload)
        if messageNum == _GLOBAL_REQUEST and not (self.blind or self.lazy):
            if self.ledger.owes_answer:
                self.sendPacket(_REQUEST_FAILURE, b"")
        if messageNum < 50 and messageNum not in (1, 2, 3, 4, 6) and self.cooperative:
            super().dispatchMessage(messageNum, payload)

    def sendDisconnect(self, reason: int, desc: bytes) -> None:
        """Conch's client could make nothing of what came."""
        if not (self.blind or self.stranger):
            raise Wrong("garbled", f"the client cannot take what it got: {reason} {desc!r}")
        self.cooperative, self.blind = False, True

    def seal(self, payload: bytes) -> None:
        """A packet, with what the program does to those of the client's own."""
        if self._by_hand:
            self._seal(payload)
            return
        if not self.cooperative:
            return
        ordinal, self._ordinal = self._ordinal, self._ordinal + 1
        how, *values = self._tampers.get(ordinal, ("",))
        if not how:
            self._seal(payload)
            return
        self.ledger.tamper()
        # Both sides' keys may differ from now on.
        self.blind = True
        if how == "before":
            self._seal(self._maker.payload(values[0], ()))
        if how in ("before", "after", "twice"):
            self._seal(payload)
        if how == "twice":
            self._seal(payload)
        elif how == "edit":
            self._seal(edit(payload, values[0]))
        elif how == "wire":
            self.damage(payload, values[0])
        elif how in ("after", "instead"):
            self._seal(self._maker.payload(values[0], ()))

    def put(self, payload: bytes) -> None:
        """Send a payload, also during a key exchange."""
        if self.exchanging:
            self.ledger.tamper()
        self._by_hand = True
        try:
            self.seal(payload)
        finally:
            self._by_hand = False

    def damage(self, payload: bytes, edits: list[Any]) -> None:
        """Send a payload, and edit what is on the wire."""
        held, self.transport.stream = self.transport.stream, []
        self._seal(payload)
        self.transport.stream = [*held, edit(b"".join(self.transport.stream), edits)]

    def _seal(self, payload: bytes) -> None:
        if self.ledger.secure and not self.exchanging:
            self.ledger.sent(payload, self.outgoingPacketSequence)
        super().seal(payload)
