"""``python -m bench [ROW...]``: see bin/bench, which sets up what it needs."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from bench import machine, report
from bench.errors import BenchError
from bench.row import Result
from bench.rows import ROWS
from bench.setting import set_up
from tests.lab import LabError


def main() -> int:
    """Run it; returns the exit status."""
    options = _parse()
    if options.list:
        for row in ROWS.values():
            print(f"{row.name:12}{row.summary} (rounds: {row.rounds})")
        return 0
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        _measure(options.rows or list(ROWS), options.rounds, options.json)
    except (BenchError, LabError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bench: interrupted; all is stopped", file=sys.stderr)
        return 130
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bin/bench",
        description="Measure vmconsole beside an OpenSSH sshd that execs virsh console.",
    )
    # Not as choices: argparse would not take none of them then.
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"all of: {', '.join(ROWS)}")
    parser.add_argument("--list", action="store_true", help="list the rows, and end")
    parser.add_argument("--rounds", type=int, metavar="N", help="rounds of each row")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    options = parser.parse_args()
    for name in options.rows:
        if name not in ROWS:
            parser.error(f"no such row: {name} (there are: {', '.join(ROWS)})")
    if options.rounds is not None and options.rounds < 1:
        parser.error("--rounds: at least 1")
    return options


def _measure(rows: list[str], rounds: int | None, file: Path | None) -> None:
    began = time.monotonic()
    facts = machine.facts()
    _tell("starting a lab host, guests, and both servers")
    with set_up() as setting:
        print(report.heading(facts, setting), flush=True)
        results: dict[str, Result] = {}
        for name in rows:
            count = rounds or ROWS[name].rounds
            _tell(f"{name}: {count} rounds")
            results[name] = ROWS[name].run(setting, count)
            print(report.table(name, count, results[name], setting), flush=True)
        if file is not None:
            text = json.dumps(report.as_json(facts, setting, results), indent=2)
            file.write_text(text + "\n")
    print(f"Took {time.monotonic() - began:.0f} s; {machine.load()} at the end.")


def _tell(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
