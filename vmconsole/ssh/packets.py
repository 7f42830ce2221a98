"""The packet layer over Conch's transport: our ciphers, strict key exchange, order.

Conch computes key exchanges and dispatches messages; what is between them and the wire is here.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from typing import Any

from twisted.conch.error import ConchError
from twisted.conch.ssh import transport
from twisted.conch.ssh.common import NS, getNS

from vmconsole.ssh.algorithms import Algorithms, agree
from vmconsole.ssh.ciphers import (
    Keys,
    NullCipher,
    Opener,
    Sealer,
    make_opener,
    make_sealer,
    needs_mac,
)

# OpenSSH's PROTOCOL, section 1.10.
_STRICT_CLIENT = b"kex-strict-c-v00@openssh.com"
_STRICT_SERVER = b"kex-strict-s-v00@openssh.com"
_EXT_INFO_CLIENT = b"ext-info-c"
_EXT_INFO_SERVER = b"ext-info-s"

_KEX_INIT = 30  # KEXDH_INIT, KEX_ECDH_INIT, KEX_HYBRID_INIT: all the same number
_USERAUTH_FIRST = 50
# RFC 4253, section 4.2, the line's end included.
_LONGEST_VERSION = 255
# RFC 4253, section 6.1: what every implementation must take. More, before login, is an attack.
MAX_PACKET_BEFORE_LOGIN = 35000
# Bytes; what OpenSSH takes. We grant no channel as much.
MAX_PACKET = 262144
# Answers that wait for the end of a key exchange; guest output waits elsewhere.
_MAX_BLOCKED = 256
# Handled in one turn of the reactor; small ones take some milliseconds.
_PACKETS_A_TURN = 200
# Bytes, likewise; the last packet may go beyond.
_BYTES_A_TURN = 32768
_SEQUENCES = 0xFFFFFFFF
# RFC 4344, section 3.1: long before the sequence numbers come round.
_MAX_PACKETS = 1 << 31
_VERSIONS = (b"SSH-2.0-", b"SSH-1.99-")
_COMPRESSION = (b"none",)
# DISCONNECT, IGNORE, UNIMPLEMENTED, DEBUG.
_ANY_TIME = (1, 2, 3, 4)


class ProtocolError(ConchError):
    """The client does what RFC 4253 forbids."""


class PacketTransport(transport.SSHServerTransport):
    """An ssh server's connection, up to the services.

    Who uses it sets ``algorithms``, ``random`` and ``server_sig_algs``, and calls ``begin``. An
    error in a packet goes to ``broken_packet``, a key exchange's computation to ``exchange``.
    """

    transport: Any
    algorithms: Algorithms
    random: Callable[[int], bytes]
    server_sig_algs: tuple[bytes, ...] = ()
    max_packet = MAX_PACKET_BEFORE_LOGIN
    """Bytes of the largest packet that is taken."""
    ending = False
    """Set once the connection is being closed: what still comes in is void."""
    strict = False
    """Whether both sides do strict key exchange."""
    rekey_bytes: float = math.inf
    """Bytes after which ``renew_keys`` is called."""
    exchanges = 0
    """Key exchanges that are done."""
    bytes_keyed = 0
    """Bytes on the wire, both ways, since the last key exchange."""
    packets_keyed = 0
    """Packets, likewise."""
    heard = 0
    """Packets that have come in."""
    # What the client has to send next: a KEXINIT, the init message, NEWKEYS; 0: whatever it likes.
    _awaited = transport.MSG_KEXINIT
    # Messages of ours that have to wait until a key exchange is done; None: there is none.
    _blocked: list[tuple[int, bytes]] | None = None
    _held = False
    _resting = False
    _taking = False
    _computing = False
    _packet_size: int | None = None
    _seal_name = _open_name = (b"", b"")

    def begin(self) -> None:
        """Send the version and our KEXINIT."""
        self.send_version()
        self.sendKexInit()

    def send_version(self) -> None:
        """The first that a client gets (RFC 4253, section 4.2); behind it a DISCONNECT is
        understood, too."""
        self._sealer: Sealer = NullCipher(self.random)
        self._opener: Opener = NullCipher(self.random)
        self.transport.write(self.ourVersionString + b"\r\n")

    @property
    def exchanging(self) -> bool:
        """Whether a key exchange keeps our messages back."""
        return self._blocked is not None

    # --- from the wire

    def dataReceived(self, data: bytes) -> None:
        """Take bytes from the client, and handle the packets that are whole."""
        self.buf += data
        if self._held or self._resting or self._taking:
            return
        self._taking = True
        try:
            if not self.gotVersion:
                self._take_version()
            if self.gotVersion:
                self._take_packets()
        except Exception as error:
            self.broken_packet(error)
        finally:
            self._taking = False
        if self.ending:
            self.buf = b""

    def hold(self) -> None:
        """Handle no more packets for now; what still comes in waits."""
        self._held = True

    def release(self) -> None:
        """Go on with what waits."""
        self._held = False
        self.dataReceived(b"")

    def rest(self) -> None:
        """Let others have their turn, and go on with what waits in the next one."""
        raise NotImplementedError

    def broken_packet(self, error: Exception) -> None:
        """What came in cannot be handled."""
        raise NotImplementedError

    def _take_version(self) -> None:
        line, newline, rest = self.buf.partition(b"\n")
        spoken = line.startswith(_VERSIONS) if newline or len(line) >= 9 else True
        if len(line) >= _LONGEST_VERSION or not spoken:
            # RFC 4253, section 4.2: a client's first line is its version.
            self.transport.write(b"Invalid SSH identification string.\r\n")
            self.close()
        elif newline:
            self.gotVersion = True
            self.otherVersionString = line.rstrip(b"\r")
            self.buf = rest

    def _take_packets(self) -> None:
        taken = count = 0
        try:
            while not (self._held or self.ending):
                if count == _PACKETS_A_TURN or taken >= _BYTES_A_TURN:
                    self.rest()
                    break
                opener = self._opener
                if self._packet_size is None:
                    head = self.buf[taken : taken + opener.head_size]
                    if len(head) < opener.head_size:
                        break
                    self._packet_size = opener.wire_size(self.incomingPacketSequence, head)
                    if self._packet_size > self.max_packet:
                        raise ProtocolError(f"a packet of {self._packet_size} bytes is too large")
                packet = self.buf[taken : taken + self._packet_size]
                if len(packet) < self._packet_size:
                    break
                taken += self._packet_size
                count += 1
                self._packet_size = None
                payload = opener.open(self.incomingPacketSequence, packet)
                self.incomingPacketSequence = (self.incomingPacketSequence + 1) & _SEQUENCES
                self.heard += 1
                self._count(len(packet))
                self.dispatchMessage(payload[0], payload[1:])
        finally:
            self.buf = self.buf[taken:]

    def dispatchMessage(self, messageNum: int, payload: bytes) -> None:
        """Handle one message, if it may come now."""
        if self.ignoreNextPacket and _KEX_INIT <= messageNum < _USERAUTH_FIRST:
            # It belongs to the method that the client guessed.
            self.ignoreNextPacket = False
            return
        self._check_order(messageNum)
        if len(self._blocked or ()) > _MAX_BLOCKED:
            raise ProtocolError("too many requests during a key exchange")
        super().dispatchMessage(messageNum, payload)

    def _check_order(self, number: int) -> None:
        # RFC 4253, section 7.1; once it has begun, strict key exchange forbids what that allows.
        if number in (transport.MSG_DISCONNECT, self._awaited):
            return
        if self._awaited:
            silent = self.strict and not self.exchanges
            allowed = not silent and number in _ANY_TIME
        else:
            allowed = number == transport.MSG_KEXINIT or not _is_exchange(number)
        if not allowed:
            raise ProtocolError(f"message {number} out of order")

    def ssh_DISCONNECT(self, packet: bytes) -> None:
        """RFC 4253, section 11.1: the client goes, and says why; that is no error."""
        self.close()

    def ssh_EXT_INFO(self, packet: bytes) -> None:
        """RFC 8308; of no use here, and to read a long list would take time by its square."""

    def ssh_UNIMPLEMENTED(self, packet: bytes) -> None:
        """RFC 4253, section 11.4; of no use here, and Conch would log each."""

    def sendDisconnect(self, reason: int, desc: bytes) -> None:
        """Section 11.1: say why, and close."""
        if self._computing:
            # Conch's word on a client's public value. That ends as all does that is wrong.
            raise ProtocolError(f"key exchange: {desc!r}")
        self.sendPacket(transport.MSG_DISCONNECT, struct.pack(">L", reason) + NS(desc) + NS(b""))
        self.close()

    def close(self) -> None:
        """End the connection, once what was sent is on its way. The client closes it, too: if we
        did while it sends, what we said would be lost with that."""
        self.ending = True
        getattr(self.transport, "loseWriteConnection", self.transport.loseConnection)()

    def sendUnimplemented(self) -> None:
        """RFC 4253, section 11.4: about the message that came last."""
        last = (self.incomingPacketSequence - 1) & _SEQUENCES
        self.sendPacket(transport.MSG_UNIMPLEMENTED, struct.pack(">L", last))

    # --- to the wire

    def sendPacket(self, messageType: int, payload: bytes) -> None:
        """Send a message; what must not be sent during a key exchange waits for its end."""
        if self._blocked is not None and not (
            messageType in _ANY_TIME or _is_exchange(messageType)
        ):
            self._blocked.append((messageType, payload))
            return
        if self.ending and messageType != transport.MSG_DISCONNECT:
            return
        packet = self._sealer.seal(self.outgoingPacketSequence, bytes((messageType,)) + payload)
        self.outgoingPacketSequence = (self.outgoingPacketSequence + 1) & _SEQUENCES
        self.transport.write(packet)
        self._count(len(packet))

    def _count(self, size: int) -> None:
        self.bytes_keyed += size
        self.packets_keyed += 1
        if self.bytes_keyed >= self.rekey_bytes or self.packets_keyed >= _MAX_PACKETS:
            self.renew_keys()

    def renew_keys(self) -> None:
        """Begin a key exchange, unless there is one."""
        if self._blocked is None and not self._awaited:
            self.sendKexInit()

    # --- key exchange

    def sendKexInit(self) -> None:
        """Begin a key exchange, or answer the client's beginning."""
        kex = list(self.algorithms.kex)
        if not self.exchanges:
            kex += [_EXT_INFO_SERVER, _STRICT_SERVER]
        lists = (
            kex,
            self.algorithms.host_keys,
            *(self.algorithms.ciphers,) * 2,
            *(self.algorithms.macs,) * 2,
            *(_COMPRESSION,) * 2,
            *((),) * 2,
        )
        names = b"".join(NS(b",".join(each)) for each in lists)
        payload = self.random(16) + names + b"\0" + bytes(4)
        self.ourKexInitPayload = bytes((transport.MSG_KEXINIT,)) + payload
        self._blocked = []
        self.sendPacket(transport.MSG_KEXINIT, payload)

    def ssh_KEXINIT(self, packet: bytes) -> None:
        """RFC 4253, section 7.1: agree, and answer if the client began."""
        *strings, rest = getNS(packet[16:], 10)
        names = [string.split(b",") for string in strings]
        if not self.exchanges:
            self.strict = _STRICT_CLIENT in names[0]
            self._peerSupportsExtensions = _EXT_INFO_CLIENT in names[0]
            if self.strict and self.incomingPacketSequence != 1:
                raise ProtocolError("KEXINIT was not the first message")
        ours = self.algorithms
        self.otherKexInitPayload = bytes((transport.MSG_KEXINIT,)) + packet
        self.kexAlg = agree("key exchange", names[0], ours.kex)
        self.keyAlg = agree("host key", names[1], ours.host_keys)
        self._open_name, self._seal_name = (
            _agree_packets(names[2 + way], names[4 + way], ours) for way in (0, 1)
        )
        for way in (0, 1):
            agree("compression", names[6 + way], _COMPRESSION)
        if not self.exchanging:
            self.sendKexInit()
        # A guess is right when both sides like the same best (section 7).
        self.ignoreNextPacket = bool(rest[0]) and (
            names[0][0] != ours.kex[0] or names[1][0] != ours.host_keys[0]
        )
        self._awaited = _KEX_INIT

    def ssh_KEX_DH_GEX_REQUEST_OLD(self, packet: bytes) -> None:
        """Message 30, whose name depends on the method: the client's part of the exchange."""
        self.hold()
        self.exchange(packet)

    def exchange(self, packet: bytes) -> None:
        """Call ``answer_exchange``, which takes some milliseconds, now or later."""
        self.answer_exchange(packet)

    def answer_exchange(self, packet: bytes) -> None:
        """Compute the keys, and send our part."""
        self._computing = True
        try:
            super().ssh_KEX_DH_GEX_REQUEST_OLD(packet)
        except Exception as error:
            self._computing = False
            self.broken_packet(error)
        self.release()

    def _keySetup(self, sharedSecret: bytes, exchangeHash: bytes) -> None:
        # Conch has sent our part of the exchange. What is sent from now on has the new keys.
        self._computing = False
        first = self.sessionID is None
        if first:
            self.sessionID = exchangeHash
        theirs, ours = (
            Keys(*(self._getKey(letter, sharedSecret, exchangeHash) for letter in letters))
            for letters in ((b"A", b"C", b"E"), (b"B", b"D", b"F"))
        )
        self._next_opener = make_opener(*self._open_name, theirs)
        self.sendPacket(transport.MSG_NEWKEYS, b"")
        self._sealer = make_sealer(*self._seal_name, ours, self.random)
        if self.strict:
            self.outgoingPacketSequence = 0
        self._awaited = transport.MSG_NEWKEYS
        waiting, self._blocked = self._blocked or [], None
        if first:
            # RFC 8308, section 2.4: which keys users may log in with, not which host keys we have.
            self.sendExtInfo([(b"server-sig-algs", b",".join(self.server_sig_algs))])
        for number, payload in waiting:
            self.sendPacket(number, payload)

    def ssh_NEWKEYS(self, packet: bytes) -> None:
        """Section 7.3: what comes from now on has the new keys."""
        if packet:
            raise ProtocolError("NEWKEYS takes no data")
        self._opener = self._next_opener
        if self.strict:
            self.incomingPacketSequence = 0
        self._awaited = 0
        self.exchanges += 1
        self.bytes_keyed = self.packets_keyed = 0

    def isEncrypted(self, direction: str = "out") -> bool:
        """Whether there are keys."""
        return bool(self.exchanges)

    isVerified = isEncrypted


def _is_exchange(number: int) -> bool:
    return transport.MSG_KEXINIT <= number < _USERAUTH_FIRST


def _agree_packets(
    ciphers: Sequence[bytes], macs: Sequence[bytes], ours: Algorithms
) -> tuple[bytes, bytes]:
    cipher = agree("cipher", ciphers, ours.ciphers)
    return cipher, agree("MAC", macs, ours.macs) if needs_mac(cipher) else b""
