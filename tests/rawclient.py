"""An ssh client that sends exactly what a test says, when it says so, right or wrong."""

from __future__ import annotations

import struct
from collections.abc import Callable
from hashlib import sha256
from typing import Any

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from twisted.conch.ssh.common import NS, getMP, getNS
from twisted.conch.ssh.keys import Key
from twisted.internet.address import IPv4Address
from twisted.internet.testing import StringTransport

from vmconsole.ssh.ciphers import Keys, NullCipher, make_opener, make_sealer

STRICT = b"kex-strict-c-v00@openssh.com"
DISCONNECT, IGNORE, UNIMPLEMENTED, SERVICE_REQUEST, SERVICE_ACCEPT, EXT_INFO = 1, 2, 3, 5, 6, 7
USERAUTH_REQUEST, USERAUTH_SUCCESS = 50, 52
CHANNEL_OPEN, CONFIRMED, CHANNEL_DATA, CHANNEL_REQUEST = 90, 91, 94, 98
KEXINIT, NEWKEYS, KEX_INIT, KEX_REPLY = 20, 21, 30, 31


def padding(size: int) -> bytes:
    """The random bytes of this client."""
    return b"\0" * size


class ServerSide(StringTransport):
    """What the server's connection is made with: a TCP connection whose client may read nothing.

    Like Twisted's it pauses its producer when more than 64 KiB wait.
    """

    aborted = False
    reading = True
    """Whether the server takes what its client sends."""
    taken = True
    """Whether the client takes what the server sends."""
    _full = False

    def __init__(self, address: str = "192.0.2.7") -> None:
        super().__init__(peerAddress=IPv4Address("TCP", address, 4711))

    def write(self, data: bytes) -> None:
        super().write(data)
        if not (self.taken or self._full) and self.waiting > 65536 and self.producer is not None:
            self._full = True
            self.producer.pauseProducing()

    @property
    def waiting(self) -> int:
        """Bytes that the client has not taken."""
        return int(self.io.tell())

    def setTcpNoDelay(self, enabled: bool) -> None:
        """Nothing is sent here."""

    setTcpKeepAlive = setTcpNoDelay

    def abortConnection(self) -> None:
        self.aborted = True

    def pauseProducing(self) -> None:
        self.reading = False

    def resumeProducing(self) -> None:
        self.reading = True


