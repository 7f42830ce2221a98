"""What is trusted, and what no longer is: the CAs of users, the revocation list, host keys."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from vmconsole.config import Config
from vmconsole.errors import ConfigError
from vmconsole.ssh.algorithms import choose_all_algorithms
from vmconsole.ssh.certificates import Certificate, authority_problem, moment
from vmconsole.ssh.hostkeys import HostKeys, load_host_certificates, load_host_keys
from vmconsole.ssh.revocation import RevocationList, parse_revocation_list, read_key_line
from vmconsole.text import printable_bytes
from vmconsole.threads import InThread
from vmconsole.watched import Expiry, Watched, WatchedFiles

_EXPIRES_SOON = timedelta(days=30).total_seconds()


class Trust(WatchedFiles):
    """``ssh.user_ca``, ``ssh.revoked_keys`` and ``ssh.host_certificates`` as they are now.

    Made, it has read the first two; ``read_host_keys`` comes before the start. Both raise
    ConfigError when there is nothing good to begin with.
    """

    def __init__(self, reactor: Any, config: Config, in_thread: InThread | None = None) -> None:
        """``in_thread`` is as for WatchedFiles."""
        self._config = config
        self._authorities = Watched(
            _named("ssh.user_ca", config, config.ssh.user_ca),
            lambda: load_user_authorities(config),
            lambda authorities: authorities,
        )
        self._revoked = Watched(
            _named("ssh.revoked_keys", config, config.ssh.revoked_keys),
            lambda: load_revocation_list(config),
            lambda revoked: revoked,
        )
        self._host_keys: Watched[HostKeys] | None = None
        # The host's certificates come to it later: their keys are made at the start.
        self._all: list[Watched[Any]] = [self._authorities, self._revoked]
        self._observers: list[Callable[[], object]] = []
        super().__init__(reactor, self._all, in_thread, self._tell)

    @property
    def authorities(self) -> frozenset[bytes]:
        """The public keys of the CAs whose user certificates count."""
        return self._authorities.value

    @property
    def revoked(self) -> RevocationList:
        """What lets nobody in."""
        return self._revoked.value

    @property
    def host_keys(self) -> HostKeys:
        """The host's keys, as they were read, with their certificates as they are now."""
        assert self._host_keys is not None, "read_host_keys comes first"
        return self._host_keys.value

    def read_host_keys(self) -> HostKeys:
        """Read the host keys, or make them, and their certificates. Raises ConfigError."""
        keys = load_host_keys(self._config)
        files = {
            f"ssh.host_certificates[{number}]": self._config.path(name)
            for number, name in enumerate(self._config.ssh.host_certificates)
        }

        def load() -> HostKeys:
            host_keys = HostKeys(keys, load_host_certificates(self._config, keys))
            # So that what is configured never leaves nothing to offer.
            choose_all_algorithms(self._config.ssh, host_keys.algorithms)
            return host_keys

        self._host_keys = Watched(
            files, load, lambda loaded: [each.blob for each in loaded.certificates]
        )
        self._all.append(self._host_keys)
        return self.host_keys

    def observe(self, changed: Callable[[], object]) -> None:
        """Have ``changed`` called whenever a file was read anew and something is different."""
        self._observers.append(changed)

    def refusal(self, blob: bytes, certificate: Certificate | None) -> str:
        """Why who logged in with this key, or certificate, may not stay; "": may."""
        if certificate is None:
            return "Your key has been revoked." if self.revoked.revokes_key(blob) else ""
        if certificate.ca not in self.authorities:
            return "The CA of your certificate is no longer trusted here."
        return "Your certificate has been revoked." if self.revoked.revokes(certificate) else ""

    def expiries(self, now: datetime) -> Iterator[Expiry]:
        """See WatchedFiles."""
        if self._host_keys is not None:
            yield from host_certificate_expiries(self.host_keys, now)

    def _tell(self) -> None:
        for changed in self._observers:
            changed()


def load_user_authorities(config: Config) -> frozenset[bytes]:
    """The keys in ``ssh.user_ca``, one at least; none when that is empty. Raises ConfigError."""
    if not config.ssh.user_ca:
        return frozenset()
    where, content = _read("ssh.user_ca", config, config.ssh.user_ca)
    found = set()
    for number, raw in enumerate(content.split(b"\n"), 1):
        line = raw.strip()
        if line and not line.startswith(b"#"):
            try:
                found.add(_authority(line))
            except ValueError as error:
                raise ConfigError(f"{where}, line {number}: {error}.") from error
    if not found:
        raise ConfigError(f"{where} has no public key. To trust no CA, leave ssh.user_ca empty.")
    return frozenset(found)


def _authority(line: bytes) -> bytes:
    try:
        text = line.decode()
    except UnicodeDecodeError:
        raise ValueError("it is no UTF-8") from None
    before, blob = read_key_line(text)
    if before not in ("", "cert-authority"):
        # A restriction, perhaps.
        raise ValueError("options are not supported before a CA's key")
    problem = authority_problem(blob)
    if problem:
        raise ValueError(f"this key cannot be a CA's here: {problem}")
    return blob


def load_revocation_list(config: Config) -> RevocationList:
    """What ``ssh.revoked_keys`` says; nothing when that is empty. Raises ConfigError."""
    if not config.ssh.revoked_keys:
        return RevocationList()
    where, content = _read("ssh.revoked_keys", config, config.ssh.revoked_keys)
    try:
        return parse_revocation_list(content)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}.") from error


def host_certificate_expiries(host_keys: HostKeys, now: datetime) -> Iterator[Expiry]:
    """Those of the host's certificates that have ended, or soon will: within 30 days, and within
    the last third of the time for which they were issued."""
    for certificate in host_keys.certificates:
        if certificate.expires is None:
            continue
        left = certificate.expires - now.timestamp()
        lifetime = certificate.expires - certificate.valid_after
        if left <= min(_EXPIRES_SOON, lifetime / 3):
            yield Expiry(
                f"ssh.host_certificates: {printable_bytes(certificate.id, 80)} "
                f"{'expired' if left <= 0 else 'expires'} on {moment(certificate.expires)}. "
                "Put a new one into its file; no restart is needed.",
                left <= 0,
            )


def _named(setting: str, config: Config, name: str) -> dict[str, Path]:
    return {setting: config.path(name)} if name else {}


def _read(setting: str, config: Config, name: str) -> tuple[str, bytes]:
    path = config.path(name)
    where = f"{setting} ({path})"
    try:
        return where, path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{where} cannot be read: {error.strerror}.") from error
