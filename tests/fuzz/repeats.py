"""Programs that say a few things thousands of times: whatever is kept of each would show."""

from __future__ import annotations

from tests.fuzz.grammar import KEYS, Grammar, hello
from tests.fuzz.steps import Program, Step

_TIMES = 1500
_BULK = 4000


def repeated_program(grammar: Grammar, _length: int) -> Program:
    """A session, and up to four messages that are sent again and again, some of them large."""
    random = grammar.random
    program: Program = [hello(random), grammar.login(random.choice(KEYS[:4]))]
    if random.random() < 0.7:
        program += grammar.session()
    steps = [grammar.anything() for _ in range(random.randrange(1, 5))]
    # Time that passes as often would be months; what a guest prints is no doing of the client's.
    steps = [_larger(step, grammar) for step in steps if step[0] not in ("sleep", "guest")]
    return [*program, ["repeat", _TIMES, steps]]


def _larger(step: Step, grammar: Grammar) -> Step:
    if step[0] == "send" and grammar.random.random() < 0.6:
        return ["send", [*step[1], ["b", bytes(_BULK).hex()]], [], step[3]]
    return step