class RawClient:
    """Connected to ``server``, with these algorithms; ``received`` has its messages, in order.

    ``turn`` is called when something was sent: the server's reactor goes round.
    """

    _channels = 0

    def __init__(
        self,
        server: Any,
        cipher: bytes = b"aes256-gcm@openssh.com",
        mac: bytes = b"hmac-sha2-256-etm@openssh.com",
        strict: bool = True,
        address: str = "192.0.2.7",
        turn: Callable[[], None] = lambda: None,
    ) -> None:
        self.server = server
        self._turn = turn
        self.cipher, self.mac, self.strict = cipher, mac, strict
        self.received: list[tuple[int, bytes]] = []
        self.sent = self.got = 0
        self.session_id = b""
        self.kexinit = self.server_kexinit = b""
        self._sealer: Any = NullCipher(padding)
        self._opener: Any = NullCipher(padding)
        self._buf = b""
        self._version = b""
        self.wire = ServerSide(address)
        server.makeConnection(self.wire)
        self.read()

    # --- the wire

    def write(self, data: bytes) -> None:
        """Bytes as they are."""
        self.server.dataReceived(data)
        self._turn()
        self.read()

    def sealed(self, number: int, payload: bytes = b"") -> bytes:
        """The next packet, for ``write``."""
        packet: bytes = self._sealer.seal(self.sent & 0xFFFFFFFF, bytes((number,)) + payload)
        self.sent += 1
        return packet

    def send(self, number: int, payload: bytes = b"") -> None:
        """A message."""
        self.write(self.sealed(number, payload))

    def read(self) -> None:
        """Take what the server has written, unless this client does not."""
        if not self.wire.taken:
            return
        self._buf += self.wire.value()
        self.wire.clear()
        if not self._version:
            line, found, rest = self._buf.partition(b"\r\n")
            if not found:
                return
            self._version, self._buf = line, rest
        while len(self._buf) >= self._opener.head_size:
            size = self._opener.wire_size(
                self.got & 0xFFFFFFFF, self._buf[: self._opener.head_size]
            )
            packet, self._buf = self._buf[:size], self._buf[size:]
            assert len(packet) == size
            payload = self._opener.open(self.got & 0xFFFFFFFF, packet)
            self.got += 1
            self.received.append((payload[0], payload[1:]))
            if payload[0] == KEXINIT:
                self.server_kexinit = payload
            elif payload[0] == KEX_REPLY:
                self._take_reply(payload[1:])
            elif payload[0] == NEWKEYS:
                self._opener = make_opener(self.cipher, self.mac, self._server_keys)
                if self.strict:
                    self.got = 0

    def flood(self, number: int, payload: bytes, times: int) -> int:
        """The same message again and again, as long as the server takes it: how often."""
        for count in range(times):
            if not self.wire.reading or self.server.ending:
                return count
            self.server.dataReceived(self.sealed(number, payload))
            self._turn()
        return times

    def login(self, user: bytes, key: Key) -> RawClient:
        """Log in with ``key`` (RFC 4252, section 7)."""
        self.send(SERVICE_REQUEST, NS(b"ssh-userauth"))
        request = NS(user) + NS(b"ssh-connection") + NS(b"publickey") + b"\x01"
        request += NS(key.sshType()) + NS(key.public().blob())
        signature = key.sign(NS(self.session_id) + b"\x32" + request, key.sshType())
        self.send(USERAUTH_REQUEST, request + NS(signature))
        assert USERAUTH_SUCCESS in self.numbers()
        return self

    def open_session(self, window: int = 1 << 20) -> int:
        """Open a session channel; the result is the server's number for it."""
        self._channels += 1
        self.send(CHANNEL_OPEN, NS(b"session") + struct.pack(">3L", self._channels, window, 32768))
        [confirmed] = [payload for number, payload in self.received if number == CONFIRMED]
        self.received.clear()
        return int.from_bytes(confirmed[4:8], "big")

    def request(self, channel: int, kind: bytes, data: bytes = b"", reply: bool = True) -> None:
        """A request about a channel (RFC 4254, section 5.4)."""
        head = struct.pack(">L", channel) + NS(kind) + bytes((reply,))
        self.send(CHANNEL_REQUEST, head + data)

    def numbers(self) -> list[int]:
        """The numbers of the messages that came since the last look."""
        received, self.received = self.received, []
        return [number for number, _ in received]

    @property
    def disconnected(self) -> tuple[int, str] | None:
        """Reason and text of the server's DISCONNECT."""
        for number, payload in self.received:
            if number == DISCONNECT:
                return struct.unpack(">L", payload[:4])[0], getNS(payload[4:])[0].decode()
        return None

    # --- key exchange

    def start(self) -> RawClient:
        """The version, and a key exchange."""
        self.write(b"SSH-2.0-raw\r\n")
        self.exchange()
        return self

    def exchange(self) -> None:
        """A whole key exchange, which the server may have begun."""
        self.send_kexinit()
        self.send_init()
        self.send_newkeys()

    def send_kexinit(self, follows: bool = False, **lists: bytes) -> None:
        """KEXINIT; ``lists`` replace ours."""
        kex = b"curve25519-sha256,ext-info-c" + (b"," + STRICT if self.strict else b"")
        ours = {
            "kex": kex,
            "host_keys": b"ssh-ed25519",
            "in_ciphers": self.cipher,
            "out_ciphers": self.cipher,
            "in_macs": self.mac,
            "out_macs": self.mac,
            "in_compression": b"none",
            "out_compression": b"none",
            "in_languages": b"",
            "out_languages": b"",
            **lists,
        }
        payload = bytes(16) + b"".join(NS(each) for each in ours.values())
        payload += bytes((follows,)) + bytes(4)
        self.kexinit = bytes((KEXINIT,)) + payload
        self.send(KEXINIT, payload)

    def send_init(self) -> None:
        """KEX_ECDH_INIT (RFC 5656, section 4)."""
        self._secret = X25519PrivateKey.generate()
        self._public = self._secret.public_key().public_bytes_raw()
        self.send(KEX_INIT, NS(self._public))

    def send_newkeys(self) -> None:
        """NEWKEYS: what is sent from now on has the new keys."""
        self.send(NEWKEYS)
        self.use_keys()

    def use_keys(self) -> None:
        """Send with the new keys from now on."""
        self._sealer = make_sealer(self.cipher, self.mac, self._client_keys, padding)
        if self.strict:
            self.sent = 0

    def _take_reply(self, payload: bytes) -> None:
        host_key, theirs, signature, _ = getNS(payload, 3)
        shared = self._secret.exchange(X25519PublicKey.from_public_bytes(theirs))
        secret = int.from_bytes(shared, "big")
        size = secret.bit_length() // 8 + 1
        mpint = NS(secret.to_bytes(size, "big"))
        assert getMP(mpint)[0] == secret
        hashed = b"".join(
            map(
                NS,
                (
                    b"SSH-2.0-raw",
                    self._version,
                    self.kexinit,
                    self.server_kexinit,
                    host_key,
                    self._public,
                    theirs,
                ),
            )
        )
        digest = sha256(hashed + mpint).digest()
        assert Key.fromString(host_key, type="BLOB").verify(signature, digest)
        self.session_id = self.session_id or digest

        def derive(letter: bytes) -> bytes:
            key = sha256(mpint + digest + letter + self.session_id).digest()
            while len(key) < 64:
                key += sha256(mpint + digest + key).digest()
            return key

        self._client_keys = Keys(*map(derive, (b"A", b"C", b"E")))
        self._server_keys = Keys(*map(derive, (b"B", b"D", b"F")))
