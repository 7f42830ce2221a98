"""A stranger's side of ssh: a whole key exchange, and no login. Bytes in, bytes out."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from twisted.conch.ssh.common import MP, NS, getNS
from twisted.conch.ssh.keys import Key

from bench.errors import BenchError
from vmconsole.ssh.ciphers import Keys, NullCipher, Opener, Sealer, make_opener, make_sealer

_VERSION = b"SSH-2.0-stranger"
_CIPHER = b"aes256-gcm@openssh.com"
# Named, since lists must not be empty, and not used: the cipher authenticates by itself.
_MAC = b"hmac-sha2-256-etm@openssh.com"
_COMPRESSION = b"none"
_OFFER = (
    *(b"curve25519-sha256", b"ssh-ed25519", _CIPHER, _CIPHER, _MAC, _MAC),
    *(_COMPRESSION, _COMPRESSION, b"", b""),
)
_COOKIE = 16
_DISCONNECT, _IGNORE, _DEBUG, _SERVICE_REQUEST, _SERVICE_ACCEPT = 1, 2, 4, 5, 6
_KEXINIT, _NEWKEYS, _KEX_ECDH_INIT, _KEX_ECDH_REPLY = 20, 21, 30, 31


class Handshake:
    """One key exchange (RFC 8731, curve25519-sha256), with an ed25519 host key and AES-256-GCM.

    The host key's signature is verified, but not whose key that is. It is done when the server has
    answered to a request for ssh-userauth, encrypted with the new keys.
    """

    def __init__(self, random: Callable[[int], bytes]) -> None:
        """``random(n)`` are so many bytes."""
        self.done = False
        self._random = random
        self._buf = b""
        self._sent = self._got = 0
        self._sealer: Sealer = NullCipher(random)
        self._opener: Opener = NullCipher(random)
        self._version = self._kexinit = self._server_kexinit = b""
        self._secret = X25519PrivateKey.generate()
        self._public = self._secret.public_key().public_bytes_raw()

    def receive(self, data: bytes) -> bytes:
        """What has to be sent when the server has sent ``data``. Raises BenchError when it is not
        what leads to the end."""
        self._buf += data
        answer = b""
        if not self._version:
            line, found, rest = self._buf.partition(b"\n")
            if not found:
                return b""
            self._version, self._buf = line.removesuffix(b"\r"), rest
            if not self._version.startswith(b"SSH-2.0-"):
                raise BenchError(f"the server said {self._version!r}")
            answer = _VERSION + b"\r\n" + self._send_kexinit()
        while (payload := self._packet()) is not None:
            answer += self._handle(payload[0], payload[1:])
        return answer

    def _packet(self) -> bytes | None:
        """The next payload, when all of its packet is there."""
        head = self._buf[: self._opener.head_size]
        if len(head) < self._opener.head_size:
            return None
        size = self._opener.wire_size(self._got, head)
        if len(self._buf) < size:
            return None
        payload = self._opener.open(self._got, self._buf[:size])
        self._buf = self._buf[size:]
        self._got += 1
        return payload

    def _handle(self, number: int, payload: bytes) -> bytes:
        if number == _KEXINIT:
            self._server_kexinit = bytes((number,)) + payload
            return self._seal(_KEX_ECDH_INIT, NS(self._public))
        if number == _KEX_ECDH_REPLY:
            self._take_reply(payload)
            return b""
        if number == _NEWKEYS:
            newkeys = self._seal(_NEWKEYS)
            self._opener = make_opener(_CIPHER, _MAC, self._keys(b"BDF"))
            self._sealer = make_sealer(_CIPHER, _MAC, self._keys(b"ACE"), self._random)
            return newkeys + self._seal(_SERVICE_REQUEST, NS(b"ssh-userauth"))
        if number == _SERVICE_ACCEPT:
            self.done = True
            return b""
        if number in (_IGNORE, _DEBUG):
            return b""
        text = getNS(payload[4:])[0].decode(errors="replace") if number == _DISCONNECT else ""
        raise BenchError(f"the server sent message {number} {text}".rstrip())

    def _seal(self, number: int, payload: bytes = b"") -> bytes:
        packet = self._sealer.seal(self._sent, bytes((number,)) + payload)
        self._sent += 1
        return packet

    def _send_kexinit(self) -> bytes:
        # No guess follows; the last four bytes are reserved (RFC 4253, section 7.1).
        payload = self._random(_COOKIE) + b"".join(map(NS, _OFFER)) + bytes(5)
        self._kexinit = bytes((_KEXINIT,)) + payload
        return self._seal(_KEXINIT, payload)

    def _take_reply(self, payload: bytes) -> None:
        host_key, public, signature, _ = getNS(payload, 3)
        shared = self._secret.exchange(X25519PublicKey.from_public_bytes(public))
        self._shared: bytes = MP(int.from_bytes(shared, "big"))
        hashed = (_VERSION, self._version, self._kexinit, self._server_kexinit)
        strings = (*hashed, host_key, self._public, public)
        self._digest = sha256(b"".join(map(NS, strings)) + self._shared).digest()
        if not Key.fromString(host_key, type="BLOB").verify(signature, self._digest):
            raise BenchError("the host key's signature is wrong")

    def _keys(self, letters: bytes) -> Keys:
        """RFC 4253, section 7.2: IV, key and MAC key, of 32 bytes each."""
        # The digest of the first exchange is the session's id, too.
        return Keys(
            *(
                sha256(self._shared + self._digest + bytes((letter,)) + self._digest).digest()
                for letter in letters
            )
        )
