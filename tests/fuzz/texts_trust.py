"""Texts about whom to trust: files of trusted CAs, and files of host certificates.

``["line", HEX, MEANING]`` is a line of the first; ``["file", HOW, EDITS]`` one of the second, with
a certificate for the host's key (see ``authority.py``), and what is changed in its text.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections import Counter
from random import Random
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ed25519
from msgspec.structs import replace
from twisted.conch.ssh.common import MP, NS
from twisted.conch.ssh.keys import Key

from tests.fuzz.authority import HOST, certificate, public_line, specification
from tests.fuzz.certify import Worth, judge_host_certificate
from tests.fuzz.channels import Wrong
from tests.fuzz.edits import edit
from tests.fuzz.handshakes import Handshakes
from tests.fuzz.keyring import key_of
from tests.fuzz.steps import Step
from tests.fuzz.world import World
from vmconsole.errors import ConfigError

# None whose key is another one in another process.
_CAS = ("ed", "gone", "p256", "p521")
_HOST = ed25519.Ed25519PrivateKey.from_private_bytes(b"h" * 32)


def _rsa_line(bits: int) -> str:
    # Nobody has its other half.
    number = Random(bits).getrandbits(bits) | 1 << bits - 1 | 1
    blob = NS(b"ssh-rsa") + MP(65537) + MP(number)
    return f"ssh-rsa {b64encode(blob).decode()} RSA"


def authority_line(random: Random) -> tuple[str, list[Any]]:
    """A line of ``ssh.user_ca``, and the key that it is to have trusted."""
    roll = random.random()
    if roll < 0.1:
        return random.choice(("", "# nothing", "   ", "\t# x", "\r")), ["nothing"]
    line = public_line(random.choice(_CAS)).strip()
    if roll < 0.2:
        line = _rsa_line(random.choice((2048, 4096)))
    if roll < 0.22:
        return _unfit_line(random, line), ["refused"]
    blob = line.split()[1]
    kind, _, comment = line.split(" ", 2)
    before = random.choice(("", "", "cert-authority ", "  ", "\tcert-authority\t"))
    after = random.choice(("", f" {comment}", " # x", " AAAA", "\r", " \u00e9"))
    return f"{before}{kind} {blob}{after}", ["ca", blob]


def _unfit_line(random: Random, line: str) -> str:
    blob = b64decode(line.split()[1])
    nested = NS(b"ssh-ed25519-cert-v01@openssh.com") + NS(b"") + blob[15:]
    return random.choice(
        (
            _rsa_line(1024),
            public_line("sk").strip(),
            f"restrict {line}",
            f'cert-authority,principals="a" {line}',
            f"@cert-authority * {line}",
            f"ssh-ed25519-cert-v01@openssh.com {b64encode(nested).decode()}",
            line.replace(" ", "", 1),
            f"key: {line}",
        )
    )


def host_file(random: Random, handshakes: Handshakes, rate: float) -> Step:
    """A file of ``ssh.host_certificates``."""
    how = specification(random)
    how["usage"] = HOST if random.random() < 0.8 else how.get("usage", HOST)
    return ["file", how, handshakes.edits() if random.random() < rate else []]


def read_authorities(world: World, endings: Counter[str], steps: list[Step]) -> None:
    """Read a whole file of CAs. Raises Wrong."""
    content = b"\n".join(bytes.fromhex(step[1]) for step in steps)
    meanings = [step[2] for step in steps]
    path = world.write("authorities", content)
    config = replace(world.config, ssh=replace(world.config.ssh, user_ca=str(path)))
    named = {each[1] for each in meanings if each and each[0] == "ca"}
    whole = None not in meanings
    try:
        found = {b64encode(each).decode() for each in world.load_user_authorities(config)}
    except ConfigError as error:
        endings["a CA file is refused"] += 1
        if (whole and named and ["refused"] not in meanings) or str(path) not in str(error):
            raise Wrong("text", f"{error}: {content!r}") from error
        return
    endings["a CA file is taken"] += 1
    if ["refused"] in meanings or not named <= found:
        raise Wrong("authorities", f"{sorted(found)} of {content!r}")
    others = found - named
    if others and (whole or any(each.encode() not in content for each in others)):
        raise Wrong("authorities", f"{sorted(others)}, and nobody said so")


def read_host_files(world: World, endings: Counter[str], steps: list[Step]) -> None:
    """Read files with a host certificate each. Raises Wrong."""
    host = key_of(_HOST)
    for _, how, edits in steps:
        made = certificate(host, b"console.example.org", how, world.time_of_day())
        kind = host.kind.decode() + "-cert-v01@openssh.com"
        text = edit(f"{kind} {b64encode(made).decode()} host\n".encode(), edits)
        path = world.write("certificate", text)
        settings = replace(world.config.ssh, host_certificates=(str(path),))
        worth = _worth(text, host.blob)
        try:
            world.load_host_certificates(replace(world.config, ssh=settings), [Key(_HOST)])
        except ConfigError as error:
            endings["a host certificate is refused"] += 1
            if (worth is Worth.GOOD and not edits) or str(path) not in str(error):
                raise Wrong("text", f"{error}: {how}") from error
            continue
        endings["a host certificate is taken"] += 1
        if worth is Worth.BAD:
            raise Wrong("host", f"it was taken: {how} {text!r}")


def _worth(text: bytes, key: bytes) -> Worth:
    words = text.split()
    if len(words) < 2:
        return Worth.BAD
    try:
        blob = b64decode(words[1], validate=True)
    except ValueError:
        return Worth.BAD
    return judge_host_certificate(blob, key)
