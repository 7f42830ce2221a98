"""A whole site for the tests: the proxy as ``twistd`` runs it, its users, and their ssh."""

from __future__ import annotations

import shutil
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

from twisted.internet.utils import getProcessOutputAndValue

from tests.functional.process import Child, Unexpected

BIN = Path(sys.executable).parent
PROGRAM = str(BIN / "vmconsole")


def hold_port() -> socket.socket:
    """A TCP port of the loopback, which the kernel gives to nobody else until this is closed. It
    does not listen: a server that sets SO_REUSEADDR may, as twistd and ssh do."""
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    return held


def port_of(held: socket.socket) -> int:
    """Its number."""
    return int(held.getsockname()[1])


class Site:
    """A proxy with its state directory, below a temporary folder that ``close`` removes."""

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor
        self.folder = Path(tempfile.mkdtemp(prefix="vmc-site-"))
        self.state = self.folder / "state"
        self.config = self.folder / "vmconsole.toml"
        self.known_hosts = self.folder / "known_hosts"
        self.held = hold_port()
        """What keeps ``port`` for us."""
        self.port = port_of(self.held)
        self.proxy: Child | None = None
        self._logs = b""
        self._children: list[Child] = []
        self.configure("")

    def configure(self, more: str, ssh_settings: str = "") -> None:
        """Write the configuration; ``more`` is TOML behind [ssh] and [state]."""
        self.config.write_text(
            f'[ssh]\nlisten = ["tcp:{self.port}:interface=127.0.0.1"]\n{ssh_settings}\n'
            f'[state]\ndirectory = "{self.state}"\n{more}\n'
        )

    async def start(self) -> None:
        """Start the proxy, and wait until it takes connections."""
        self.proxy = Child("twistd").spawn(
            self._reactor,
            [
                str(BIN / "twistd"),
                "--nodaemon",
                "--pidfile=",
                "vmconsole",
                "--config",
                str(self.config),
            ],
            cwd=str(self.folder),
        )
        await self.proxy.expect(rb"vmconsole \S+ is ready")
        self.known_hosts.write_text(
            "".join(
                f"[127.0.0.1]:{self.port} {public.read_text()}"
                for public in self.state.glob("ssh_host_*.pub")
            )
        )

    async def log(self, pattern: bytes) -> None:
        """Wait for a line in the proxy's log, behind the one that was awaited last."""
        assert self.proxy is not None
        await self.proxy.expect(pattern)

    async def stop(self) -> None:
        """Stop the proxy as systemd does."""
        if self.proxy is not None:
            proxy, self.proxy = self.proxy, None
            await proxy.kill("TERM")
            self._logs += proxy.seen + proxy.errors

    @property
    def logs(self) -> str:
        """All that the proxy has logged."""
        running = self.proxy.seen + self.proxy.errors if self.proxy else b""
        return (self._logs + running).decode("utf-8", "replace")

    async def close(self) -> None:
        """End all that was started here."""
        for child in self._children:
            await child.kill()
        await self.stop()
        self.held.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    async def run(self, *arguments: str) -> str:
        """Run the ``vmconsole`` command; the result is its stdout."""
        out, err, status = await getProcessOutputAndValue(
            PROGRAM,
            [*arguments, "--config", str(self.config)],
            env={"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8"},
            reactor=self._reactor,
        )
        if status:
            raise RuntimeError(f"vmconsole {' '.join(arguments)}: {status}: {err.decode()}")
        return str(out.decode())

    async def add_user(self, name: str, *grants: str) -> Path:
        """A user with a new key and these grants; the result is the private key's file."""
        await self.run("user", "add", name)
        key = self.folder / f"{name}.key"
        key.touch(0o600)
        key.write_text(await self.run("key", "generate", name))
        for grant in grants:
            await self.run("grant", name, grant)
        return key

    def ssh(
        self,
        key: Path,
        *command: str,
        user: str = "vmproxy",
        terminal: bool = True,
        options: tuple[str, ...] = (),
    ) -> Child:
        """Start the real ssh; with ``terminal`` on a pty of its own, and with -t."""
        words = ["/usr/bin/ssh", "-F", "none", "-p", str(self.port), "-i", str(key)]
        for option in (
            # Of an option that is given twice ssh takes the first.
            *options,
            "IdentitiesOnly=yes",
            "IdentityAgent=none",
            "StrictHostKeyChecking=yes",
            f"UserKnownHostsFile={self.known_hosts}",
            "LogLevel=INFO",
            "EscapeChar=none",
        ):
            words += ["-o", option]
        words += ["-t"] if terminal else []
        child = Child(f"ssh {' '.join(command)}").spawn(
            self._reactor, [*words, f"{user}@127.0.0.1", *command], terminal=terminal
        )
        self._children.append(child)
        return child


async def booted(ssh: Child, key: bytes = b"", answer: bytes = b"") -> None:
    """Wait until a guest that was just started answers: what it is sent before is lost. A
    LightGuest echoes; another one prints ``answer``, a pattern, after ``key``."""
    for number in range(30):
        asked = key or b"<up%d>" % number
        ssh.type(asked)
        try:
            await ssh.expect(answer or asked, 2.0)
        except Unexpected:
            if ssh.status is not None:
                raise
        else:
            return
    raise Unexpected(f"{ssh.name}: the guest does not answer: {ssh.seen[-2000:]!r}")


async def log_in(ssh: Child, guest: str) -> None:
    """From anywhere on the console of a LinuxGuest to a fresh shell prompt."""
    name = guest.encode()
    found = b""
    while not found.startswith(name + b":"):
        ssh.type(b"root\r" if b"login" in found else b"\r")
        # Behind its prompt the shell may ask the terminal where the cursor is.
        found = (await ssh.expect(name + rb" login: $|Password: $|" + name + rb":\S+ "))[0]
