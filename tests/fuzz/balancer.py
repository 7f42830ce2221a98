"""PROXY headers (HAProxy's doc/proxy-protocol.txt), and how the harness itself reads them."""

from __future__ import annotations

import re
import socket
import struct
from collections.abc import Sequence
from enum import Enum, auto
from itertools import pairwise
from random import Random
from typing import Any, NamedTuple

from tests.fuzz.channels import Wrong
from tests.fuzz.edits import edit
from tests.fuzz.grammar import Grammar, hello
from tests.fuzz.handshakes import Handshakes
from tests.fuzz.peer import ServerEnd
from tests.fuzz.steps import Program

HOME = ("198.51.100.7", "198.51.100.255", "2001:db8:7::1")
"""Addresses from which the key ``home`` may be used."""
_ABROAD = ("198.51.101.7", "203.0.113.9", "2001:db9::1", "::1", "::ffff:203.0.113.9")
_SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
_LINE = 107
_FIXED = 16
# The server's own bound: a balancer that adds more than this is not set up for ssh.
_LONGEST = 4096
_IP4 = rb"(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_TCP4 = re.compile(
    rb"PROXY TCP4 ((?:%b\.){3}%b) (?:%b\.){3}%b ([0-9]{1,4}) [0-9]{1,4}" % ((_IP4,) * 4)
)
_TCP6 = re.compile(rb"PROXY TCP6 ([0-9a-f:]+) [0-9a-f:]+ ([0-9]{1,4}) [0-9]{1,4}")
_FAMILIES = {b"TCP4": socket.AF_INET, b"TCP6": socket.AF_INET6}
# Command and family -> bytes of the addresses.
_V2_KNOWN = {(0x21, 0x11): 12, (0x21, 0x21): 36}
_GRACE = 31.0


class Verdict(Enum):
    """What is to become of a header."""

    GOOD = auto()
    BAD = auto()
    MORE = auto()
    """It is not whole."""
    LAX = auto()
    """The specification forbids it, and it does no harm: refused, or read for what it says."""


class Judged(NamedTuple):
    """``address`` is the client's, None for the balancer's own connection."""

    verdict: Verdict
    address: str | None = None
    size: int = 0


_BAD, _MORE = Judged(Verdict.BAD), Judged(Verdict.MORE)


def judge_header(data: bytes) -> Judged:
    """What the specification says of the bytes at the beginning of a connection."""
    if data[:12] == _SIGNATURE[: len(data)]:
        return _judge_v2(data) if len(data) >= _FIXED else _MORE
    if data[:6] == b"PROXY "[: len(data)]:
        return _judge_v1(data)
    return _BAD


def _judge_v1(data: bytes) -> Judged:
    line, end, _ = data[:_LINE].partition(b"\r\n")
    size = len(line) + 2
    if not end:
        return _BAD if len(data) >= _LINE else _MORE
    words = line.split(b" ")
    if words[1] == b"UNKNOWN":
        return Judged(Verdict.GOOD, None, size)
    family = _FAMILIES.get(words[1])
    if family is None or len(words) != 6:
        return _BAD
    try:
        source = socket.inet_ntop(family, socket.inet_pton(family, words[2].decode("latin-1")))
    except (OSError, ValueError):
        # Some have a zone.
        return Judged(Verdict.LAX, words[2].decode("latin-1"), size) if b"%" in line else _BAD
    strict = (_TCP4 if words[1] == b"TCP4" else _TCP6).fullmatch(line)
    return Judged(Verdict.GOOD if strict else Verdict.LAX, source, size)


def _judge_v2(data: bytes) -> Judged:
    command, family, length = struct.unpack(">BBH", data[12:_FIXED])
    size = _FIXED + length
    if command not in (0x20, 0x21) or size > _LONGEST:
        return _BAD
    if len(data) < size:
        return _MORE
    needed = _V2_KNOWN.get((command, family))
    if needed is None:
        return Judged(Verdict.GOOD, None, size)
    if length < needed:
        return _BAD
    kind, width = (socket.AF_INET, 4) if needed == 12 else (socket.AF_INET6, 16)
    return Judged(Verdict.GOOD, socket.inet_ntop(kind, data[_FIXED : _FIXED + width]), size)


def v1(address: str) -> bytes:
    """A header of version 1."""
    kind, ours = ("TCP6", "2001:db8::1") if ":" in address else ("TCP4", "192.0.2.1")
    return f"PROXY {kind} {address} {ours} 4711 2222\r\n".encode()


