"""Whole programs of a client that speaks ssh: before the login, with certificates, and after it."""

from __future__ import annotations

from tests.fuzz.authority import specification
from tests.fuzz.grammar import CERTIFIED, KEYS, Grammar, hello, string
from tests.fuzz.steps import Program


def session_program(grammar: Grammar, length: int) -> Program:
    """After the login: sessions, and all that can be said in them."""
    random = grammar.random
    program: Program = [hello(random), grammar.login(random.choice(KEYS[:4]))]
    while len(program) < length:
        if random.random() < 0.15:
            program += grammar.session()
        else:
            program.append(grammar.anything())
    return program


def login_program(grammar: Grammar, length: int) -> Program:
    """Before the login: requests, good and bad, and what has no place there."""
    random = grammar.random
    program: Program = [hello(random)]
    while len(program) < length:
        roll = random.random()
        if roll < 0.9:
            program.append(grammar.attempt())
        elif roll < 0.93:
            program.append(grammar.login(random.choice(KEYS[:4])))
        elif roll < 0.97:
            name = random.choice((b"ssh-userauth", b"ssh-connection", b"", b"\xff"))
            program.append(grammar.send(["c", 5], string(name)))
        else:
            program.append(grammar.anything())
    return program


def certificate_program(grammar: Grammar, length: int) -> Program:
    """Certificates, good and bad, and what they let their users do."""
    random = grammar.random
    program: Program = [hello(random)]
    while len(program) < random.randrange(1, length):
        program.append(grammar.certified())
        if random.random() < 0.1:
            program.append(["sleep", random.choice((0.25, 1, 2))])
    key = random.choice(CERTIFIED[:9])
    program.append(grammar.login_by(key, specification(random, sound=True)))
    for _ in range(random.choice((1, 2))):
        program += grammar.session(plain=True)
    return [*program, *(grammar.data() for _ in range(random.choice((0, 2))))]
