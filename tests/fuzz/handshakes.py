"""Programs for what comes before the login: bytes, version lines, and handshakes with mistakes."""

from __future__ import annotations

import struct
from random import Random
from typing import Any

from twisted.conch.ssh.common import NS

from tests.fuzz.grammar import HELLO, Grammar, hello, string
from tests.fuzz.steps import Program, Step

_LINES = (
    HELLO,
    b"SSH-1.99-x",
    b"SSH-2.0",
    b"SSH-",
    b"SSH-1.5-x",
    b"SSH-2.0-",
    b"SSH--",
    b"SSH-\xff-\xff",
    b"GET / HTTP/1.1",
    b"\x16\x03\x01\x02\x00",
    b"",
)
_ALGORITHMS: tuple[tuple[bytes, ...], ...] = (
    (
        *(b"mlkem768x25519-sha256", b"curve25519-sha256", b"curve25519-sha256@libssh.org"),
        *(b"ext-info-c", b"kex-strict-c-v00@openssh.com", b"ext-info-s", b"ecdh-sha2-nistp256"),
        *(b"diffie-hellman-group-exchange-sha256", b"diffie-hellman-group14-sha1"),
    ),
    (b"ssh-ed25519", b"rsa-sha2-512", b"ssh-rsa", b"ssh-ed25519-cert-v01@openssh.com"),
    (
        *(b"aes256-ctr", b"aes128-ctr", b"aes256-gcm@openssh.com", b"aes128-gcm@openssh.com"),
        *(b"chacha20-poly1305@openssh.com", b"none", b"3des-cbc"),
    ),
    (
        *(b"hmac-sha2-256", b"hmac-sha2-512", b"hmac-sha2-256-etm@openssh.com"),
        *(b"hmac-sha2-512-etm@openssh.com", b"none", b"hmac-md5"),
    ),
    (b"none", b"zlib", b"zlib@openssh.com"),
    (b"", b"en"),
)
# Which of these each name list of a KEXINIT is made of (RFC 4253, section 7.1).
_LISTS = (0, 1, 2, 2, 3, 3, 4, 4, 5, 5)
_NUMBERS = (1, 2, 3, 4, 5, 6, 7, 20, 21, 30, 31, 32, 33, 34, 50, 51, 80, 90, 94, 98, 100, 192, 255)
_MOST_TAMPERS = 3


