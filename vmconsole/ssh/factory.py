"""The ssh server's factory: host keys, algorithms, and what each connection is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
from twisted.conch.ssh import factory
from twisted.conch.ssh.keys import BadKeyError, EncryptedKeyError, Key
from twisted.cred.portal import Portal
from twisted.internet.endpoints import serverFromString
from twisted.internet.interfaces import IAddress, IReactorTime, IStreamServerEndpoint

from vmconsole.audit import Audit
from vmconsole.config import SSH, Config
from vmconsole.errors import ConfigError
from vmconsole.pki import write_private
from vmconsole.ssh.auth import USER_KEY_ALGORITHMS, UserAuth
from vmconsole.ssh.connection import ConsoleConnection
from vmconsole.ssh.transport import ConsoleTransport, choose_algorithms

_RSA_BITS = 3072
_MIN_RSA_BITS = 2048


class ConsoleSSHFactory(factory.SSHFactory):
    """Builds a ConsoleTransport for each client. ``random`` gives so many random bytes.

    The host keys are given with ``use_host_keys`` before it listens.
    """

    noisy = False
    protocol = ConsoleTransport
    services = {  # noqa: RUF012 - Conch's own way to say it
        b"ssh-userauth": UserAuth,
        b"ssh-connection": ConsoleConnection,
    }
    user_key_algorithms = tuple(USER_KEY_ALGORITHMS)

    def __init__(
        self,
        portal: Portal,
        config: Config,
        audit: Audit,
        clock: IReactorTime,
        random: Callable[[int], bytes],
    ) -> None:
        self.portal = portal
        self.audit = audit
        self.clock = clock
        self.limits = config.limits
        self.banner = config.ssh.banner
        self.user_names = [name.encode() for name in config.ssh.users]
        self._random = random
        self._ssh = config.ssh
        # Conch would say for each connection that it has none; group exchange is not offered.
        self.primes = {0: []}

    def use_host_keys(self, keys: Mapping[bytes, Key]) -> None:
        """Take the private host keys, by their ssh type. Raises ConfigError when the configured
        algorithms leave nothing to offer."""
        self.privateKeys = dict(keys)
        self.publicKeys = {kind: key.public() for kind, key in keys.items()}
        self._algorithms = choose_all_algorithms(self._ssh, keys)

    def make_session_id(self) -> str:
        """An id for one connection, for the log and the audit."""
        return self._random(8).hex()

    def buildProtocol(self, addr: IAddress | None) -> ConsoleTransport:
        """See IFactory."""
        protocol: Any = super().buildProtocol(addr)
        # Conch has just put every algorithm of the host keys here, SHA-1 with them.
        protocol.supportedPublicKeys = list(self._algorithms.host_keys)
        protocol.supportedKeyExchanges = list(self._algorithms.kex)
        protocol.supportedCiphers = list(self._algorithms.ciphers)
        protocol.supportedMACs = list(self._algorithms.macs)
        assert isinstance(protocol, ConsoleTransport)
        return protocol

    def getService(self, transport: Any, service: bytes) -> Any:
        """``ssh-userauth`` until somebody is logged in, ``ssh-connection`` from then on."""
        wanted = b"ssh-connection" if hasattr(transport, "avatar") else b"ssh-userauth"
        return self.services[service] if service == wanted else None


class Algorithms(NamedTuple):
    """What is offered to clients, in order of preference."""

    kex: Sequence[bytes]
    host_keys: Sequence[bytes]
    ciphers: Sequence[bytes]
    macs: Sequence[bytes]


def choose_all_algorithms(ssh: SSH, host_keys: Mapping[bytes, Key]) -> Algorithms:
    """What the configuration offers with these host keys; with none, as if there were all.

    Raises ConfigError for a name that is unknown or weak, and when no host key is left to offer.
    """
    possible = choose_algorithms("host_key_algorithms", ssh.host_key_algorithms)
    usable = {name for key in host_keys.values() for name in key.supportedSignatureAlgorithms()}
    offered = [name for name in possible if name in usable or not host_keys]
    if not offered:
        raise ConfigError("ssh.host_key_algorithms: none goes with the keys of ssh.host_keys.")
    return Algorithms(
        choose_algorithms("kex", ssh.kex),
        offered,
        choose_algorithms("ciphers", ssh.ciphers),
        choose_algorithms("macs", ssh.macs),
    )


def make_endpoint(reactor: Any, description: str) -> IStreamServerEndpoint:
    """What ``ssh.listen`` names; see twisted.internet.endpoints.serverFromString.

    Raises ConfigError.
    """
    try:
        endpoint: IStreamServerEndpoint = serverFromString(reactor, description)
    except (ValueError, TypeError, LookupError, OSError) as error:
        raise ConfigError(
            f"ssh.listen: {description!r} is no Twisted endpoint (tcp:2222, "
            f"tcp:2222:interface=127.0.0.1): {error}."
        ) from error
    return endpoint


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
