"""The ssh clients that people have, behind one small interface: each is a program that a test
starts, types into, and whose exit status it sees."""

from __future__ import annotations

import base64
import hashlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tests.functional.process import Child

KEY_TYPES = ("ed25519", "rsa", "ecdsa")
# Of our offer, what goes with a MAC; the others have their own.
CTR = ("aes256-ctr", "aes128-ctr")
GCM = ("aes256-gcm@openssh.com", "aes128-gcm@openssh.com")
CHACHA20 = ("chacha20-poly1305@openssh.com",)
ETM = ("hmac-sha2-256-etm@openssh.com", "hmac-sha2-512-etm@openssh.com")
CURVE25519 = ("curve25519-sha256", "curve25519-sha256@libssh.org")
ML_KEM = ("mlkem768x25519-sha256",)


class Door(NamedTuple):
    """Where the server is, and what a client keeps of its own."""

    port: int
    known_hosts: Path
    """In OpenSSH's form, with one line for each host key."""
    folder: Path
    """For the clients' own files."""


class Wishes(NamedTuple):
    """What a client is to insist on; empty: what it does by itself."""

    cipher: str = ""
    mac: str = ""
    kex: str = ""
    rekey: int = 0
    """Bytes after which it exchanges keys anew."""


ANY = Wishes()


class Session(NamedTuple):
    """What a client is to do: log in with a private key (a file in OpenSSH's form) and run a
    command line on the server, or its shell; with ``terminal`` on a pty."""

    door: Door
    key: Path
    words: Sequence[str] = ()
    terminal: bool = False
    wishes: Wishes = ANY


class Command(NamedTuple):
    """A command line, and what its environment has besides."""

    words: list[str]
    environment: dict[str, str]

    def start(self, reactor: object, terminal: bool = False, child: Child | None = None) -> Child:
        """Start it, as ``child`` if that is given; with ``terminal`` on a pty."""
        started = child or Child(os.path.basename(self.words[0]))
        return started.spawn(reactor, self.words, self.environment, terminal)

    def fed(self, path: Path) -> Command:
        """The same, with a file through a pipe as its standard input."""
        words = ["/bin/sh", "-c", 'cat "$0" | "$@"', str(path), *self.words]
        return Command(words, self.environment)


class Client:
    """One client. ``ciphers``, ``macs`` and ``kex`` are what it knows of our offer."""

    name = ""
    ciphers: tuple[str, ...] = (*GCM, *CHACHA20, *CTR)
    macs: tuple[str, ...] = ETM
    kex: tuple[str, ...] = CURVE25519

    def command(self, session: Session) -> Command:
        """How to start it. May wait for a key to be converted."""
        raise NotImplementedError


class OpenSSH(Client):
    """OpenSSH's ssh."""

    name = "openssh"

    def command(self, session: Session) -> Command:
        """See Client."""
        door, key, words, terminal, wishes = session
        options = [
            "IdentitiesOnly=yes",
            "IdentityAgent=none",
            "StrictHostKeyChecking=yes",
            f"UserKnownHostsFile={door.known_hosts}",
            "EscapeChar=none",
            f"RequestTTY={'force' if terminal else 'no'}",
            *_unless_empty("Ciphers", wishes.cipher),
            *_unless_empty("MACs", wishes.mac),
            *_unless_empty("KexAlgorithms", wishes.kex),
            *_unless_empty("RekeyLimit", wishes.rekey),
        ]
        line = ["/usr/bin/ssh", "-F", "none", "-p", str(door.port), "-i", str(key)]
        for option in options:
            line += ["-o", option]
        return Command([*line, "vmproxy@127.0.0.1", *words], {})


def _unless_empty(option: str, value: object) -> list[str]:
    return [f"{option}={value}"] if value else []


_PUTTY_NAMES = {GCM[1]: "aesgcm", CHACHA20[0]: "chacha20", CTR[0]: "aes"}