class Handshakes:
    """All its choices come from the grammar's random."""

    def __init__(self, grammar: Grammar) -> None:
        self._grammar = grammar
        self._random: Random = grammar.random

    def line(self) -> bytes:
        """A version line, perhaps, and its end, perhaps."""
        random = self._random
        if random.random() < 0.7:
            return HELLO + b"\r\n"
        line = random.choice(_LINES)
        roll = random.random()
        if roll < 0.2:
            line = line[:3] + self._grammar.junk() + line[3:]
        elif roll < 0.3:
            line = (
                b"\r\n".join(random.choices((b"hello", b"", b"SSH", b"\0"), k=3)) + b"\r\n" + line
            )
        elif roll < 0.35:
            line += b"x" * random.choice((200, 250, 255, 4000, 4090, 5000, 70000))
        return line + random.choice((b"\r\n", b"\r\n", b"\n", b"\r", b"\0\r\n", b""))

    def kexinit(self) -> list[list[Any]]:
        """A KEXINIT with some of the names there are, and some that there are not."""
        random = self._random
        fields: list[list[Any]] = [["c", 20], ["b", bytes(16).hex()]]
        for which in _LISTS:
            known = _ALGORITHMS[which]
            names = list(known) if random.random() < 0.7 else random.sample(known, len(known) // 2)
            if random.random() < 0.1:
                names.insert(random.randrange(len(names) + 1), self._grammar.junk(80))
            fields.append(string(b",".join(names)))
        follows = random.random() < 0.1
        return [*fields, ["c", int(follows)], ["u", 0]]

    def kex(self) -> list[list[Any]]:
        """The client's first packet of a key exchange; X25519, ML-KEM, or neither."""
        size = self._random.choice((32, 32, 1216, 0, 31, 33, 65, 20000))
        share = self._random.choice((bytes(size), self._random.randbytes(size)))
        return [["c", self._random.choice((30, 30, 30, 31, 32, 34))], string(share)]

    def packet(self) -> list[list[Any]]:
        """Any packet."""
        roll = self._random.random()
        if roll < 0.3:
            return self.kexinit()
        if roll < 0.5:
            return self.kex()
        if roll < 0.7:
            return [["c", 21]]
        number = self._random.choice(_NUMBERS)
        return [["c", number], ["b", self._grammar.junk(300).hex()]]

    def edits(self) -> list[list[Any]]:
        """A few edits."""
        random = self._random
        some: list[list[Any]] = []
        for _ in range(random.choice((1, 1, 1, 2, 4))):
            at = random.choice((random.randrange(40), random.getrandbits(16)))
            kind = random.choice(("flip", "flip", "cut", "add", "put", "drop"))
            values: dict[str, list[Any]] = {
                "flip": [at, 1 << random.randrange(8)],
                "cut": [at],
                "add": [self._grammar.junk().hex()],
                "put": [at, self._grammar.junk(8).hex()],
                "drop": [at, random.choice((1, 1, 4, 16))],
            }
            some.append([kind, *values[kind]])
        return some

    def tampers(self) -> list[list[Any]]:
        """What is done to the packets of a handshake."""
        random = self._random
        made = []
        for ordinal in random.sample(range(5), random.choice((1, 1, 1, 2, _MOST_TAMPERS))):
            how = random.choice(
                ("drop", "twice", "edit", "edit", "wire", "before", "after", "instead")
            )
            if how in ("edit", "wire"):
                made.append([ordinal, how, self.edits()])
            elif how in ("before", "after", "instead"):
                made.append([ordinal, how, self.packet()])
            else:
                made.append([ordinal, how])
        return made

    def plain(self) -> Step:
        """A packet in the clear, whose head may lie."""
        random, grammar = self._random, self._grammar
        number = random.choice(_NUMBERS)
        payload = random.choice(
            (
                self._kexinit_bytes(),
                bytes((number,)) + grammar.junk(300),
                # A key share that ML-KEM takes, and one that it does not.
                b"\x1e" + NS(bytes(1184) + random.randbytes(32)),
                b"\x1e" + NS(random.randbytes(random.choice((32, 1216)))),
            )
        )
        padding = 8 - (5 + len(payload)) % 8
        padding += 8 if padding < 4 else 0
        length = 1 + len(payload) + padding
        if random.random() < 0.3:
            length = random.choice((0, 1, 4, 5, 8, 12, length + 8, 35000, 2**20, 2**31, 2**32 - 1))
        if random.random() < 0.2:
            padding = random.choice((0, 1, 3, 255, padding))
        return ["plain", length, padding, (payload + bytes(padding)).hex()]

    def _kexinit_bytes(self) -> bytes:
        lists = b"".join(NS(b",".join(_ALGORITHMS[which])) for which in _LISTS)
        return b"\x14" + bytes(16) + lists + struct.pack(">BL", 0, 0)


def bytes_program(grammar: Grammar, length: int) -> Program:
    """Bytes, a version line or what is none, and packets in the clear."""
    random, handshakes = grammar.random, Handshakes(grammar)
    program: Program = [["stranger", handshakes.line().hex()]]
    if random.random() < 0.03:
        # A packet that is larger than anybody needs before the login, and whose end never comes.
        line = (HELLO + b"\r\n").hex()
        endless = ["repeat", 48, [["raw", bytes(8192).hex()]]]
        return [
            ["stranger", line],
            ["plain", random.choice((34004, 2**19 - 4, 2**20 - 4)), 8, ""],
            endless,
        ]
    for _ in range(random.randrange(min(length, 12))):
        if random.random() < 0.25:
            program.append(["raw", grammar.junk(400).hex()])
        elif random.random() < 0.05:
            program.append(["sleep", random.choice((1, 29, 31))])
        else:
            program.append(handshakes.plain())
    return program


def handshake_program(grammar: Grammar, length: int) -> Program:
    """A handshake with mistakes, and what a client would say then."""
    random, handshakes = grammar.random, Handshakes(grammar)
    program: Program = [hello(random, *handshakes.tampers())]
    if random.random() < 0.3:
        program = [hello(random), grammar.login()][: random.choice((1, 2))]
        program += [grammar.anything() for _ in range(random.randrange(3))]
        if random.random() < 0.6:
            program.append(["wire", grammar.request()[1], handshakes.edits()])
        else:
            program.append(["raw", grammar.junk(400).hex()])
    for _ in range(random.randrange(min(length, 8))):
        if random.random() < 0.5:
            program.append(["send", handshakes.packet(), [], int(random.random() < 0.3)])
        else:
            program.append(grammar.attempt())
    return program
