"""The command line of ``python -m tests.fuzz``."""

from __future__ import annotations

import argparse
import gc
import json
import time
from pathlib import Path

from tests.fuzz import holes
from tests.fuzz.campaign import LAYERS, Campaign, Discovery, load, save
from tests.fuzz.report import endings
from tests.fuzz.world import World, start_logging

_CORPUS = Path(__file__).parent / "corpus"
_SHOWN = 240


def main(arguments: list[str]) -> int:
    """Fuzz, or replay; 1 when something was found."""
    options = _parser().parse_args(arguments)
    start_logging()
    world = holes.HOLES[options.hole] if options.hole else World
    campaign = Campaign(options.seed, options.layer or list(LAYERS), world)
    if options.replay is not None:
        return _replay(campaign, options.replay)
    return 1 if _fuzz(campaign, options) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--packets", type=int, default=100_000, help="stop after so many")
    parser.add_argument("--seconds", type=float, default=0, help="stop after so long")
    parser.add_argument("--layer", action="append", choices=list(LAYERS), help="default: all")
    parser.add_argument("--replay", type=Path, help="play one program, as a finding left it")
    parser.add_argument("--save", type=Path, default=_CORPUS, help="folder for findings")
    parser.add_argument("--findings", type=int, default=5, help="stop after so many kinds")
    parser.add_argument("--coverage", action="store_true", help="of vmconsole/ssh")
    parser.add_argument("--hole", choices=list(holes.HOLES), help="open a hole on purpose")
    return parser


def _fuzz(campaign: Campaign, options: argparse.Namespace) -> int:
    seen: set[str] = set()
    # What is there by now stays, and need not be looked at by each collection.
    gc.collect()
    gc.freeze()
    started = time.perf_counter()
    while campaign.packets < options.packets and len(seen) < options.findings:
        passed = time.perf_counter() - started
        if options.seconds and passed >= options.seconds:
            break
        discovery = campaign.run_one(known=seen)
        if discovery is not None:
            seen.add(discovery.finding.kind)
            _show(discovery, save(discovery, options.save))
    passed = time.perf_counter() - started
    pace = campaign.packets / passed
    print(f"{campaign.packets} packets, {campaign.connections} connections, {pace:.0f} packets/s")
    print(f"seed {options.seed}; {len(seen)} different findings; connections ended:")
    print(endings(campaign.endings))
    return len(seen)


def _show(discovery: Discovery, path: Path) -> None:
    print(f"\nFOUND {discovery.finding.what}")
    print(f"by seed {discovery.seed}; shrunk to {len(discovery.program)} steps:")
    for step in discovery.program:
        text = json.dumps(step)
        print(f"    {text[:_SHOWN]}{'...' if len(text) > _SHOWN else ''}")
    print(f"again: python -m tests.fuzz --replay {path}\n", flush=True)


def _replay(campaign: Campaign, path: Path) -> int:
    finding = campaign.play(load(path))
    print(f"FOUND {finding.what}" if finding is not None else "nothing is wrong")
    return 1 if finding is not None else 0
