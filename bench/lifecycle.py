"""Tells when guests that migrated to a host went on there: a child that hears the host's events.

python -m bench.lifecycle URI         prints the name and the time of each
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import libvirt

from bench.errors import BenchError

_TOP = Path(__file__).parents[1]
_READY = "ready"
# Seconds.
_TIMEOUT = 15.0


class Arrivals:
    """The arrivals on one host. Times are those of ``time.perf_counter``, the same in the child.

    The child does nothing else, so that what the bench is busy with does not delay them.
    """

    def __init__(self, uri: str) -> None:
        """``uri`` is libvirt's of the host. Waits until the child listens. Raises BenchError."""
        self._unread = b""
        self._child = subprocess.Popen(
            ["setpriv", "--pdeathsig", "TERM", sys.executable, "-P", "-m", "bench.lifecycle", uri],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(_TOP)},
            start_new_session=True,
        )
        assert self._child.stdout is not None
        self._output = self._child.stdout.fileno()
        try:
            self._read()
        except BaseException:
            self.close()
            raise

    def of(self, guest: str, after: float) -> float:
        """When a guest went on after it had arrived. Raises BenchError."""
        while True:
            name, _, moment = self._read().rpartition(" ")
            if name == guest and float(moment) > after:
                return float(moment)

    def close(self) -> None:
        """End the child. May be called again."""
        self._child.kill()
        self._child.wait()
        assert self._child.stdout is not None
        self._child.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _read(self) -> str:
        """The child's next line."""
        while b"\n" not in self._unread:
            ready, _, _ = select.select([self._output], [], [], _TIMEOUT)
            data = os.read(self._output, 4096) if ready else b""
            if not data:
                raise BenchError("nothing was heard of a guest that should have arrived")
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        return line.decode()


def _heard(_connection: object, domain: Any, event: int, detail: int, _opaque: object) -> None:
    now = time.perf_counter()
    if (event, detail) == (
        libvirt.VIR_DOMAIN_EVENT_RESUMED,
        libvirt.VIR_DOMAIN_EVENT_RESUMED_MIGRATED,
    ):
        print(domain.name(), now, flush=True)


def _main(uri: str) -> None:
    libvirt.virEventRegisterDefaultImpl()
    connection = libvirt.open(uri)
    connection.domainEventRegisterAny(None, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, _heard, None)
    print(_READY, flush=True)
    while True:
        libvirt.virEventRunDefaultImpl()


if __name__ == "__main__":
    _main(sys.argv[1])
