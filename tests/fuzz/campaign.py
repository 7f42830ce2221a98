"""A run of many programs: makes them from a seed, plays them, and shrinks what finds something."""

from __future__ import annotations

import gc
import json
import weakref
from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from tests.fuzz.balancer import proxy_program
from tests.fuzz.crowd import CrowdPlay
from tests.fuzz.crowds import crowd_program
from tests.fuzz.grammar import Grammar
from tests.fuzz.handshakes import bytes_program, handshake_program
from tests.fuzz.keyring import Known, make_ring
from tests.fuzz.lives import LivesPlay
from tests.fuzz.lives_programs import lives_program
from tests.fuzz.mutate import mutate
from tests.fuzz.peer import Runaway
from tests.fuzz.play import Finding, Play
from tests.fuzz.programs import certificate_program, login_program, session_program
from tests.fuzz.repeats import repeated_program
from tests.fuzz.steps import Program
from tests.fuzz.texts import TextPlay, texts_program
from tests.fuzz.watchdog import cpu_limit
from tests.fuzz.world import World

LAYERS: dict[str, Callable[[Grammar, int], Program]] = {
    "bytes": bytes_program,
    "handshake": handshake_program,
    "login": login_program,
    "certificate": certificate_program,
    "session": session_program,
    "repeat": repeated_program,
    "proxy": proxy_program,
    "crowd": crowd_program,
    "lives": lives_program,
    "texts": texts_program,
}
# Layers whose makers put in all the mistakes by themselves.
_UNCHANGED = {"repeat", "crowd", "lives", "texts"}
_LENGTHS = {
    **{"bytes": 12, "handshake": 10, "login": 60, "session": 150, "repeat": 0},
    **{"certificate": 12, "proxy": 12, "crowd": 250, "lives": 60, "texts": 30},
}
# Who plays a program, by its first step.
_PLAYS: dict[str, Callable[[World, Counter[str]], Any]] = {
    "crowd": CrowdPlay,
    "lives": LivesPlay,
    "texts": TextPlay,
}
# How often a step has a mistake in it: whole runs by the book find what one with a mistake in its
# first line never gets to.
_RATES = (0.0, 0.0, 0.005, 0.02, 0.2)
# After so many connections it is looked whether they are really gone.
_GENERATION = 50
# Bytes that the server may hold for good because of a generation of connections, each from a new
# address: some caches fill.
_MOST_KEPT = 1 << 20
_MOST_TRIES = 400
# For one program; the longest take a few.
_CPU_SECONDS = 60.0


class Discovery(NamedTuple):
    """A program that finds something, shrunk as far as it was possible."""

    finding: Finding
    program: Program
    layer: str
    seed: str


