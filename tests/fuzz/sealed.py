"""Conch's client with the packets of OpenSSH: AEAD ciphers, encrypt-then-MAC, strict key exchange.

The packets are made by the server's own ciphers, which are compared with other implementations'
elsewhere: what is fuzzed here is what the server makes of them.
"""

from __future__ import annotations

from random import Random
from typing import Any

from twisted.conch.ssh.common import getNS

from tests.sshpair import ClientTransport
from vmconsole.ssh.ciphers import (
    BadPacketError,
    Keys,
    NullCipher,
    Opener,
    Sealer,
    make_opener,
    make_sealer,
)

_NEWKEYS = 21
# OpenSSH's PROTOCOL, section 1.10.
_STRICT_CLIENT, _STRICT_SERVER = b"kex-strict-c-v00@openssh.com", b"kex-strict-s-v00@openssh.com"
SUITES = (
    "chacha20-poly1305@openssh.com hmac-sha2-256",
    "aes256-gcm@openssh.com hmac-sha2-256",
    "aes128-gcm@openssh.com hmac-sha2-256",
    "aes256-ctr hmac-sha2-256-etm@openssh.com",
    "aes128-ctr hmac-sha2-512-etm@openssh.com",
    "aes256-ctr hmac-sha2-256",
)
"""A cipher and a MAC, each as a program names it."""


class SealedClient(ClientTransport):
    """Speaks one cipher and one MAC; ``strict``: as clients do since 2023."""

    def __init__(self, suite: str, strict: bool) -> None:
        super().__init__(None)
        cipher, mac = suite.encode().split()
        self.supportedCiphers, self.supportedMACs = [cipher], [mac]
        self.supportedKeyExchanges = [b"curve25519-sha256"] + [_STRICT_CLIENT] * strict
        self._padding = Random(suite).randbytes
        self._sealer: Sealer = NullCipher(self._padding)
        self._opener: Opener = NullCipher(self._padding)
        self._next_opener: Opener = self._opener
        self._wire_size: int | None = None
        self._strict = False

    @property
    def exchanging(self) -> bool:
        """A key exchange is under way."""
        return bool(self._keyExchangeState != self._KEY_EXCHANGE_NONE)

    def ssh_KEXINIT(self, packet: bytes) -> Any:
        """See Conch; strict key exchange is agreed on in the first one."""
        if self.sessionID is None:
            theirs = getNS(packet[16:])[0].split(b",")
            self._strict = _STRICT_SERVER in theirs and _STRICT_CLIENT in self.supportedKeyExchanges
        return super().ssh_KEXINIT(packet)

    def sendPacket(self, messageType: int, payload: bytes) -> None:
        """See Conch: what has to wait for the end of a key exchange does."""
        if self.exchanging and not self._allowedKeyExchangeMessageType(messageType):
            self._blockedByKeyExchange.append((messageType, payload))
        else:
            self.seal(bytes((messageType,)) + payload)

    def seal(self, payload: bytes) -> None:
        """Send this payload now, whatever it is."""
        self.transport.write(self._sealer.seal(self.outgoingPacketSequence, payload))
        self.outgoingPacketSequence += 1

    def getPacket(self) -> bytes | None:
        """See Conch: the next payload, if it is there."""
        opener = self._opener
        if self._wire_size is None:
            if len(self.buf) < opener.head_size:
                return None
            head = self.buf[: opener.head_size]
            try:
                self._wire_size = opener.wire_size(self.incomingPacketSequence, head)
            except BadPacketError as error:
                self.sendDisconnect(2, str(error).encode())
                return None
        if len(self.buf) < self._wire_size:
            return None
        packet, self.buf = self.buf[: self._wire_size], self.buf[self._wire_size :]
        self._wire_size = None
        try:
            payload = opener.open(self.incomingPacketSequence, packet)
        except BadPacketError as error:
            self.sendDisconnect(5, str(error).encode())
            return None
        self.incomingPacketSequence += 1
        return payload

    def _keySetup(self, sharedSecret: bytes, exchangeHash: bytes) -> None:
        if self.sessionID is None:
            self.sessionID = exchangeHash
        ours, theirs = (
            Keys(*(self._getKey(letter, sharedSecret, exchangeHash) for letter in letters))
            for letters in ((b"A", b"C", b"E"), (b"B", b"D", b"F"))
        )
        agreed = self.nextEncryptions
        self._next_opener = make_opener(agreed.inCipType, agreed.inMACType, theirs)
        self.sendPacket(_NEWKEYS, b"")
        self._sealer = make_sealer(agreed.outCipType, agreed.outMACType, ours, self._padding)
        if self._strict:
            self.outgoingPacketSequence = 0
        # Conch's sign that the keys are there.
        agreed.encBlockSize = 8

    def _newKeys(self) -> None:
        self._opener = self._next_opener
        if self._strict:
            self.incomingPacketSequence = 0
        self._keyExchangeState = self._KEY_EXCHANGE_NONE
        waiting, self._blockedByKeyExchange = self._blockedByKeyExchange, None
        for number, payload in waiting:
            self.sendPacket(number, payload)
