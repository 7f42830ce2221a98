"""Texts that an operator or an engine writes: revocation lists, lines of authorized_keys, ports;
and those of ``texts_trust.py``.

The first step is ``["texts", WHICH]``; then ``["line", HEX, MEANING]`` for each line. MEANING is
what the line says, null when a mistake was made in it: it may be refused then, with the parser's
own error, but never change what the other lines say.
"""

from __future__ import annotations

from base64 import b64encode
from collections import Counter
from fnmatch import fnmatchcase
from hashlib import sha256
from ipaddress import ip_address, ip_network
from random import Random
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.serialization import SSHCertificateType
from twisted.conch.ssh.common import NS
from twisted.internet.testing import MemoryReactorClock

from tests.fuzz.channels import Wrong
from tests.fuzz.edits import edit
from tests.fuzz.grammar import Grammar
from tests.fuzz.handshakes import Handshakes
from tests.fuzz.play import Finding, judged
from tests.fuzz.steps import Program, Step
from tests.fuzz.texts_trust import (
    authority_line,
    host_file,
    read_authorities,
    read_host_files,
)
from tests.fuzz.world import World
from vmconsole.engine.keyline import parse_key_line
from vmconsole.errors import ConfigError
from vmconsole.keyoptions import parse_key_options
from vmconsole.ssh.certificates import Certificate
from vmconsole.ssh.factory import make_endpoint
from vmconsole.ssh.revocation import RevocationList

KEYS = 6
_LARGEST = 2**64 - 1
_IDS = ("alice@laptop", "x y", "serial: 7", "\u00e9", "key:")
_PROBES = (
    *("198.51.100.7", "198.51.101.7", "203.0.113.9", "10.0.0.1", "10.0.0.12", "127.0.0.1"),
    *("2001:db8:7::1", "2001:db8:8::1", "::1", "::ffff:10.0.0.1"),
)
_PATTERNS = (
    *("198.51.100.0/24", "198.51.100.7", "10.0.0.?", "10.0.0.*", "198.*", "*", "2001:db8:7::/48"),
    *("2001:db8:*", "203.0.113.9/32", "0.0.0.0/0", "::/0", "console.example.org"),
)
_TIMES = {"19700101000140Z": 100.0, "20991231Z": 4102358400.0, "197001020000Z": 86400.0}
_PORTS = (
    *("tcp:2222", "tcp:2222:interface=127.0.0.1", "tcp6:2222:interface=\\:\\:1", "tcp:ssh"),
    *("unix:/run/x:mode=660", "systemd:domain=INET:index=0", "haproxy:tcp:22", "fd:3", "ssl:22"),
    *("tcp:2222:backlog=x", "tcp", "tcp:", ":", "", "tls:22", "stdio:", "autobahn:x"),
)


def key(number: int) -> bytes:
    """The blob of one of the keys that lines are about."""
    private = ed25519.Ed25519PrivateKey.from_private_bytes(bytes((number,)) * 32)
    return NS(b"ssh-ed25519") + NS(private.public_key().public_bytes_raw())


def _key_line(number: int) -> str:
    return f"ssh-ed25519 {b64encode(key(number)).decode()}"


def _fingerprint(number: int) -> str:
    return "SHA256:" + b64encode(sha256(key(number)).digest()).decode().rstrip("=")


def revocation_line(random: Random) -> tuple[str, list[Any]]:
    """A line of a revocation list, and what it says."""
    roll = random.random()
    number = random.randrange(KEYS)
    if roll < 0.2:
        return _key_line(number) + random.choice(("", " a comment", "  # x")), ["key", number]
    if roll < 0.3:
        name = random.choice(("hash: ", "", "HASH:"))
        return name + _fingerprint(number), ["key", number]
    if roll < 0.4:
        name = random.choice(("key: ", "sha256: ", "SHA1:"))
        return name + _key_line(number), ["key", number]
    if roll < 0.55:
        text = random.choice(_IDS)
        return f"id: {text}", ["id", text]
    if roll < 0.6:
        return random.choice(("", "# nothing", "   ", "\t#")), ["nothing"]
    first = random.choice((1, 7, 1000, 2**32, 2**63, _LARGEST))
    last = min(_LARGEST, first + random.choice((0, 0, 1, 500, 2**40)))
    shown = hex(first) if random.random() < 0.3 else str(first)
    if last == first:
        return f"serial: {shown}", ["serial", first, last]
    middle = random.choice(("-", " - ", "\t-"))
    return f"serial:{shown}{middle}{last}", ["serial", first, last]


def options_line(random: Random) -> tuple[str, list[Any]]:
    """A line of authorized_keys with options, and from where and until when it lets in."""
    patterns: list[str] = []
    for pattern in random.sample(_PATTERNS, random.choice((0, 1, 2, 4))):
        excluded = random.random() < 0.25 and pattern != "console.example.org"
        patterns.append("!" + pattern if excluded else pattern)
    options = [f'from="{",".join(patterns)}"'] if patterns else []
    times = random.sample(sorted(_TIMES), random.choice((0, 0, 1, 2)))
    options += [f'expiry-time="{each}"' for each in times]
    options += random.sample(("restrict", "no-pty", "no-user-rc", "No-Port-Forwarding"), 1)
    random.shuffle(options)
    known = "no-pty" not in options
    meaning = ["allows", patterns, min((_TIMES[each] for each in times), default=None)]
    return f"{','.join(options)} {_key_line(0)} x", meaning if known else ["refused"]


def port_line(random: Random) -> tuple[str, list[Any] | None]:
    """What ``ssh.listen`` may have."""
    return random.choice(_PORTS), None


_LINES = {
    "authorities": authority_line,
    "options": options_line,
    "ports": port_line,
    "revocation": revocation_line,
}
_HOST_FILES = "host"


