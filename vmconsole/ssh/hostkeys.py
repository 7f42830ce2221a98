"""The host keys and their certificates: read, and the keys made when they are missing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
from cryptography.hazmat.primitives.serialization import SSHCertificateType
from twisted.conch.ssh.keys import EncryptedKeyError, Key

from vmconsole.config import Config
from vmconsole.errors import ConfigError
from vmconsole.pki import write_private
from vmconsole.publickeys import decode_key, fingerprint
from vmconsole.ssh.certificates import (
    CERTIFICATE_ALGORITHMS,
    SUFFIX,
    UNPARSABLE,
    Certificate,
    CertificateError,
    parse_certificate,
    validity_problem,
)

_RSA_BITS = 3072
_MIN_RSA_BITS = 2048
# Type of a key -> the algorithms by which it signs, and those of its certificate.
_SIGNATURES = {
    b"ssh-ed25519": (b"ssh-ed25519",),
    b"ssh-rsa": (b"rsa-sha2-512", b"rsa-sha2-256"),
}


class CertifiedKey:
    """A host key with its certificate, as Conch's key exchange uses a key."""

    def __init__(self, key: Key, certificate: Certificate) -> None:
        self.certificate = certificate
        self._key = key

    def blob(self) -> bytes:
        """The certificate, which takes the key's place (PROTOCOL.certkeys)."""
        return self.certificate.blob

    def sign(self, data: bytes, signatureType: bytes) -> bytes:
        """Sign with the key; the signature names the key's own algorithm."""
        signature: bytes = self._key.sign(data, CERTIFICATE_ALGORITHMS[signatureType][1])
        return signature


Identity = Key | CertifiedKey


class HostKeys:
    """The host's keys, in the order of the configuration, and what they are used for.

    The first of each type is used; others are told to clients only (OpenSSH's PROTOCOL, 2.5), so
    that these know them before the order is changed. Each certificate is one of a used key.
    """

    def __init__(self, keys: Sequence[Key], certificates: Sequence[Certificate] = ()) -> None:
        self.keys = tuple(keys)
        self.certificates = tuple(certificates)
        self._identities: dict[bytes, tuple[Identity, Identity]] = {}
        by_blob = {}
        for key in keys:
            if not self._identities.keys() & set(_SIGNATURES[key.sshType()]):
                by_blob[key.public().blob()] = key
                for algorithm in _SIGNATURES[key.sshType()]:
                    self._identities[algorithm] = (key.public(), key)
        for certificate in certificates:
            certified = CertifiedKey(by_blob[certificate.key_blob], certificate)
            for algorithm in _SIGNATURES[certificate.key.sshType()]:
                self._identities[algorithm + SUFFIX] = (certified, certified)

    @property
    def algorithms(self) -> frozenset[bytes]:
        """All that there is a key for, or a certificate, whether that is valid now or not."""
        return frozenset(self._identities)

    def offered(self, now: float) -> frozenset[bytes]:
        """Those that clients can make use of at ``now`` (seconds since the epoch)."""
        return frozenset(
            algorithm
            for algorithm, (public, _) in self._identities.items()
            if isinstance(public, Key) or not validity_problem(public.certificate, now)
        )

    def identity(self, algorithm: bytes) -> tuple[Identity, Identity]:
        """What stands for the host with this algorithm, and what signs: ``blob``, ``sign``.

        Raises KeyError when there is neither key nor certificate for it.
        """
        return self._identities[algorithm]

    @property
    def blobs(self) -> list[bytes]:
        """The public halves of all keys, the announced ones included."""
        return [key.public().blob() for key in self.keys]


def load_host_keys(config: Config, make_missing: bool = True) -> list[Key]:
    """Read the host keys; one that is missing is made, with mode 0600. Waits for the disk.

    Raises ConfigError when a file cannot be read, made, or is no key for this.
    """
    keys: list[Key] = []
    for name in config.ssh.host_keys:
        path = config.path(name)
        try:
            key = _load_host_key(path)
        except FileNotFoundError:
            generate = _generator(path)
            if not make_missing:
                continue
            key = _make_host_key(path, generate)
        kind = key.sshType()
        if kind not in _SIGNATURES:
            raise ConfigError(f"{path}: a host key is ed25519 or RSA, not {kind.decode()}.")
        if kind == b"ssh-rsa" and key.size() < _MIN_RSA_BITS:
            raise ConfigError(f"{path}: an RSA host key has {_MIN_RSA_BITS} bits or more.")
        if key in keys:
            raise ConfigError(f"{path}: ssh.host_keys names this key twice.")
        keys.append(key)
    return keys


def load_host_certificates(config: Config, keys: Sequence[Key]) -> list[Certificate]:
    """Read ``ssh.host_certificates``, each of which is for one of the keys that are used.

    Raises ConfigError. One that has expired is no error: keys go on without it.
    """
    used: dict[bytes, Key] = {}
    for key in keys:
        used.setdefault(key.sshType(), key)
    certificates: dict[bytes, Certificate] = {}
    for name in config.ssh.host_certificates:
        path = config.path(name)
        certificate = _load_host_certificate(path)
        kind = certificate.key.sshType()
        if kind not in used or used[kind].public() != certificate.key:
            raise ConfigError(
                f"{path}: this certificate is for the key {fingerprint(certificate.key_blob)}, "
                "which is none of those of ssh.host_keys that are used, the first of each type: "
                "have that one's .pub signed (ssh-keygen -h -s CA -I NAME -n HOSTNAME FILE.pub)."
            )
        if kind in certificates:
            raise ConfigError(f"{path}: ssh.host_certificates names two for the same key.")
        certificates[kind] = certificate
    return list(certificates.values())


def _load_host_certificate(path: Path) -> Certificate:
    try:
        words = path.read_text("utf-8").split()
    except OSError as error:
        raise ConfigError(
            f"{path}: the host certificate cannot be read: {error.strerror}."
        ) from error
    except UnicodeDecodeError:
        words = []
    blob = decode_key(*words[:2]) if len(words) > 1 else None
    if blob is None:
        raise ConfigError(f"{path}: this is no certificate, such as ssh-keygen -s makes.")
    try:
        certificate = parse_certificate(blob)
        certificate.verify()
    except CertificateError as error:
        raise ConfigError(f"{path}: this certificate cannot be used: {error}.") from error
    if certificate.type is not SSHCertificateType.HOST:
        raise ConfigError(
            f"{path}: this is a user's certificate; a host's is made with ssh-keygen -h -s."
        )
    return certificate


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
    except UNPARSABLE as error:
        raise ConfigError(
            f"{path}: this is no private key. Move it away, and a new one is made."
        ) from error
    if key.isPublic():
        raise ConfigError(f"{path}: this is the public half of a host key; name the private one.")
    return key


def _generator(path: Path) -> Callable[[], Any]:
    """What makes the key that is missing; its name says of which type. Raises ConfigError."""
    if "rsa" in path.name:
        return partial(rsa.generate_private_key, 65537, _RSA_BITS)
    if "ed25519" in path.name:
        return ed25519.Ed25519PrivateKey.generate
    raise ConfigError(f"{path} is missing. It would be made if its name had ed25519 or rsa in it.")


def _make_host_key(path: Path, generate: Callable[[], Any]) -> Key:
    key = Key(generate())
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_private(path, key.toString("OPENSSH", subtype="v1", comment="vmconsole"))
        public = key.public().toString("OPENSSH", comment="vmconsole")
        path.with_name(path.name + ".pub").write_bytes(public + b"\n")
    except OSError as error:
        raise ConfigError(f"{path}: the host key cannot be made: {error.strerror}.") from error
    return key
