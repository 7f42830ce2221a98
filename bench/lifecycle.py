"""Tells when guests that migrated to a host went on there: a child that hears the host's events.

python -m bench.lifecycle URI         prints the name and the time of each
"""

from __future__ import annotations

import sys
import time
from typing import Any

import libvirt

from bench.child import Child

_READY = "ready"
# Seconds.
_TIMEOUT = 15.0


class Arrivals(Child):
    """The arrivals on one host. Times are those of ``time.perf_counter``, the same in the child."""

    def __init__(self, uri: str) -> None:
        """``uri`` is libvirt's of the host. Waits until the child listens. Raises BenchError."""
        silence = "nothing was heard of a guest that should have arrived"
        super().__init__("bench.lifecycle", uri, _TIMEOUT, silence)

    def of(self, guest: str, after: float) -> float:
        """When a guest went on after it had arrived. Raises BenchError."""
        while True:
            name, _, moment = self.read().rpartition(" ")
            if name == guest and float(moment) > after:
                return float(moment)


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
