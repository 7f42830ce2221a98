"""The part of the row engine that asks our own engine, beside what HTTP alone costs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import processes
from bench.asking import AT_A_TIME, KINDS, MEMORY, OURS, Kind
from bench.embedded import EmbeddedServer
from bench.errors import BenchError
from bench.filling import HOSTS, KEYS, VMS
from bench.row import Part
from bench.stats import Measurement, Quantity, Series

# Seconds for a round, and for what comes before and after all of them.
_ROUND, _AROUND = 30, 120
_MIB = 2**20

_Samples = Mapping[str, Sequence[float]]
_Quantity = tuple[str, Quantity, str, Callable[[Sequence[float]], Sequence[float]]]


def _all(samples: Sequence[float]) -> Sequence[float]:
    return samples


def _mean(samples: Sequence[float]) -> Sequence[float]:
    return [sum(samples) / len(samples)]


# In this order: what is behind the kind's words, and which samples.
_QUANTITIES: tuple[_Quantity, ...] = (
    ("{}", "time", "alone", _all),
    (f"{{}}, {AT_A_TIME} at a time, each", "time", "together", _all),
    ("server's CPU: {}, mean", "CPU", "cpu", _mean),
    ("longest hold: {}", "hold", "held", _all),
    (f"longest hold: {{}}, {AT_A_TIME} at a time", "hold", "held_together", _all),
)


def run(directory: Path, rounds: int) -> Part:
    """Makes ``directory``. Raises BenchError."""
    server = EmbeddedServer(directory)
    try:
        server.start()
        found = _ask(directory, server.pid, rounds)
        memory = processes.pss(server.pid) / _MIB
    finally:
        server.stop()
    ours, alternative = found["samples"][OURS], found["samples"][MEMORY]
    return Part(
        "our own as a server",
        "from memory",
        list(_measurements(ours, alternative)),
        [*_NOTES, *_notes(ours, found, memory)],
    )


def _ask(directory: Path, pid: int, rounds: int) -> dict[str, Any]:
    command = [sys.executable, "-P", "-m", "bench.asking", str(directory), str(pid), str(rounds)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, timeout=_AROUND + _ROUND * rounds
        )
        if done.returncode == 0:
            found: dict[str, Any] = json.loads(done.stdout)
            return found
        reason = "\n".join(done.stderr.decode(errors="replace").splitlines()[-10:])
    except subprocess.TimeoutExpired:
        reason = "it did not end"
    raise BenchError(f"asking our embedded engine: {reason}")


def _measurements(
    ours: Mapping[str, _Samples], alternative: Mapping[str, _Samples]
) -> Iterator[Measurement]:
    for name, quantity, which, summary in _QUANTITIES:
        for kind in KINDS:
            samples = ours[kind.name][which], alternative[kind.name][which]
            if all(samples):
                series = (Series(summary(each)) for each in samples)
                yield Measurement(name.format(kind.words), "ms", quantity, *series)


def _notes(ours: Mapping[str, _Samples], found: Mapping[str, Any], memory: float) -> list[str]:
    rates = [
        f"{kind.words}: {1000 / Series(samples).median:.0f}"
        for kind in KINDS
        if (samples := ours[kind.name]["together"])
    ]
    ticket = Series(found["ticket"]).median
    smallest = _one(ours)
    idle, adding = (Series(found[name]).median for name in ("idle", "adding"))
    return [
        f"Requests a second of ours, {AT_A_TIME} at a time: {'; '.join(rates)}.",
        f"To verify a ticket, which the alternative does not, takes {ticket:.2f} ms of CPU: "
        f"{ticket / smallest * 100:.0f} % of what ours takes for a user with one VM.",
        f"The longest hold while nothing was asked for was {idle:.1f} ms (the median of "
        f"{len(found['idle'])}), and {adding:.1f} ms while a key was added.",
        f"After all that the server has {memory:.0f} MiB of memory (PSS); the replies from memory "
        "are in it.",
    ]


def _one(ours: Mapping[str, _Samples]) -> float:
    """Milliseconds of CPU for the smallest answer."""
    kind: Kind = next(kind for kind in KINDS if kind.name == "one")
    return _mean(ours[kind.name]["cpu"])[0]


_NOTES = (
    f"N keys: the answer to public_keys; {KEYS:,}, each of another user. N VMs: that to "
    f"available_consoles for a user who may open so many, of {VMS:,} on {HOSTS} hosts, which a "
    "double of the hosts lists; those with one VM are others each time.",
    "Over the unix socket; each request has a connection of its own, as the proxy's. The client's "
    "work for the reply is in all times; its tickets were signed before.",
    "The alternative is a plain twisted.web resource in the same process, which sends the same "
    "bytes from memory, and looks at nothing: what HTTP alone costs.",
)
