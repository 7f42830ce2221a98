"""Samples of one quantity for both sides, and what their ratio means in words."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

# How many samples a percentile needs to be more than the largest one.
_PERCENTILES = {90: 10, 99: 100}
# Ratios this near to 1 are called the same.
_SAME = 1.05

Quantity = Literal["time", "CPU", "memory", "lines", "hold"]
_WORDS: dict[Quantity, tuple[str, str]] = {
    "time": ("ours is {}x faster", "ours is {}x slower"),
    "CPU": ("ours takes {}x less CPU", "ours takes {}x more CPU"),
    "memory": ("ours takes {}x less memory", "ours takes {}x more memory"),
    "hold": ("ours holds it {}x shorter", "ours holds it {}x longer"),
    "lines": ("ours loses {}x fewer", "ours loses {}x more"),
}


class Series:
    """The samples of one side; at least one."""

    def __init__(self, samples: Iterable[float]) -> None:
        self._sorted = sorted(samples)
        if not self._sorted:
            raise ValueError("a series needs a sample")

    def __len__(self) -> int:
        return len(self._sorted)

    def percentile(self, percent: float) -> float:
        """The smallest sample that ``percent`` % of them do not exceed."""
        return self._sorted[max(0, math.ceil(len(self._sorted) * percent / 100) - 1)]

    @property
    def median(self) -> float:
        """The mean of the middle two, where there is no middle one."""
        middle = len(self._sorted) // 2
        return (self._sorted[middle] + self._sorted[~middle]) / 2

    def summary(self) -> dict[str, float]:
        """``median`` first; ``p90``, ``p99`` and ``min`` where there are samples enough."""
        values = {"median": self.median}
        for percent, needed in _PERCENTILES.items():
            if len(self) >= needed:
                values[f"p{percent}"] = self.percentile(percent)
        if len(self) > 1:
            values["min"] = self._sorted[0]
        return values


@dataclass(frozen=True)
class Measurement:
    """One quantity, measured on both sides. Less is better.

    One sample is a total, or a mean over the run; several are summarized.
    """

    name: str
    unit: str
    quantity: Quantity
    ours: Series
    alternative: Series


def ratio(ours: float, alternative: float) -> float:
    """How many times the alternative's value is ours: above 1, ours is better."""
    return alternative / ours if ours > 0 else math.inf


def words(quantity: Quantity, value: float) -> str:
    """A ratio in plain language."""
    if not 0 < value < math.inf:
        return "too little to compare"
    if 1 / _SAME <= value <= _SAME:
        return "about the same"
    better, worse = _WORDS[quantity]
    factor = max(value, 1 / value)
    digits = 0 if factor >= 10 else 1 if factor >= 1.2 else 2
    return (better if value > 1 else worse).format(f"{factor:.{digits}f}")
