"""Makes lives: users with sessions, and an operator who changes their mind."""

from __future__ import annotations

from random import Random
from typing import Any

from tests.fuzz.authority import REVOKED_ID, TRUSTED
from tests.fuzz.grammar import Grammar
from tests.fuzz.steps import Program, Step

_KEYS = ("alice", "bob", "rsa", "ecdsa", "sk")
_CERTIFIED = ("alice", "bob", "stranger")
_NAMES = ("alice@internal", "alice@internal", "bob@internal", "carol@internal")
_IDS = ("a certificate", "another", REVOKED_ID.decode())
_SERIALS = (0, 1, 2, 7)
_WHAT = ("nothing", "bare", "console", "console", "console", "pipe", "list")
_SLEEPS = (0.5, 2.0, 6.0, 11.0, 16.0, 31.0)
_CLOCK = (-3600.0, -30.0, -5.0, 5.0, 30.0, 3600.0)


class Lives:
    """All its choices come from ``random``. It knows who came, not who was let in."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self._next = 0
        self._here: list[int] = []

    def limits(self) -> dict[str, Any]:
        """The limits of the server."""
        return {
            "idle": self._random.choice((0.0, 0.0, 10.0, 25.0, 90.0)),
            "sessions_per_user": self._random.choice((0, 0, 1, 2, 4)),
        }

    def steps(self) -> list[Step]:
        """What happens next."""
        random = self._random
        roll = random.random()
        if roll < 0.22 or not self._here:
            return self._come()
        if roll < 0.4:
            return [["sleep", random.choice(_SLEEPS)]]
        if roll < 0.58:
            return [self._truth()]
        number = random.choice(self._here)
        if roll < 0.64:
            self._here.remove(number)
            return [["leave", number]]
        if roll < 0.82:
            return [["open", number, random.choice(_WHAT)]]
        if roll < 0.94:
            return [["type", number, random.randrange(4)]]
        return [["shut", number, random.randrange(4)]]

    def _come(self) -> list[Step]:
        random = self._random
        self._next += 1
        self._here.append(self._next)
        how = None if random.random() < 0.3 else self._certificate()
        key = random.choice(_KEYS if how is None else _CERTIFIED)
        opened = ["open", self._next, random.choice(_WHAT)]
        return [["come", self._next, key, how], *([opened] if random.random() < 0.7 else [])]

    def _certificate(self) -> dict[str, Any]:
        random = self._random
        how: dict[str, Any] = {"ca": random.choice(TRUSTED[:3])}
        how["principals"] = [random.choice(_NAMES).encode().hex()]
        if random.random() < 0.6:
            how["before"] = random.choice((3, 20, 45, 100, 200))
        if random.random() < 0.5:
            how["serial"] = random.choice(_SERIALS)
        if random.random() < 0.5:
            how["id"] = random.choice(_IDS[:2]).encode().hex()
        return how

    def _truth(self) -> Step:
        random = self._random
        roll = random.random()
        if roll < 0.2:
            return ["set", random.choice(_CLOCK)]
        if roll < 0.35:
            return ["trust", [name for name in TRUSTED if random.random() < 0.8] or ["ed"]]
        if roll < 0.4:
            return ["spoil", random.choice(("user_ca", "revoked_keys"))]
        if roll < 0.55:
            return ["engine", random.choice((*_KEYS, *_NAMES[2:])), int(random.random() < 0.4)]
        if roll < 0.65:
            return ["pardon"]
        what = random.choice(("key", "ca", "id", "serial"))
        values: dict[str, tuple[Any, ...]] = {
            "key": (*_KEYS, *_CERTIFIED),
            "ca": TRUSTED[:3],
            "id": tuple(each.encode().hex() for each in _IDS),
            "serial": _SERIALS[1:],
        }
        return ["revoke", what, random.choice(values[what])]


def lives_program(grammar: Grammar, length: int) -> Program:
    """Users with sessions."""
    lives = Lives(grammar.random)
    program: Program = [["lives", lives.limits()]]
    while len(program) < length:
        program += lives.steps()
    return program
