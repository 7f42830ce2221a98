"""A program of the bench's beside it, so that what the bench is busy with does not disturb it."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

from bench.errors import BenchError

_TOP = Path(__file__).parents[1]


class Child:
    """A module of the bench that runs by itself. Its first line tells that it is ready."""

    def __init__(self, module: str, argument: str, patience: float, silence: str) -> None:
        """Waits until the child is ready. Raises BenchError, with ``silence`` for its text, when
        it says nothing for ``patience`` seconds."""
        self._patience = patience
        self._silence = silence
        self._unread = b""
        command = [sys.executable, "-P", "-m", module, argument]
        self._child = subprocess.Popen(
            ["setpriv", "--pdeathsig", "TERM", *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(_TOP)},
            start_new_session=True,
        )
        assert self._child.stdout is not None
        self._output = self._child.stdout.fileno()
        try:
            self.read()
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """Its process's number."""
        return self._child.pid

    def write(self, line: str) -> None:
        """Say something to it."""
        assert self._child.stdin is not None
        self._child.stdin.write(line.encode() + b"\n")
        self._child.stdin.flush()

    def speaks(self) -> bool:
        """Whether there is something to read."""
        return bool(select.select([self._output], [], [], 0)[0])

    def read(self) -> str:
        """Its next line. Raises BenchError."""
        while b"\n" not in self._unread:
            ready, _, _ = select.select([self._output], [], [], self._patience)
            data = os.read(self._output, 4096) if ready else b""
            if not data:
                raise BenchError(self._silence)
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        return line.decode()

    def close(self) -> None:
        """End it. May be called again."""
        self._child.kill()
        self._child.wait()
        for stream in (self._child.stdin, self._child.stdout):
            assert stream is not None
            stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
