"""connect: how long until a user is on a console, and what a session costs the server."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable
from contextlib import ExitStack

from bench import processes
from bench.client import Client
from bench.row import Result, Row
from bench.setting import Setting
from bench.side import Side
from bench.stats import Measurement, Series

_WARM_UP = 2
# Of all rounds, the share in which QEMU is found not looking: they take a second longer.
_COLD = 0.5
# Seconds that open sessions are left alone before their memory is read.
_REST = 1.0
_MIB = 2**20


class _Times:
    """Milliseconds of one side, by what they measure; and CPU seconds."""

    def __init__(self) -> None:
        self.first: list[float] = []
        self.answer: list[float] = []
        self.exit: list[float] = []
        self.total: list[float] = []
        self.cpu = 0.0
        self.lost = 0

    def connect(self, side: Side, guest: str) -> None:
        """Connect, await the guest's answer to one key, and leave."""
        before = side.cpu()
        with Client(side, guest) as client:
            first = client.attach()
            answer = client.answer()
            left, ended = client.leave()
        side.settle()
        self.cpu += side.cpu() - before
        self.lost += client.lost > 0
        self.first.append((first - client.started) * 1000)
        self.answer.append((answer - client.started) * 1000)
        self.exit.append((ended - left) * 1000)
        self.total.append((ended - client.started) * 1000)


def run(setting: Setting, rounds: int) -> Result:
    """``rounds`` connects of each side to a guest whose pty is held open; half as many to one
    that nobody looks at; and as many sessions at once as there are guests."""
    ours, alternative = setting.ours, setting.alternative
    guest = setting.guests[0]
    # First of all: what ended sessions leave behind would hide what new ones take.
    _series(setting, guest, [0.0])
    ours_idle, ours_open = _memory(ours, setting.guests)
    alternative_idle, alternative_open = _memory(alternative, setting.guests)
    with setting.held_open(guest):
        _series(setting, guest, [0.0] * _WARM_UP)
        held = _series(setting, guest, [0.0] * rounds)
    # QEMU's clock starts when the last one leaves, and so a moment's difference could cost a
    # whole second, always: each round begins at another moment of it, the same for both sides.
    cold_rounds = max(1, round(rounds * _COLD))
    pauses = [number / cold_rounds for number in range(cold_rounds)]
    random.Random(1).shuffle(pauses)
    cold = _series(setting, guest, pauses)
    count = len(setting.guests)

    def times(name: str, of: dict[Side, _Times], attribute: str) -> Measurement:
        samples = (Series(getattr(of[side], attribute)) for side in (ours, alternative))
        return Measurement(name, "ms", "time", *samples)

    def memory(name: str, of_ours: float, of_alternative: float) -> Measurement:
        samples = (Series([value / _MIB]) for value in (of_ours, of_alternative))
        return Measurement(name, "MiB", "memory", *samples)

    cpu = [Series([held[side].cpu / rounds * 1000]) for side in (ours, alternative)]
    each = [
        (opened - idle) / count
        for opened, idle in ((ours_open, ours_idle), (alternative_open, alternative_idle))
    ]
    return Result(
        [
            times("ssh started -> first byte", held, "first"),
            times("ssh started -> guest answers, QEMU looking", held, "answer"),
            times("ssh started -> guest answers, QEMU not looking", cold, "answer"),
            times("leave typed -> ssh ended", held, "exit"),
            times("all of it: ssh started -> ended, QEMU looking", held, "total"),
            Measurement("server's CPU for one connect, mean", "ms", "CPU", *cpu),
            memory(f"server's memory for one of {count} sessions (PSS)", *each),
            memory("server's memory, idle (PSS)", ours_idle, alternative_idle),
            memory(f"server's memory, {count} sessions (PSS)", ours_open, alternative_open),
        ],
        [
            "The first byte: ours says it when the console is open, virsh before it opens it. "
            "Until the guest answers is the same way for both.",
            "QEMU looks once a second whether somebody opened a console that was closed. "
            '"QEMU looking": the bench holds it open too, so that this wait is not measured.',
            "Ours asks its engine for the key and for the VMs at each login; the alternative "
            "looks up the key in a file, and no rights.",
            "A key that is typed as soon as the words of the server are there was thrown away by "
            f"virsh in {held[alternative].lost} of {rounds} rounds, by ours in {held[ours].lost}; "
            "it was then typed again at once.",
            _break_even(ours_idle - alternative_idle, each[1] - each[0]),
        ],
    )


def _series(setting: Setting, guest: str, pauses: Iterable[float]) -> dict[Side, _Times]:
    """A round for each pause; in it both sides connect, each after that many seconds."""
    times: dict[Side, _Times] = {setting.ours: _Times(), setting.alternative: _Times()}
    for number, pause in enumerate(pauses):
        for side in setting.order(number):
            time.sleep(pause)
            times[side].connect(side, guest)
    return times


def _memory(side: Side, guests: list[str]) -> tuple[int, int]:
    """Bytes of the server's memory: idle, and with a session on each guest."""
    time.sleep(_REST)
    idle = processes.pss(side.pid)
    with ExitStack() as stack:
        clients = [stack.enter_context(Client(side, guest)) for guest in guests]
        for client in clients:
            client.attach()
            client.answer()
        time.sleep(_REST)
        opened = processes.pss(side.pid)
        for client in clients:
            client.leave()
    side.settle()
    return idle, opened


def _break_even(more_idle: float, less_each: float) -> str:
    if more_idle > 0 and less_each > 0:
        return (
            "Ours takes more memory when idle and less for each session: from "
            f"{more_idle / less_each:.0f} sessions on it takes less in all."
        )
    return "Neither side's memory overtakes the other's at any number of sessions."


ROW = Row("connect", "time, CPU and memory of a login to a console", 30, run)