def v2(address: str, more: bytes = b"", command: int = 0x21) -> bytes:
    """A header of version 2, with ``more`` behind the addresses."""
    family, kind = (socket.AF_INET6, 0x21) if ":" in address else (socket.AF_INET, 0x11)
    packed = socket.inet_pton(family, address)
    body = packed + bytes(len(packed)) + struct.pack(">HH", 4711, 2222) + more
    return _SIGNATURE + struct.pack(">BBH", command, kind, len(body)) + body


def _tlvs(random: Random) -> bytes:
    made = b""
    for _ in range(random.choice((0, 0, 1, 3))):
        value = random.randbytes(random.choice((0, 4, 40, 40, 2000)))
        size = len(value) if random.random() < 0.8 else random.getrandbits(16)
        made += struct.pack(">BH", random.choice((1, 2, 3, 4, 5, 0x20, 0x30, 0xEE)), size) + value
    return made


def make_header(random: Random) -> bytes:
    """A header, mostly as it should be."""
    address = random.choice(HOME if random.random() < 0.5 else _ABROAD)
    roll = random.random()
    if roll < 0.3:
        return v1(address)
    if roll < 0.7:
        return v2(address, _tlvs(random))
    if roll < 0.78:
        return v2(address, _tlvs(random), 0x20)
    if roll < 0.84:
        family = random.choice((0, 0x12, 0x22, 0x31, 0x32, 0x51, random.getrandbits(8)))
        size = random.choice((0, 11, 12, 36, 216, 4080, 4081, 65535))
        return _SIGNATURE + struct.pack(">BBH", 0x21, family, size) + bytes(min(size, 5000))
    if roll < 0.9:
        return random.choice((b"PROXY UNKNOWN\r\n", b"PROXY UNKNOWN a b\r\n", b"PROXY UNKNOWN "))
    words = [b"PROXY", random.choice((b"TCP4", b"TCP6", b"TCP5", b"")), address.encode()]
    words += random.choices((b"192.0.2.1", b"22", b"70000", b"-1", b"x", b"", b"\xff"), k=3)
    return b" ".join(words[: random.choice((2, 5, 6, 6, 6))]) + b"x" * random.choice((0, 0, 99))


def proxy_program(grammar: Grammar, length: int) -> Program:
    """A balancer's header, whole or not, in pieces or not, and a client's login behind it."""
    random = grammar.random
    header = make_header(random)
    if header[:6] == b"PROXY " and not header.endswith(b"\n") and random.random() < 0.7:
        header += b"\r\n"
    if random.random() < 0.3:
        header = edit(header, Handshakes(grammar).edits())
        # What is behind it would be the client's.
        header = header[: judge_header(header).size or len(header)]
    cuts = sorted(random.randrange(len(header) + 1) for _ in range(random.choice((0, 0, 1, 3, 9))))
    first = hello(random)
    if random.random() < 0.2:
        first = ["stranger", Handshakes(grammar).line().hex()]
    program: Program = [["proxied", header.hex(), cuts, int(random.random() < 0.5), first]]
    while len(program) < random.randrange(1, length):
        program.append(grammar.login("home") if random.random() < 0.6 else grammar.attempt())
    return program


def present(
    receiver: Any, end: ServerEnd, header: bytes, cuts: Sequence[int], clock: Any, hold: bool
) -> tuple[Judged, bytes]:
    """Send a header in pieces: what is to be thought of it, and what of it was not sent yet.

    With ``hold`` the last piece of a good one waits for what the client says. Raises Wrong when the
    server says something before the header is whole, or takes it for what it is not.
    """
    judged = judge_header(header)
    places = [0, *cuts, len(header)]
    pieces = [header[at:to] for at, to in pairwise(places)]
    last = pieces.pop() if hold and judged.verdict is Verdict.GOOD else b""
    sent = b""
    for piece in pieces:
        sent += piece
        if piece and not end.disconnecting:
            receiver.dataReceived(piece)
        if end.stream and judge_header(sent).verdict in (Verdict.BAD, Verdict.MORE):
            raise Wrong("proxy", f"the server speaks, and has of its header {sent!r}")
    if judged.verdict is Verdict.BAD and not end.disconnecting:
        raise Wrong("proxy", f"this header was taken, or is waited for: {header!r}")
    if judged.verdict is Verdict.GOOD and end.disconnecting:
        raise Wrong("proxy", f"this header was refused: {header!r}")
    if judged.verdict is Verdict.MORE:
        clock.advance(_GRACE)
        if end.stream or not end.disconnecting:
            raise Wrong("proxy", f"half a header is waited for without an end: {header!r}")
    return judged, last
