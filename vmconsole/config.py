"""vmconsole.toml, read into frozen structs. An unknown key is an error, and so is a wrong type."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from pathlib import Path

import msgspec

from vmconsole.errors import ConfigError

# Bytes of a recording's file; less would be a file for each screen.
_SMALLEST_FILE = 65536
# Bytes between two key exchanges; less would be little else than exchanges.
_LEAST_REKEY = 1048576


class _Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class SSH(_Section, frozen=True):
    """The ssh server. Seconds and bytes, as everywhere here."""

    listen: tuple[str, ...] = ("tcp:2222",)
    users: tuple[str, ...] = ("ovirt-vmconsole", "vmproxy")
    host_keys: tuple[str, ...] = ("ssh_host_ed25519_key", "ssh_host_rsa_key")
    kex: tuple[str, ...] = ()
    ciphers: tuple[str, ...] = ()
    macs: tuple[str, ...] = ()
    host_key_algorithms: tuple[str, ...] = ()
    host_certificates: tuple[str, ...] = ()
    user_ca: str = ""
    revoked_keys: str = ""
    banner: str = ""
    keepalive: float = 10.0
    rekey_bytes: int = 1073741824
    rekey_seconds: float = 3600.0


class EmbeddedEngine(_Section, frozen=True):
    """Our own engine, used when no ``engine.url`` is given."""

    listen: str = "unix:engine.sock:mode=600"
    certificate: str = ""
    key: str = ""
    ticket_ca: str = ""
    database: str = "sqlite:///engine.db"


class Engine(_Section, frozen=True):
    """The engine that is asked; without ``url`` it is the embedded one."""

    url: str = ""
    ca: str = ""
    certificate: str = ""
    key: str = ""
    timeout: float = 5.0
    cache_ttl: float = 5.0
    stale_grace: float = 300.0
    recheck: float = 15.0
    embedded: EmbeddedEngine = EmbeddedEngine()


class Hosts(_Section, frozen=True):
    """How the name of a host becomes a libvirt URI. ``pki`` is absolute, or empty."""

    uri: str = "qemu+tls://{host}/system"
    pki: str = ""
    overrides: dict[str, str] = {}


class Console(_Section, frozen=True):
    """How consoles behave, and what may be done to them."""

    escape: str = "^]"
    scrollback: int = 65536
    linger: float = 60.0
    follow: float = 300.0
    warm: tuple[str, ...] = ()
    takeover: bool = True
    handover_idle: float = 60.0
    guard: bool = True
    backlog: int = 1048576
    force: bool = False
    allow_break: bool = msgspec.field(default=False, name="break")


class Recording(_Section, frozen=True):
    """What is kept of what guests print. ``directory`` is absolute, or empty: nothing."""

    directory: str = ""
    required: bool = False
    max_size: int = 0
    max_age: float = 0.0
    retain_age: float = 0.0
    retain_bytes: int = 0


class Limits(_Section, frozen=True):
    """What clients may ask of us; where 0 is the default, it is no limit."""

    connections: int = 1000
    per_address: int = 64
    unauthenticated: int = 100
    login_grace: float = 30.0
    auth_tries: int = 6
    auth_queries: int = 64
    sessions_per_connection: int = 8
    sessions_per_user: int = 0
    idle: float = 0.0
    ban_after: int = 0
    ban_seconds: float = 600.0


class State(_Section, frozen=True):
    """Where we keep what we make."""

    directory: str = ""


class Config(_Section, frozen=True):
    """The whole file. ``path`` makes a relative name absolute, under the state directory."""

    ssh: SSH = SSH()
    engine: Engine = Engine()
    hosts: Hosts = Hosts()
    console: Console = Console()
    recording: Recording = Recording()
    limits: Limits = Limits()
    state: State = State()

    @property
    def state_directory(self) -> Path:
        """The absolute state directory; it need not exist yet."""
        return Path(self.state.directory)

    def path(self, name: str) -> Path:
        """``name`` below the state directory, or as it is when absolute."""
        return self.state_directory / name

    @property
    def escape_byte(self) -> int | None:
        """The escape character's value; None when there is none. Raises ConfigError."""
        return _escape_byte(self.console.escape)


