"""Our side: ``twistd -n vmconsole`` with the embedded engine."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from bench.errors import BenchError
from bench.side import ADDRESS, Access, Side, free_port, output

_TOP = Path(__file__).parents[1]
_USER = "alice"
# Seconds.
_LISTED = 20.0
_SETTLE = 0.1


class Ours(Side):
    """The proxy of this checkout, with one user and one key, and a state directory of its own."""

    label = "ours"
    attached = b"?)]\r\n"
    leave = b"\x1d."

    def __init__(self, directory: Path, uri: str) -> None:
        """``uri`` is libvirt's of the host. Lays out ``directory``. Raises BenchError."""
        super().__init__()
        self._directory = directory
        self._state = directory / "state"
        self._config = directory / "vmconsole.toml"
        key = directory / "console.key"
        port = free_port()
        self.access = Access("vmproxy", port, key, directory / "known_hosts")
        self._environment = {**os.environ, "PYTHONPATH": str(_TOP)}
        self._state.mkdir(parents=True)
        self._config.write_text(
            f'[ssh]\nlisten = ["tcp:{port}:interface={ADDRESS}"]\n\n'
            f'[state]\ndirectory = "{self._state}"\n'
        )
        self._vmconsole("user", "add", _USER)
        key.touch(mode=0o600)
        key.write_text(self._vmconsole("key", "generate", _USER))
        self._vmconsole("host", "add", "node1", uri)
        self._vmconsole("grant", _USER, "light*")

    def start(self) -> None:
        """Start it, and wait until it serves. Raises BenchError."""
        twistd = str(Path(sys.executable).with_name("twistd"))
        command = (twistd, "-n", "--pidfile=", "vmconsole", "--config", str(self._config))
        self._spawn(command, self._directory / "log", self._directory, self._environment)
        host_key = output("ssh-keygen", "-y", "-f", str(self._state / "ssh_host_ed25519_key"))
        self.access.known_hosts.write_text(f"[{ADDRESS}]:{self.access.port} {host_key}")
        self._await_listing()

    def configuration(self) -> str:
        return self._config.read_text()

    def settle(self) -> None:
        # It leaves the host behind the user's back; nothing outside shows when it is done.
        time.sleep(_SETTLE)

    def _await_listing(self) -> None:
        """Wait until the engine has heard from the host."""
        deadline = time.monotonic() + _LISTED
        while " has " not in self._log.read_text():
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
