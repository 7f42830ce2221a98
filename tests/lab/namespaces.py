"""The namespaces of a lab host, steered through their process 1: the other side of init.py."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

from tests.lab.errors import LabError, environment, log_end

_INIT = Path(__file__).with_name("init.py")
_CLOSE_TIMEOUT = 15.0


class Namespaces:
    """Process, mount and host name namespaces, and in them a daemon to start and stop.

    Without root they are made inside a user namespace, where the kernel lets us.
    """

    def __init__(self, directory: Path, name: str, daemon: list[str], log: Path) -> None:
        """Make them. Raises LabError. ``directory`` is removed when they end."""
        self._name = name
        self._lock = threading.Lock()
        kinds = ["--mount", "--uts", "--pid", "--fork", "--mount-proc", "--kill-child"]
        if os.geteuid():
            kinds += ["--user", "--map-root-user"]
        command = ["unshare", *kinds, sys.executable, "-I", str(_INIT), str(directory), name]
        with log.open("ab") as errors:
            self._init = subprocess.Popen(
                [*command, *daemon],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment(),
                start_new_session=True,  # Ctrl-C is for the tests: they close us in order
            )
        assert self._init.stdin is not None and self._init.stdout is not None
        self._input, self._output = self._init.stdin, self._init.stdout
        answer = self._output.readline().decode().strip()
        if answer != "ok":
            words = answer or log_end(log)
            self.close()
            hint = "" if os.geteuid() == 0 else "\nRun it as root: not every kernel lets others."
            raise LabError(f"no namespaces for a lab host: {words}{hint}")

    def tell(self, word: str) -> str:
        """One of init.py's words; returns the answer. Raises LabError when closed."""
        with self._lock:
            try:
                self._input.write(word.encode() + b"\n")
                self._input.flush()
                return self._output.readline().decode().strip() or "its process 1 has ended"
            except (OSError, ValueError) as error:
                raise LabError(f"{self._name} is closed") from error

    def close(self) -> None:
        """End all processes in there. May be called again."""
        for pipe in (self._input, self._output):
            with suppress(OSError):
                pipe.close()
        try:
            self._init.wait(_CLOSE_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._init.kill()  # --kill-child: process 1 goes too, and with it everybody
            self._init.wait()