class Campaign:
    """Programs of some layers, from one seed. ``make_world`` makes the server that is fuzzed."""

    def __init__(
        self, seed: int, layers: list[str], make_world: Callable[[Any], World] = World
    ) -> None:
        self._seed, self._layers, self._make_world = seed, layers, make_world
        self._ring: dict[str, Known] = make_ring()
        self._number = 0
        self._spent: Counter[str] = Counter()
        self.packets = 0
        self.connections = 0
        self.endings: Counter[str] = Counter()
        self._renew()

    def _renew(self) -> None:
        self._world = self._make_world(self._ring)
        self._alive: list[weakref.ref[Any]] = []
        self._weight: int | None = None

    def run_one(self, known: Collection[str] = ()) -> Discovery | None:
        """Make and play the next program. Findings whose kind is ``known`` are passed over."""
        # Each has its share of packets: programs of some layers are a hundred times as long.
        layer = min(self._layers, key=lambda name: self._spent[name])
        seed = f"{self._seed}/{layer}/{self._number}"
        self._number += 1
        program = make_program(layer, seed)
        before = self.packets
        finding = self._play(program)
        self._spent[layer] += self.packets - before
        if finding is None or finding.kind in known:
            return None
        return Discovery(finding, self.shrink(program, finding), layer, seed)

    def play(self, program: Program) -> Finding | None:
        """Play one program on a new server."""
        self._renew()
        return self._play(program)

    def _play(self, program: Program) -> Finding | None:
        play = _PLAYS.get(program[0][0], Play)(self._world, self.endings)
        try:
            with cpu_limit(_CPU_SECONDS):
                finding: Finding | None = play.run(program)
        except Runaway as runaway:
            finding = Finding("runaway", str(runaway))
        self.packets += play.packets
        self.connections += len(play.servers)
        self._alive += map(weakref.ref, play.servers)
        del play
        if finding is None and len(self._alive) >= _GENERATION:
            finding = self._look_at_generation()
        if finding is not None:
            self._renew()
        return finding

    def _look_at_generation(self) -> Finding | None:
        gc.collect()
        count, left = len(self._alive), sum(each() is not None for each in self._alive)
        self._alive.clear()
        if left:
            return Finding("freed", f"{left} of {count} connections that ended are kept")
        before, self._weight = self._weight, self._world.weight()
        if before is not None and self._weight - before > _MOST_KEPT:
            grown = self._weight - before
            return Finding("kept", f"the server has grown by {grown} bytes in one generation")
        return None

    def shrink(self, program: Program, finding: Finding) -> Program:
        """A program with fewer steps, edits and bytes that still breaks the same rule."""
        if finding.oracle in ("freed", "kept"):
            # Not this connection's fault alone.
            return program

        def fails(smaller: Program) -> bool:
            found = self.play(smaller)
            return found is not None and found.kind == finding.kind

        return Shrinker(fails).shrink(program)


class Shrinker:
    """Delta debugging (Zeller), bounded. ``fails`` says whether a program still does."""

    def __init__(self, fails: Callable[[Program], bool]) -> None:
        self._fails = fails
        self._tries = 0

    def shrink(self, program: Program) -> Program:
        """First whole runs of steps go, then edits, tampers and counts."""
        program = self._without_steps(program)
        program = self._simpler_steps(program)
        return self._without_steps(program)

    def _still(self, program: Program) -> bool:
        self._tries += 1
        return self._tries <= _MOST_TRIES and self._fails(program)

    def _without_steps(self, program: Program) -> Program:
        size = max(1, (len(program) - 1) // 2)
        while True:
            at = 1
            while at < len(program):
                smaller = program[:at] + program[at + size :]
                if self._still(smaller):
                    program = smaller
                else:
                    at += size
            if size == 1:
                return program
            size = max(1, size // 2)

    def _simpler_steps(self, program: Program) -> Program:
        for at in range(len(program)):
            for step in _simpler(program[at]):
                smaller = [*program[:at], step, *program[at + 1 :]]
                if self._still(smaller):
                    program = smaller
                    break
        return program


def _simpler(step: list[Any]) -> list[list[Any]]:
    kind = step[0]
    if kind == "repeat":
        smaller = [["repeat", step[1] // part, step[2]] for part in (64, 16, 4, 2)]
        return [each for each in smaller if each[1]]
    if kind == "hello":
        return [[*step[:2], []], *([*step[:2], [each]] for each in step[2])]
    if kind == "send" and (step[2] or step[3]):
        return [["send", step[1], [], 0], ["send", step[1], step[2][:1], 0]]
    return []


def make_program(layer: str, seed: str) -> Program:
    """The program of this seed."""
    grammar = Grammar(Random(seed))
    program = LAYERS[layer](grammar, _LENGTHS[layer])
    if layer in _UNCHANGED:
        return program
    return mutate(program, grammar, grammar.random.choice(_RATES))


def save(discovery: Discovery, folder: Path) -> Path:
    """Write a program to a file that ``--replay`` takes, one step on a line."""
    name = discovery.seed.replace("/", "-")
    path = folder / f"{discovery.finding.oracle}-{name}.json"
    lines = ",\n".join(json.dumps(step) for step in discovery.program)
    path.write_text(f"[\n{lines}\n]\n")
    return path


def load(path: Path) -> Program:
    """A program from its file."""
    program: Program = json.loads(path.read_text())
    return program
