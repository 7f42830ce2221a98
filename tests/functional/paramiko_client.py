"""An ssh client made of paramiko, for the tests: its own standard streams are the session's."""

from __future__ import annotations

import argparse
import os
import sys
import threading
import tty

import paramiko
from paramiko.packet import Packetizer

# Seconds for the server to answer.
_PATIENCE = 20.0
_ATTRIBUTES = {"ciphers": "cipher", "macs": "mac", "kex": "kex"}
# Bytes, one way, until which it asks for new keys. paramiko waits for itself when the server's
# last words cross its request (its issue 822), so there must be none near the end.
_REKEY_UNTIL = 64 << 20


class _Traffic:
    """Counts what goes one way, and ends the requests for new keys in time."""

    def __init__(self) -> None:
        self._bytes = 0

    def count(self, size: int) -> None:
        self._bytes += size
        if self._bytes >= _REKEY_UNTIL:
            Packetizer.REKEY_BYTES = sys.maxsize


def _without(options: argparse.Namespace) -> dict[str, list[str]]:
    # paramiko takes what not to offer.
    disabled = {}
    for kind, option in _ATTRIBUTES.items():
        wanted = getattr(options, option)
        if wanted:
            known = getattr(paramiko.Transport, f"_preferred_{kind}")
            disabled[kind] = [name for name in known if name != wanted]
    return disabled


def _send(channel: paramiko.Channel) -> None:
    traffic = _Traffic()
    while data := os.read(0, 32768):
        channel.sendall(data)
        traffic.count(len(data))
    channel.shutdown_write()


def main() -> int:
    """Run a command line, or the shell; the result is its exit status."""
    parser = argparse.ArgumentParser()
    for name in ("port", "key", "known-hosts", "cipher", "mac", "kex", "rekey"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--terminal", action="store_true")
    parser.add_argument("words", nargs="*")
    options = parser.parse_args()
    if options.rekey != "0":
        Packetizer.REKEY_BYTES = int(options.rekey)
    client = paramiko.SSHClient()
    client.load_host_keys(options.known_hosts)
    client.connect(
        "127.0.0.1",
        int(options.port),
        "vmproxy",
        key_filename=options.key,
        allow_agent=False,
        look_for_keys=False,
        timeout=_PATIENCE,
        disabled_algorithms=_without(options),
    )
    transport = client.get_transport()
    assert transport is not None
    channel = transport.open_session(timeout=_PATIENCE)
    if options.terminal:
        channel.get_pty()
        tty.setraw(0)
    if options.words:
        channel.exec_command(" ".join(options.words))
    else:
        channel.invoke_shell()
    threading.Thread(target=_send, args=(channel,), daemon=True).start()
    traffic = _Traffic()
    while data := channel.recv(65536):
        traffic.count(len(data))
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    while data := channel.recv_stderr(65536):
        sys.stderr.buffer.write(data)
    return channel.recv_exit_status()


if __name__ == "__main__":
    sys.exit(main())
