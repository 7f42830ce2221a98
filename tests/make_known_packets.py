"""Makes tests/known_packets.json: what asyncssh puts on the wire with keys that are fixed.

    python -m tests.make_known_packets > tests/known_packets.json

What is sent is the code of asyncssh's connection; only its random padding is fixed, too.
"""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from asyncssh.connection import SSHConnection
from asyncssh.encryption import get_encryption, get_encryption_params

IV, KEY, MAC_KEY = (bytes(range(start, start + 64)) for start in (0, 64, 128))
# Number of each payload, and the payload: the third begins where sequence numbers start again.
PACKETS = (
    (0, b"\x05\x00\x00\x00\x0cssh-userauth"),
    (1, b"\x5e\x00\x00\x00\x00\x00\x00\x00\x01l"),
    (0xFFFFFFFF, b"\x02" + bytes(range(256))),
    (0, b"\x14"),
)
ALGORITHMS = (
    ("aes128-gcm@openssh.com", ""),
    ("aes256-gcm@openssh.com", ""),
    ("chacha20-poly1305@openssh.com", ""),
    *(
        (cipher, mac)
        for cipher in ("aes128-ctr", "aes192-ctr", "aes256-ctr")
        for mac in (
            "hmac-sha2-256-etm@openssh.com",
            "hmac-sha2-512-etm@openssh.com",
            "hmac-sha2-256",
            "hmac-sha2-512",
        )
    ),
)


def wire(cipher: str, mac: str) -> list[str]:
    """The packets in hex, one after the other on one direction of a connection."""
    names = cipher.encode(), mac.encode()
    key_size, iv_size, block_size, mac_size, _, etm = get_encryption_params(*names)
    sent: list[bytes] = []
    connection: Any = SimpleNamespace(
        _send_encryption=get_encryption(
            names[0], KEY[:key_size], IV[:iv_size], names[1], MAC_KEY[:mac_size], etm
        ),
        # As its _send_newkeys sets them.
        _send_enchdrlen=1 if etm else 5,
        _send_blocksize=max(8, block_size),
        _auth_complete=True,
        _kex_complete=True,
        _rekey_bytes=1 << 30,
        _rekey_bytes_sent=0,
        _rekey_seconds=0,
        # It would send an empty message before each, against the analysis of traffic.
        send_packet=lambda *_: None,
        _compressor=None,
        _strict_kex=False,
        _send=sent.append,
        log_sent_packet=lambda *_: None,
    )
    with patch("os.urandom", lambda size: bytes(range(size))):
        for sequence, payload in PACKETS:
            connection._send_seq = sequence
            SSHConnection.send_packet(connection, payload[0], payload[1:], handler=None)
    return [packet.hex() for packet in sent]


def main() -> None:
    """Print the file."""
    known = {f"{cipher} {mac}".strip(): wire(cipher, mac) for cipher, mac in ALGORITHMS}
    json.dump(known, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
