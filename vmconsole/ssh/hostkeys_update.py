"""Clients learn of all host keys, so that one can be replaced. OpenSSH's PROTOCOL, section 2.5."""

from __future__ import annotations

import struct

from twisted.conch.ssh.common import NS, getNS

from vmconsole.ssh.certificates import CERTIFICATE_ALGORITHMS
from vmconsole.ssh.hostkeys import HostKeys

ANNOUNCE = b"hostkeys-00@openssh.com"
PROVE = b"hostkeys-prove-00@openssh.com"
# A client asks once. Each signature costs us time, an RSA key's some milliseconds.
_MOST_REQUESTS = 2


class HostKeysUpdate:
    """Announces the host keys on one connection, and proves that we have them.

    ``algorithm`` is the host key algorithm of the connection's first key exchange.
    """

    def __init__(self, host_keys: HostKeys, session_id: bytes, algorithm: bytes) -> None:
        self._keys = {key.public().blob(): key for key in host_keys.keys}
        self._session_id = session_id
        self._algorithm = CERTIFICATE_ALGORITHMS.get(algorithm, (b"", algorithm))[1]
        self._requests = 0

    def announcement(self) -> bytes:
        """The data of the global request ANNOUNCE: all public keys, and no certificate."""
        return b"".join(NS(blob) for blob in self._keys)

    def prove(self, data: bytes) -> bytes | None:
        """The answer to PROVE, a signature for each key in ``data``; None: the request fails.

        It does for a key that is not ours, for more keys than there are, and for a client that
        asks again and again.
        """
        self._requests += 1
        if self._requests > _MOST_REQUESTS:
            return None
        blobs = []
        while data:
            try:
                blob, data = getNS(data)
            except struct.error:
                return None
            blobs.append(blob)
            if blob not in self._keys or len(blobs) > len(self._keys):
                return None
        return b"".join(NS(self._sign(blob)) for blob in blobs) or None

    def _sign(self, blob: bytes) -> bytes:
        key = self._keys[blob]
        algorithm = key.sshType()
        if algorithm == b"ssh-rsa":
            # As OpenSSH's client expects it: of the key exchange, if that was by RSA.
            by_rsa = self._algorithm.startswith(b"rsa-sha2-")
            algorithm = self._algorithm if by_rsa else b"rsa-sha2-512"
        signed = NS(PROVE) + NS(self._session_id) + NS(blob)
        signature: bytes = key.sign(signed, algorithm)
        return signature
