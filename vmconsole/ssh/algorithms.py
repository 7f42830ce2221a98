"""The algorithms that are offered to clients, and those that a site may offer."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from twisted.conch.error import ConchError

from vmconsole.config import SSH
from vmconsole.errors import ConfigError


class NothingInCommonError(ConchError):
    """The client knows none of some kind of algorithms that are offered here."""


# In order of preference. Nothing here uses SHA-1, CBC or DSA.
KEX = (b"mlkem768x25519-sha256", b"curve25519-sha256", b"curve25519-sha256@libssh.org")
CIPHERS = (
    b"aes256-gcm@openssh.com",
    b"aes128-gcm@openssh.com",
    b"chacha20-poly1305@openssh.com",
    b"aes256-ctr",
    b"aes128-ctr",
)
MACS = (b"hmac-sha2-256-etm@openssh.com", b"hmac-sha2-512-etm@openssh.com")
HOST_KEY_ALGORITHMS = (
    b"ssh-ed25519-cert-v01@openssh.com",
    b"rsa-sha2-512-cert-v01@openssh.com",
    b"rsa-sha2-256-cert-v01@openssh.com",
    b"ssh-ed25519",
    b"rsa-sha2-512",
    b"rsa-sha2-256",
)
# Also sound, for a site whose clients need them: taken when configured, not offered otherwise.
_MORE_KEX = (b"ecdh-sha2-nistp256", b"ecdh-sha2-nistp384", b"ecdh-sha2-nistp521")
_MORE_CIPHERS = (b"aes192-ctr",)
_MORE_MACS = (b"hmac-sha2-256", b"hmac-sha2-512")

_ALLOWED = {
    "kex": (KEX, _MORE_KEX),
    "ciphers": (CIPHERS, _MORE_CIPHERS),
    "macs": (MACS, _MORE_MACS),
    "host_key_algorithms": (HOST_KEY_ALGORITHMS, ()),
}


class Algorithms(NamedTuple):
    """What is offered to clients, in order of preference."""

    kex: Sequence[bytes]
    host_keys: Sequence[bytes]
    ciphers: Sequence[bytes]
    macs: Sequence[bytes]


def choose_all_algorithms(ssh: SSH, usable: Collection[bytes]) -> Algorithms:
    """What the configuration offers; ``usable`` are the algorithms that there are host keys for,
    and certificates. With none, as if there were all.

    Raises ConfigError for a name that is unknown or weak, and when no host key is left to offer.
    """
    possible = choose_algorithms("host_key_algorithms", ssh.host_key_algorithms)
    offered = [name for name in possible if name in usable or not usable]
    if not offered:
        raise ConfigError("ssh.host_key_algorithms: none goes with the keys of ssh.host_keys.")
    return Algorithms(
        choose_algorithms("kex", ssh.kex),
        offered,
        choose_algorithms("ciphers", ssh.ciphers),
        choose_algorithms("macs", ssh.macs),
    )


def choose_algorithms(kind: str, configured: Sequence[str]) -> list[bytes]:
    """The algorithms to offer: ours when ``configured`` is empty.

    ``kind`` is the name of the setting in [ssh]. Raises ConfigError for a name that is unknown
    or known to be weak.
    """
    ours, more = _ALLOWED[kind]
    chosen = [name.encode("utf-8") for name in configured] or list(ours)
    for name in chosen:
        if name not in (*ours, *more):
            possible = ", ".join(allowed.decode() for allowed in (*ours, *more))
            raise ConfigError(
                f"ssh.{kind}: {name.decode()!r} is unknown or too weak. Possible: {possible}."
            )
    return chosen


def agree(what: str, theirs: Sequence[bytes], ours: Sequence[bytes]) -> bytes:
    """RFC 4253, section 7.1: the first of the client's that we have, too.

    Raises NothingInCommonError, with what is offered here.
    """
    for name in theirs:
        if name in ours:
            return name
    offered = b", ".join(ours).decode()
    raise NothingInCommonError(f"no {what} algorithm in common; offered here: {offered}")
