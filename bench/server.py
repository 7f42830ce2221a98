"""A server that the bench starts: a process of its own, with what it starts itself."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from bench import processes
from bench.errors import BenchError

ADDRESS = "127.0.0.1"
# Seconds.
_START = 30.0
_STOP = 10.0
_POLL = 0.02


class Server(ABC):
    """A server on the loopback address. Start and stop it once."""

    label: str

    def __init__(self) -> None:
        self._server: subprocess.Popen[bytes] | None = None
        self._log = Path()

    @abstractmethod
    def answers(self) -> bool:
        """Whether it takes connections by now."""

    @property
    def pid(self) -> int:
        """The server's main process."""
        assert self._server is not None
        return self._server.pid

    def cpu(self) -> float:
        """CPU seconds that the server took so far, with all its processes."""
        return processes.cpu(self.pid)

    def stop(self) -> None:
        """End the server and all that it started. May be called again."""
        server, self._server = self._server, None
        if server is None:
            return
        others = processes.tree(server.pid)[1:]
        server.terminate()
        try:
            server.wait(_STOP)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
        for pid in others:
            with suppress(ProcessLookupError):
                os.kill(pid, 15)

    def _spawn(self, command: Sequence[str], log: Path, cwd: Path, env: dict[str, str]) -> None:
        """Start the server, and wait until it takes connections. Raises BenchError.

        It ends with us even if we are killed, and a Ctrl-C on the terminal does not reach it.
        """
        self._log = log
        with log.open("wb") as output:
            self._server = subprocess.Popen(
                ["setpriv", "--pdeathsig", "TERM", *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=cwd,
                env=env,
                start_new_session=True,
            )
        deadline = time.monotonic() + _START
        while not self.answers():
            if self._server.poll() is not None:
                raise BenchError(f"{self.label} ended at its start:\n{self.log_end()}")
            if time.monotonic() > deadline:
                raise BenchError(f"{self.label} took no connections:\n{self.log_end()}")
            time.sleep(_POLL)

    def log_end(self) -> str:
        """The last words of the server."""
        try:
            return "\n".join(self._log.read_text(errors="replace").splitlines()[-20:])
        except OSError:
            return ""


def free_port() -> int:
    """A port of the loopback address that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((ADDRESS, 0))
        return int(probe.getsockname()[1])


def program(name: str) -> str:
    """The path of a program, daemons included. Raises BenchError."""
    path = shutil.which(name, path=f"{os.environ.get('PATH', '/usr/bin:/bin')}:/usr/sbin:/sbin")
    if path is None:
        raise BenchError(f"{name} is missing (bin/bench installs it)")
    return path


def output(*command: str, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    """What a program prints. Raises BenchError, with its own words."""
    try:
        done = subprocess.run(
            command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, capture_output=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BenchError(f"{' '.join(command)}: {error}") from error
    if done.returncode:
        said = (done.stdout + done.stderr).decode(errors="replace").strip()
        raise BenchError(f"{' '.join(command)}: exit status {done.returncode}: {said}")
    return done.stdout.decode()
