"""Makes crowds: storms of strangers, users among them, and time that passes."""

from __future__ import annotations

from random import Random
from typing import Any

from tests.fuzz.grammar import Grammar
from tests.fuzz.steps import Program, Step

_FEW = (
    *("198.51.100.1", "198.51.100.2", "::ffff:198.51.100.1"),
    # One source, since whoever has a /64 has all of its addresses; and another one.
    *("2001:db8::1", "2001:db8::2", "2001:db8::ffff:1", "2001:db8:0:1::1"),
)
_SLEEPS = (0.0, 0.05, 0.2, 0.2, 1.0, 1.0, 2.5, 5.0, 12.0, 61.0)


class Crowds:
    """All its choices come from ``random``. It knows who came, not who was let in."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self._next = 0
        self._here: list[int] = []
        self._rude = random.choice((0.1, 0.5, 0.9))
        self._few = random.choice((0.2, 0.8))
        self._balanced = random.choice((0.0, 0.0, 0.5, 1.0))

    def limits(self) -> dict[str, Any]:
        """The limits of the server: as they are by default, or low ones."""
        random = self._random
        chosen: dict[str, Any] = {}
        if random.random() < 0.7:
            chosen["unauthenticated"] = random.choice((8, 16, 40))
            chosen["connections"] = random.choice((5, 30, 1000))
            chosen["per_address"] = random.choice((1, 4, 20))
        if random.random() < 0.5:
            chosen["ban_after"] = random.choice((1, 3, 12))
            chosen["ban_seconds"] = random.choice((5.0, 60.0, 600.0))
        if random.random() < 0.5:
            chosen["login_grace"] = random.choice((3.0, 60.0))
        return chosen

    def steps(self) -> list[Step]:
        """What happens next."""
        random = self._random
        roll = random.random()
        if roll < 0.1:
            return [["sleep", random.choice(_SLEEPS)]]
        if roll < 0.25:
            return self._storm()
        if roll < 0.6 or not self._here:
            return [self._come(self._address())]
        number = random.choice(self._here)
        if roll < 0.75:
            self._here.remove(number)
            return [["leave", number]]
        if random.random() > self._rude:
            return [["login", number, "alice"]]
        return [[random.choice(("bad", "bad", "rubbish", "cling")), number]]

    def _come(self, address: str) -> Step:
        self._next += 1
        self._here.append(self._next)
        return ["come", self._next, address, int(self._random.random() < self._balanced)]

    def _address(self) -> str:
        random = self._random
        if random.random() < self._few:
            return random.choice(_FEW)
        if random.random() < 0.05:
            return ""
        return f"203.0.{random.randrange(256)}.{random.randrange(256)}"

    def _storm(self) -> list[Step]:
        random = self._random
        address = self._address() if random.random() < 0.7 else None
        made = [
            self._come(self._address() if address is None else address)
            for _ in range(random.choice((3, 12, 30)))
        ]
        what = random.choice(("", "", "leave", "bad", "rubbish", "login"))
        if not what:
            return made
        behind: list[Step] = []
        for step in made:
            behind += [step, ["login", step[1], "alice"] if what == "login" else [what, step[1]]]
        return behind


def crowd_program(grammar: Grammar, length: int) -> Program:
    """A crowd."""
    random = grammar.random
    crowds = Crowds(random)
    program: Program = [["crowd", crowds.limits(), random.getrandbits(32)]]
    while len(program) < length:
        program += crowds.steps()
    return program
