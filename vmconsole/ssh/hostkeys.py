"""The host keys: read, or made when they are missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
from twisted.conch.ssh.keys import BadKeyError, EncryptedKeyError, Key

from vmconsole.config import Config
from vmconsole.errors import ConfigError
from vmconsole.pki import write_private

_RSA_BITS = 3072
_MIN_RSA_BITS = 2048


def load_host_keys(config: Config, make_missing: bool = True) -> dict[bytes, Key]:
    """Read the host keys; one that is missing is made, with mode 0600. Waits for the disk.

    Raises ConfigError when a file cannot be read, made, or is no key for this.
    """
    keys: dict[bytes, Key] = {}
    for name in config.ssh.host_keys:
        path = config.path(name)
        try:
            key = _load_host_key(path)
        except FileNotFoundError:
            if not make_missing:
                continue
            key = _make_host_key(path)
        kind = key.sshType()
        if kind not in (b"ssh-ed25519", b"ssh-rsa"):
            raise ConfigError(f"{path}: a host key is ed25519 or RSA, not {kind.decode()}.")
        if kind == b"ssh-rsa" and key.size() < _MIN_RSA_BITS:
            raise ConfigError(f"{path}: an RSA host key has {_MIN_RSA_BITS} bits or more.")
        if kind in keys:
            raise ConfigError(f"{path}: ssh.host_keys names two keys of type {kind.decode()}.")
        keys[kind] = key
    return keys


def _load_host_key(path: Path) -> Key:
    try:
        if path.stat().st_mode & 0o077:
            raise ConfigError(f"{path}: others may read this host key. chmod 600 {path}")
        key: Key = Key.fromString(path.read_bytes())
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ConfigError(f"{path}: the host key cannot be read: {error.strerror}.") from error
    except EncryptedKeyError as error:
        raise ConfigError(
            f"{path}: the host key has a passphrase; nobody is there to type it."
        ) from error
    except (BadKeyError, ValueError, LookupError) as error:
        raise ConfigError(
            f"{path}: this is no private key. Move it away, and a new one is made."
        ) from error
    return key


def _make_host_key(path: Path) -> Key:
    raw: Any
    if "rsa" in path.name:
        raw = rsa.generate_private_key(65537, _RSA_BITS)
    elif "ed25519" in path.name:
        raw = ed25519.Ed25519PrivateKey.generate()
    else:
        raise ConfigError(
            f"{path} is missing. It would be made if its name had ed25519 or rsa in it."
        )
    key = Key(raw)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_private(path, key.toString("OPENSSH", subtype="v1", comment="vmconsole"))
        public = key.public().toString("OPENSSH", comment="vmconsole")
        path.with_name(path.name + ".pub").write_bytes(public + b"\n")
    except OSError as error:
        raise ConfigError(f"{path}: the host key cannot be made: {error.strerror}.") from error
    return key