class Plink(Client):
    """PuTTY's plink. A saved session has the order of its ciphers, where one name stands for all
    sizes of AES; it prefers the smaller key with GCM, and has no word on MACs."""

    name = "plink"
    macs = ETM[:1]
    ciphers = (GCM[1], CHACHA20[0], CTR[0])
    kex = CURVE25519[:1]

    def command(self, session: Session) -> Command:
        """See Client."""
        door, key, words, terminal, wishes = session
        ppk = _converted(key, ".ppk", ["/usr/bin/puttygen", str(key), "-O", "private", "-o"])
        first = _PUTTY_NAMES[wishes.cipher or GCM[1]]
        order = [first, *(set(_PUTTY_NAMES.values()) - {first}), "WARN"]
        saved = door.folder / ".putty" / "sessions" / "vmconsole"
        saved.parent.mkdir(parents=True, exist_ok=True)
        saved.write_text(
            f"Protocol=ssh\nCipher={','.join(order)}\nRekeyTime=0\nRekeyBytes={wishes.rekey}\n"
        )
        line = ["/usr/bin/plink", "-batch", "-load", "vmconsole", "-P", str(door.port)]
        for shown in _fingerprints(door.known_hosts):
            line += ["-hostkey", shown]
        line += ["-i", str(ppk), "-t" if terminal else "-T", "vmproxy@127.0.0.1"]
        return Command([*line, *words], {"HOME": str(door.folder)})


class Dbclient(Client):
    """dropbear's dbclient; 2022.83 knows neither EtM nor, as Debian builds it, GCM."""

    name = "dbclient"
    ciphers = CHACHA20
    macs = ()
    kex = CURVE25519[:1]

    def command(self, session: Session) -> Command:
        """See Client."""
        door, key, words, terminal, wishes = session
        convert = ["/usr/bin/dropbearconvert", "openssh", "dropbear", str(key)]
        own = _converted(key, ".dropbear", convert)
        known = door.folder / ".ssh" / "known_hosts"
        known.parent.mkdir(mode=0o700, exist_ok=True)
        # It looks for the address alone, and takes a comment for a part of the key.
        keys = (line.split()[1:3] for line in door.known_hosts.read_text().splitlines())
        known.write_text("".join(f"127.0.0.1 {kind} {blob}\n" for kind, blob in keys))
        line = ["/usr/bin/dbclient", "-i", str(own), "-p", str(door.port)]
        line += ["-t" if terminal else "-T"]
        line += ["-c", wishes.cipher] if wishes.cipher else []
        return Command([*line, "vmproxy@127.0.0.1", *words], {"HOME": str(door.folder)})


class _Library(Client):
    # A library for Python, in a program of ours beside this file.
    def command(self, session: Session) -> Command:
        """See Client."""
        door, key, words, terminal, wishes = session
        program = Path(__file__).with_name(f"{self.name}_client.py")
        line = [sys.executable, "-P", str(program), "--port", str(door.port), "--key", str(key)]
        line += ["--known-hosts", str(door.known_hosts), "--rekey", str(wishes.rekey)]
        line += ["--cipher", wishes.cipher, "--mac", wishes.mac, "--kex", wishes.kex]
        line += ["--terminal"] if terminal else []
        return Command([*line, "--", *words], {})


class Paramiko(_Library):
    """paramiko."""

    name = "paramiko"
    ciphers = (*GCM, *CTR)
    kex = (*ML_KEM, CURVE25519[1])


class AsyncSSH(_Library):
    """asyncssh."""

    name = "asyncssh"
    kex = (*ML_KEM, *CURVE25519)


CLIENTS: Sequence[Client] = (OpenSSH(), Plink(), Dbclient(), Paramiko(), AsyncSSH())


def _converted(key: Path, suffix: str, line: list[str]) -> Path:
    path = key.with_name(key.name + suffix)
    if not path.exists():
        subprocess.run([*line, str(path)], check=True, capture_output=True)
    return path


def _fingerprints(known_hosts: Path) -> list[str]:
    digests = (
        hashlib.sha256(base64.b64decode(line.split()[2])).digest()
        for line in known_hosts.read_text().splitlines()
    )
    return [f"SHA256:{base64.b64encode(digest).decode().rstrip('=')}" for digest in digests]


def make_key(folder: Path, kind: str) -> Path:
    """A new private key in ``folder``, in OpenSSH's form, and its public half beside it."""
    path = folder / f"id_{kind}"
    command = ["ssh-keygen", "-q", "-t", kind, "-N", "", "-C", kind, "-f", str(path)]
    subprocess.run(command, check=True)
    return path