def texts_program(grammar: Grammar, length: int) -> Program:
    """Some lines, mistakes in a few."""
    random = grammar.random
    which = random.choice(sorted((*_LINES, _HOST_FILES)))
    rate = random.choice((0.0, 0.1, 0.6))
    program: Program = [["texts", which]]
    for _ in range(random.randrange(1, length)):
        if which == _HOST_FILES:
            program.append(host_file(random, Handshakes(grammar), rate))
            continue
        text, meaning = _LINES[which](random)
        data = text.encode()
        if random.random() < rate:
            data, meaning = edit(data, Handshakes(grammar).edits()), None
        program.append(["line", data.hex(), meaning])
    return program


class TextPlay:
    """One program; no connection."""

    def __init__(self, world: World, endings: Counter[str]) -> None:
        self._world, self._endings = world, endings
        self.packets = 0
        self.servers: list[Any] = []

    def run(self, program: Program) -> Finding | None:
        """Read the lines. The finding, if there is one."""
        steps = program[1:]
        self.packets += len(steps)
        return judged(lambda _: getattr(self, f"_read_{program[0][1]}")(steps))

    # --- a revocation list, which is read as a whole

    def _read_revocation(self, steps: list[Step]) -> None:
        content = b"\n".join(bytes.fromhex(step[1]) for step in steps)
        meanings = [step[2] for step in steps]
        whole = None not in meanings
        try:
            revoked = self._world.parse_revocation_list(content)
        except ValueError as error:
            self._endings["a text is refused"] += 1
            if whole or not str(error):
                raise Wrong("text", f"{error}: {content!r}") from error
            return
        self._endings["a text is taken"] += 1
        for meaning in meanings:
            if meaning is not None and not _says(revoked, meaning):
                raise Wrong("revoked", f"{meaning} is not revoked by {content!r}")
        if whole:
            self._look_for_more(revoked, meanings)

    def _look_for_more(self, revoked: RevocationList, meanings: list[Any]) -> None:
        ranges = [each[1:] for each in meanings if each[0] == "serial"]
        edges = {at + by for pair in ranges for at in pair for by in (-1, 0, 1)} | {0, 5}
        others: list[list[Any]] = [["key", number] for number in range(KEYS)]
        others += [["id", text] for text in (*_IDS, "")]
        others += [
            ["serial", at, at]
            for at in sorted(edges)
            if 0 <= at <= _LARGEST and not any(first <= at <= last for first, last in ranges)
        ]
        for other in others:
            if other not in meanings and _says(revoked, other):
                raise Wrong("revoked", f"{other}, and nobody said so")

    # --- lines of authorized_keys, each by itself

    def _read_options(self, steps: list[Step]) -> None:
        for _, line, meaning in steps:
            text = bytes.fromhex(line).decode("latin-1")
            try:
                options = parse_key_line(text).options
            except ValueError as error:
                self._endings["a line is refused"] += 1
                if meaning not in (None, ["refused"]) or not str(error):
                    raise Wrong("text", f"{error}: {text!r}") from error
                continue
            self._endings["a line is taken"] += 1
            if parse_key_options(str(options)) != options:
                raise Wrong("text", f"{options} are not what they are written as")
            for address in _PROBES:
                for now in (0.0, 100.0, 101.0, 86400.0, 5e9):
                    may = not self._world.refusal(options, address, now)
                    if meaning is not None and may != _allowed(meaning, address, now):
                        raise Wrong("options", f"{text!r} for {address} at {now}: {may}")

    # --- whom to trust

    def _read_authorities(self, steps: list[Step]) -> None:
        read_authorities(self._world, self._endings, steps)

    def _read_host(self, steps: list[Step]) -> None:
        read_host_files(self._world, self._endings, steps)

    # --- ports

    def _read_ports(self, steps: list[Step]) -> None:
        for _, line, _ in steps:
            text = bytes.fromhex(line).decode("latin-1")
            try:
                make_endpoint(MemoryReactorClock(), text.removeprefix("haproxy:"))
            except ConfigError:
                self._endings["a port is refused"] += 1
            else:
                self._endings["a port is taken"] += 1


def _says(revoked: RevocationList, meaning: list[Any]) -> bool:
    kind, *values = meaning
    if kind == "key":
        blob = key(values[0])
        as_key = revoked.revokes_key(blob)
        if as_key != revoked.revokes(_certificate(key_blob=blob)) or as_key != revoked.revokes(
            _certificate(ca=blob)
        ):
            raise Wrong("revoked", f"key {values[0]} is revoked in one place only")
        return as_key
    if kind == "id":
        return revoked.revokes(_certificate(id=values[0].encode()))
    if kind == "serial":
        return all(revoked.revokes(_certificate(serial=each)) for each in values)
    return True


def _certificate(
    key_blob: bytes = b"k", ca: bytes = b"c", id: bytes = b"nobody", serial: int = 0
) -> Certificate:
    unused: Any = None
    return Certificate(
        *(b"", SSHCertificateType.USER, unused, key_blob, id, serial, (), 0, 0, {}),
        *(frozenset(), ca, unused),
    )


def _allowed(meaning: list[Any], address: str, now: float) -> bool:
    _, patterns, until = meaning
    if until is not None and now > until:
        return False
    here = ip_address(address)
    here = getattr(here, "ipv4_mapped", None) or here

    def matches(pattern: str) -> bool:
        if "/" in pattern:
            return here in ip_network(pattern)
        return fnmatchcase(str(here), pattern)

    excluded = any(matches(each[1:]) for each in patterns if each[0] == "!")
    admitted = any(matches(each) for each in patterns if each[0] != "!")
    return (admitted and not excluded) or not patterns
