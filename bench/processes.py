"""What processes cost, from /proc: CPU seconds and memory."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

_TICK = 1 / os.sysconf("SC_CLK_TCK")
# Of the fields of /proc/PID/stat that follow the command's name, counted from 0: see proc(5).
_PPID, _CUTIME, _CSTIME = 1, 13, 14


def _stat(pid: int) -> list[str]:
    # The name is in parentheses, and may contain anything.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def tree(root: int) -> list[int]:
    """A process and all its descendants that live; those that go meanwhile are left out."""
    children: dict[int, list[int]] = defaultdict(list)
    for name in os.listdir("/proc"):
        if name.isdigit():
            with suppress(OSError):
                children[int(_stat(int(name))[_PPID])].append(int(name))
    found = [root]
    for pid in found:
        found += children[pid]
    return found


def own_cpu(pid: int) -> float:
    """CPU seconds (user and system) of a process alone: exact, and soon told."""
    # The clock id of another process, as clock_getcpuclockid(3) makes it: nanoseconds, where
    # /proc/PID/stat has ticks of 10 ms.
    return time.clock_gettime((~pid << 3) | 2)


def _reaped_cpu(pid: int) -> float:
    fields = _stat(pid)
    return (int(fields[_CUTIME]) + int(fields[_CSTIME])) * _TICK


def cpu(root: int) -> float:
    """CPU seconds (user and system) of a process, its descendants, and those that ended.

    What ended is counted in ticks of 10 ms, once it was waited for: take differences over many.
    """
    used = 0.0
    for pid in tree(root):
        with suppress(OSError):
            used += own_cpu(pid) + _reaped_cpu(pid)
    return used


def peak(pid: int) -> int:
    """Bytes of memory of a process, shared ones too, when it had the most."""
    return _kilobytes(Path(f"/proc/{pid}/status"), "VmHWM") * 1024


def pss(root: int) -> int:
    """Bytes of memory of a process and its descendants.

    It is the proportional set size: a page that N processes share counts as one Nth.
    """
    total = 0
    for pid in tree(root):
        with suppress(OSError):
            total += _kilobytes(Path(f"/proc/{pid}/smaps_rollup"), "Pss") * 1024
    return total


def _kilobytes(file: Path, name: str) -> int:
    for line in file.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    return 0
