"""The report, for people and as JSON."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from bench import client
from bench.row import Part, Result
from bench.setting import Setting
from bench.stats import Measurement, ratio, words

_NAME, _VALUE = 52, 14


def heading(machine: Mapping[str, str], setting: Setting) -> str:
    """The machine, and how both sides are set up."""
    lines = ["# The machine", ""]
    lines += [f"{name + ':':16}{value}" for name, value in machine.items()]
    sides = (setting.ours, setting.alternative)
    lines += ["", "# The client, the same for both", ""]
    lines += [shlex.join(client.command(setting.alternative, "-tt", "GUEST"))]
    for side in sides:
        lines += ["", f"# {side.label}", ""]
        lines += [f"negotiated: {client.negotiated(side)}", ""]
        lines += side.configuration().rstrip().splitlines()
    return "\n".join(lines) + "\n"


def table(name: str, rounds: int, result: Result, setting: Setting) -> str:
    """What a row found."""
    lines = [""]
    if result.configuration:
        lines += [*result.configuration.rstrip().splitlines(), ""]
    labels = (setting.ours.label, setting.alternative.label)
    lines += _table(f"# {name}, {rounds} rounds", labels, result)
    for part in result.parts:
        labels = (setting.ours.label, part.alternative)
        lines += ["", *_table(f"# {name}: {part.name}, {rounds} rounds", labels, part)]
    return "\n".join(lines) + "\n"


def _table(title: str, labels: Sequence[str], found: Result | Part) -> list[str]:
    head = "".join(f"{label:>{_VALUE}}" for label in (*labels, "ratio"))
    lines = [title + head.rjust(_NAME + 3 * _VALUE - len(title))]
    for measurement in found.measurements:
        lines += ["", *_lines(measurement)]
    return [*lines, "", *(f"- {note}" for note in found.notes)]


def _lines(measurement: Measurement) -> list[str]:
    name = f"{measurement.name} ({measurement.unit})"
    summaries = measurement.ours.summary(), measurement.alternative.summary()
    single = len(summaries[0]) == 1
    lines = [] if single else [name]
    for key in summaries[0]:
        ours, alternative = summaries[0][key], summaries[1][key]
        factor = ratio(ours, alternative)
        label = name if single else f"    {key}"
        line = f"{label:{_NAME}}{ours:{_VALUE}.2f}{alternative:{_VALUE}.2f}{factor:{_VALUE}.2f}"
        if key == "median":
            line += f"   {words(measurement.quantity, factor)}"
        lines.append(line)
    return lines


def as_json(
    machine: Mapping[str, str], setting: Setting, results: Mapping[str, Result]
) -> dict[str, Any]:
    """All of it. ``ratio`` is the alternative's value divided by ours."""
    return {
        "machine": dict(machine),
        "configuration": {
            side.label: side.configuration() for side in (setting.ours, setting.alternative)
        },
        "rows": {
            name: {
                "measurements": [_measurement(each) for each in result.measurements],
                "notes": list(result.notes),
                "configuration": result.configuration,
                "parts": [
                    {
                        "name": part.name,
                        "alternative": part.alternative,
                        "measurements": [_measurement(each) for each in part.measurements],
                        "notes": list(part.notes),
                    }
                    for part in result.parts
                ],
            }
            for name, result in results.items()
        },
    }


def _measurement(measurement: Measurement) -> dict[str, Any]:
    ours, alternative = measurement.ours.summary(), measurement.alternative.summary()
    ratios = {key: ratio(ours[key], alternative[key]) for key in ours}
    return {
        "name": measurement.name,
        "unit": measurement.unit,
        "samples": len(measurement.ours),
        "ours": ours,
        "alternative": alternative,
        # JSON knows no infinity.
        "ratio": {key: value if value < math.inf else None for key, value in ratios.items()},
        "words": words(measurement.quantity, ratios["median"]),
    }
