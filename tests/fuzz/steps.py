"""Steps, fields and edits: how a program becomes bytes."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any

from twisted.conch.ssh.common import NS

from tests.fuzz.authority import certificate
from tests.fuzz.keyring import Known, sign

Step = list[Any]
Program = list[Step]


class NoChannel(Exception):
    """A packet is for a channel, and none is open."""


class Maker:
    """Makes payloads of fields. ``user`` is whom certificates are for, ``now`` is the
    time of day by which they count; ``numbers`` are the server's of the channels that are open."""

    def __init__(self, ring: dict[str, Known], user: bytes, now: Callable[[], float]) -> None:
        self._ring, self._user, self._now = ring, user, now
        self._next = 0
        self.session = b""
        self.host_keys: list[bytes] = []
        """The blobs of the server's host keys."""

    def payload(self, fields: Sequence[Sequence[Any]], numbers: Sequence[int]) -> bytes:
        """The fields, one behind the other. Raises NoChannel."""
        made = b""
        for kind, *values in fields:
            made += self._field(kind, values, numbers, made)
        return made

    def _field(self, kind: str, values: list[Any], numbers: Sequence[int], before: bytes) -> bytes:
        if kind == "b":
            return bytes.fromhex(values[0])
        if kind == "s":
            return NS(bytes.fromhex(values[0]))
        if kind == "c":
            return bytes((values[0] & 0xFF,))
        if kind == "u":
            return struct.pack(">L", values[0] & 0xFFFFFFFF)
        if kind == "chan":
            if not numbers:
                raise NoChannel
            return struct.pack(">L", numbers[values[0] % len(numbers)])
        if kind == "new":
            self._next += 1
            return struct.pack(">L", self._next)
        if kind == "key":
            return NS(self._ring[values[0]].blob)
        if kind == "hostkey":
            # One behind the last is none of them.
            blobs = [*self.host_keys, self._ring["alice"].blob]
            return NS(blobs[values[0] % len(blobs)])
        if kind == "cert":
            name, how = values
            return NS(certificate(self._ring[name], self._user, how, self._now()))
        if kind == "sig":
            name, algorithm, how = values
            message = NS(self.session) + before
            return NS(sign(self._ring[name], message, algorithm.encode(), how))
        raise ValueError(f"there is no field {kind!r}")
