"""What a row is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.setting import Setting
from bench.stats import Measurement


@dataclass(frozen=True)
class Part:
    """What a row found beside another alternative than sshd and virsh: a table of its own."""

    name: str
    alternative: str
    """What it is called above the column."""
    measurements: Sequence[Measurement]
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Result:
    """What a row found. Notes say what was not comparable, or what to make of it.

    ``configuration`` tells how servers of its own were set up.
    """

    measurements: Sequence[Measurement]
    notes: Sequence[str] = ()
    configuration: str = ""
    parts: Sequence[Part] = ()


@dataclass(frozen=True)
class Row:
    """One thing to measure. ``run`` takes the number of rounds, and raises BenchError."""

    name: str
    summary: str
    rounds: int
    run: Callable[[Setting, int], Result]