def load(path: Path | None, environ: Mapping[str, str]) -> Config:
    """Read the file; None: all defaults. Raises ConfigError with the file, the key and the cure."""
    where = str(path) if path else "the default configuration"
    try:
        raw = tomllib.loads(path.read_text("utf-8")) if path else {}
    except OSError as error:
        raise ConfigError(f"{where} cannot be read: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where} is no valid TOML: {error}.") from error
    try:
        config = msgspec.convert(raw, Config)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: {error}.") from error
    try:
        directory = Path(config.state.directory or _default_state(environ)).expanduser().absolute()
    except RuntimeError as error:
        raise ConfigError(f"{where}: state.directory: {error}") from error
    pki = config.hosts.pki and str(directory / config.hosts.pki)
    recordings = config.recording.directory and str(directory / config.recording.directory)
    config = msgspec.structs.replace(
        config,
        state=State(directory=str(directory)),
        hosts=msgspec.structs.replace(config.hosts, pki=pki),
        recording=msgspec.structs.replace(config.recording, directory=recordings),
    )
    try:
        _check(config)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    return config


def _default_state(environ: Mapping[str, str]) -> str:
    # systemd sets a colon-separated list when the unit names several.
    return environ.get("STATE_DIRECTORY", "").split(":")[0] or "~/.local/state/vmconsole"


def _escape_byte(escape: str) -> int | None:
    if not escape:
        return None
    if len(escape) == 2 and escape[0] == "^" and "@" <= escape[1].upper() <= "_":
        return ord(escape[1].upper()) - 64
    raise ConfigError(
        f'console.escape = {escape!r}: write ^ and a letter or one of @[\\]^_ ("^]"), '
        'or "" for none.'
    )


def _check(config: Config) -> None:
    _escape_byte(config.console.escape)
    positive = {
        "engine.timeout": config.engine.timeout,
        "engine.recheck": config.engine.recheck,
        "console.backlog": config.console.backlog,
        "ssh.keepalive": config.ssh.keepalive,
        "ssh.rekey_seconds": config.ssh.rekey_seconds,
        "limits.connections": config.limits.connections,
        "limits.per_address": config.limits.per_address,
        "limits.unauthenticated": config.limits.unauthenticated,
        "limits.ban_seconds": config.limits.ban_seconds,
        "limits.login_grace": config.limits.login_grace,
        "limits.auth_tries": config.limits.auth_tries,
        "limits.auth_queries": config.limits.auth_queries,
        "limits.sessions_per_connection": config.limits.sessions_per_connection,
    }
    for key, value in positive.items():
        if not (value > 0 and math.isfinite(value)):
            raise ConfigError(f"{key} = {value}: it must be greater than 0.")
    not_negative = {
        "engine.cache_ttl": config.engine.cache_ttl,
        "engine.stale_grace": config.engine.stale_grace,
        "console.scrollback": config.console.scrollback,
        "console.linger": config.console.linger,
        "console.follow": config.console.follow,
        "console.handover_idle": config.console.handover_idle,
        "limits.sessions_per_user": config.limits.sessions_per_user,
        "limits.idle": config.limits.idle,
        "limits.ban_after": config.limits.ban_after,
        "recording.max_age": config.recording.max_age,
        "recording.retain_age": config.recording.retain_age,
        "recording.retain_bytes": config.recording.retain_bytes,
    }
    for key, value in not_negative.items():
        if not (value >= 0 and math.isfinite(value)):
            raise ConfigError(f"{key} = {value}: 0 is the least.")
    if config.ssh.rekey_bytes < _LEAST_REKEY:
        raise ConfigError(
            f"ssh.rekey_bytes = {config.ssh.rekey_bytes}: {_LEAST_REKEY} bytes is the least."
        )
    if config.ssh.listen and not config.ssh.users:
        raise ConfigError("ssh.users is empty: nobody could log in. Name at least one.")
    if config.ssh.listen and not config.ssh.host_keys:
        raise ConfigError("ssh.host_keys is empty: name at least one file; it is made if missing.")
    if config.recording.max_size and config.recording.max_size < _SMALLEST_FILE:
        raise ConfigError(
            f"recording.max_size = {config.recording.max_size}: {_SMALLEST_FILE} bytes is the "
            "least; 0: no limit."
        )
    if config.recording.required and not config.recording.directory:
        raise ConfigError("recording.required needs a recording.directory.")
    if config.engine.url:
        if not config.engine.url.startswith(("https://", "http://")):
            raise ConfigError(f"engine.url = {config.engine.url!r}: an https:// URL is needed.")
        for key in ("certificate", "key"):
            if not getattr(config.engine, key):
                raise ConfigError(f"engine.{key} is missing: it signs the tickets for engine.url.")


def default_path(environ: Mapping[str, str]) -> Path | None:
    """The file to read when none is named: $VMCONSOLE_CONFIG, /etc/vmconsole/vmconsole.toml."""
    named = environ.get("VMCONSOLE_CONFIG", "")
    if named:
        return Path(named)
    usual = Path("/etc/vmconsole/vmconsole.toml")
    try:
        usual.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError:
        # It is there, perhaps, and not for us: that is for `load` to tell.
        pass
    return usual
