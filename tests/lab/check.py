"""Tries the lab out: both kinds of guests, through libvirt's own client, over TLS."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import libvirt

from tests.lab.errors import LabError
from tests.lab.guests import LIGHT_PROMPT, LightGuest, LinuxGuest
from tests.lab.host import LibvirtHost

_TIMEOUT = 60.0
_ALL_BYTES = bytes(range(256))


class Console:
    """One guest's console, on a connection of its own."""

    def __init__(self, uri: str, name: str) -> None:
        """Open it. Raises libvirt.libvirtError."""
        self._received = bytearray()
        self._connection = libvirt.open(uri)
        self._stream = self._connection.newStream(libvirt.VIR_STREAM_NONBLOCK)
        self._connection.lookupByName(name).openConsole(None, self._stream)
        self._stream.eventAddCallback(libvirt.VIR_STREAM_EVENT_READABLE, self._readable, None)

    def send(self, data: bytes) -> None:
        """Type this."""
        self._stream.send(data)

    def expect(self, wanted: bytes) -> bytes:
        """Take output up to and with ``wanted``. Raises LabError when it does not come."""
        deadline = time.monotonic() + _TIMEOUT
        while wanted not in self._received:
            if time.monotonic() > deadline:
                raise LabError(f"expected {wanted!r}, received {bytes(self._received)!r}")
            libvirt.virEventRunDefaultImpl()
        end = self._received.index(wanted) + len(wanted)
        taken = bytes(self._received[:end])
        del self._received[:end]
        return taken

    def close(self) -> None:
        """Leave it: unless the stream is ended, the host keeps the console occupied."""
        self._stream.eventRemoveCallback()
        self._stream.abort()
        self._connection.close()

    def _readable(self, stream: libvirt.virStream, _events: int, _opaque: object) -> None:
        while isinstance(data := stream.recv(65536), bytes) and data:
            self._received += data


def check(host: LibvirtHost) -> None:
    """Print what was tried and how long it took. Raises LabError or libvirt.libvirtError."""
    libvirt.virEventRegisterDefaultImpl()
    # So that a wait for output ends at its deadline though nothing comes.
    libvirt.virEventAddTimeout(100, lambda *_: None, None)
    with _timed("light guest: started"):
        host.run(LightGuest("check-light"))
    with _timed("light guest: console opened, echo"):
        console = Console(host.uri, "check-light")
        console.send(b"\0")
        console.expect(b"\0")
    with _timed("light guest: prompt after a reset"):
        host.reset("check-light")
        console.expect(LIGHT_PROMPT)
    with _timed("light guest: all 256 byte values echoed"):
        console.send(_ALL_BYTES)
        if console.expect(_ALL_BYTES) != _ALL_BYTES:
            raise LabError("the echo has more than was sent")
        console.close()
    with _timed("Linux guest: started"):
        host.run(LinuxGuest("check-linux"))
    with _timed("Linux guest: login prompt"):
        console = Console(host.uri, "check-linux")
        console.expect(b"check-linux login: ")
    with _timed("Linux guest: shell"):
        console.send(b"root\n")
        console.expect(b"# ")
        console.send(b"echo hello-$((6*7))\n")
        console.expect(b"hello-42")
        console.close()
    for name in ("check-light", "check-linux"):
        with _timed(f"{name}: removed"):
            host.remove(name)


@contextmanager
def _timed(what: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    print(f"{time.monotonic() - start:7.2f} s  {what}", flush=True)
