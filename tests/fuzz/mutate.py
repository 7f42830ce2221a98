"""Mistakes: a program, changed a little in its steps, its fields and its bytes."""

from __future__ import annotations

from copy import deepcopy
from random import Random
from typing import Any

from tests.fuzz.grammar import KEYS, Grammar
from tests.fuzz.handshakes import Handshakes
from tests.fuzz.steps import Program, Step


def mutate(program: Program, grammar: Grammar, rate: float) -> Program:
    """The program with a mistake in about ``rate`` of its steps; the first stays as it is."""
    random = grammar.random
    changed: Program = [program[0]]
    for step in program[1:]:
        if random.random() >= rate:
            changed.append(step)
            continue
        roll = random.random()
        if roll < 0.15:
            changed += [step, step]
        elif roll < 0.2 and len(changed) > 1:
            changed.insert(random.randrange(1, len(changed)), step)
        elif roll > 0.25:
            changed.append(_in_step(deepcopy(step), random, Handshakes(grammar)))
    return changed


def _in_step(step: Step, random: Random, handshakes: Handshakes) -> Step:
    if step[0] != "send":
        return step
    if random.random() < 0.5:
        step[2] = handshakes.edits()
        return step
    fields = step[1]
    at = random.randrange(len(fields))
    roll = random.random()
    if roll < 0.2:
        del fields[at]
    elif roll < 0.35:
        fields.insert(at, fields[random.randrange(len(fields))])
    elif roll < 0.5:
        other = random.randrange(len(fields))
        fields[at], fields[other] = fields[other], fields[at]
    else:
        fields[at] = _other_value(fields[at], random, handshakes)
    return step


def _other_value(field: list[Any], random: Random, handshakes: Handshakes) -> list[Any]:
    kind = field[0]
    if kind == "c":
        return ["c", random.getrandbits(8)]
    if kind in ("u", "chan", "new"):
        return ["u", random.choice((0, 1, 7, 255, 2**16, 2**31, 2**32 - 1, random.getrandbits(32)))]
    if kind == "s":
        value = bytes.fromhex(field[1])
        longer = random.choice((b"\0", b"\xff", b"\n", b"%s", b"x" * 33000, value))
        return ["s", random.choice((b"", value + longer, longer + value, value[:-1])).hex()]
    if kind == "key":
        return ["key", random.choice(KEYS)]
    if kind == "sig":
        return [*field[:3], random.choice(("other", "absent", "sha1", "pin", ""))]
    return field
