"""Our side: ``twistd -n vmconsole``, with the embedded engine or with another one."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from bench.errors import BenchError
from bench.server import ADDRESS, free_port, output
from bench.side import Access, Side

_TOP = Path(__file__).parents[1]
_USER = "alice"
_HOST_KEY = "ssh_host_ed25519_key"
# Seconds.
_LISTED = 20.0
_SETTLE = 0.1


class Proxy(Side):
    """The proxy of this checkout, with a state directory of its own."""

    label = "ours"
    attached = b"?)]\r\n"
    leave = b"\x1d."

    def __init__(self, directory: Path, key: Path, host_key: Path | None = None) -> None:
        """Lays out ``directory``. ``key`` is the user's; without ``host_key`` it makes its own."""
        super().__init__()
        self._directory = directory
        self._state = directory / "state"
        self._config = directory / "vmconsole.toml"
        self.host_key = host_key or self._state / _HOST_KEY
        self.access = Access("vmproxy", free_port(), key, directory / "known_hosts")
        self._environment = {**os.environ, "PYTHONPATH": str(_TOP)}
        self._state.mkdir(parents=True)
        listen = f'[ssh]\nlisten = ["tcp:{self.access.port}:interface={ADDRESS}"]\n'
        if host_key:
            listen += f'host_keys = ["{host_key}"]\n'
        # Else it would keep a console open that the other side is about to use.
        self._config.write_text(
            f'{listen}\n[state]\ndirectory = "{self._state}"\n\n[console]\nlinger = 0.0\n'
        )

    def start(self) -> None:
        """Start it, and wait until it serves. Raises BenchError."""
        twistd = str(Path(sys.executable).with_name("twistd"))
        command = (twistd, "-n", "--pidfile=", "vmconsole", "--config", str(self._config))
        self._spawn(command, self._directory / "log", self._directory, self._environment)
        host_key = output("ssh-keygen", "-y", "-f", str(self.host_key))
        self.access.known_hosts.write_text(f"[{ADDRESS}]:{self.access.port} {host_key}")

    def configuration(self) -> str:
        return self._config.read_text()

    def settle(self) -> None:
        # It leaves the host behind the user's back; nothing outside shows when it is done.
        time.sleep(_SETTLE)


class Ours(Proxy):
    """With the embedded engine, one user and one key."""

    def __init__(self, directory: Path, hosts: Mapping[str, str]) -> None:
        """``hosts`` are libvirt's URIs by name. Lays out ``directory``. Raises BenchError."""
        key = directory / "console.key"
        super().__init__(directory, key)
        self._hosts = hosts
        self._vmconsole("user", "add", _USER)
        key.touch(mode=0o600)
        key.write_text(self._vmconsole("key", "generate", _USER))
        for name, uri in hosts.items():
            self._vmconsole("host", "add", name, uri)
        self._vmconsole("grant", _USER, "light*")

    def start(self) -> None:
        super().start()
        self._await_listing()

    def _await_listing(self) -> None:
        """Wait until the engine has heard from all hosts."""
        deadline = time.monotonic() + _LISTED
        while not all(f"{name} has " in self._log.read_text() for name in self._hosts):
            if time.monotonic() > deadline:
                raise BenchError(f"our engine lists no VMs:\n{self.log_end()}")
            time.sleep(0.1)

    def _vmconsole(self, *arguments: str) -> str:
        """What the vmconsole command prints."""
        start = "from vmconsole.cli import main; main()"
        return output(
            *(sys.executable, "-c", start, *arguments, "--config", str(self._config)),
            cwd=self._directory,
            env=self._environment,
        )


class OursAtEngine(Proxy):
    """With an engine elsewhere, which names no way to its hosts."""

    def __init__(self, directory: Path, like: Proxy, engine: str, hosts: dict[str, str]) -> None:
        """The same user and host key as ``like``; ``engine`` are lines of its configuration, and
        ``hosts`` libvirt's URIs of those that can be reached."""
        super().__init__(directory, like.access.key, like.host_key)
        overrides = "".join(f'"{name}" = "{uri}"\n' for name, uri in hosts.items())
        with self._config.open("a") as file:
            file.write(f"\n[engine]\n{engine}\n[hosts.overrides]\n{overrides}")
