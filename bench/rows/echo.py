"""echo: how long a keystroke takes to the guest and back, and what it costs the server."""

from __future__ import annotations

import gc
from contextlib import ExitStack

from bench.client import Client
from bench.row import Result, Row
from bench.setting import Setting
from bench.side import Side
from bench.stats import Measurement, Series

# Keystrokes; one is out at any time.
_BLOCK = 250
_WARM_UP = 100
_KEY = b"x"


class _Keys:
    """What one side's keystrokes took."""

    def __init__(self) -> None:
        self.milliseconds: list[float] = []
        self.cpu = 0.0

    def block(self, side: Side, client: Client) -> None:
        """Type a block of keys, each when the one before has come back."""
        before = side.cpu()
        self.milliseconds += [client.echo(_KEY) * 1000 for _ in range(_BLOCK)]
        self.cpu += side.cpu() - before

    @property
    def cpu_per_thousand(self) -> float:
        """Milliseconds of the server's CPU for 1000 keystrokes."""
        return self.cpu * 1_000_000 / len(self.milliseconds)


def run(setting: Setting, rounds: int) -> Result:
    """``rounds`` blocks of keystrokes for each side, in turn; the guests are changed halfway."""
    ours, alternative = setting.ours, setting.alternative
    keys: dict[Side, _Keys] = {ours: _Keys(), alternative: _Keys()}
    first, second = setting.guests[:2]
    halves = ((first, second, rounds - rounds // 2), (second, first, rounds // 2))
    gc.disable()
    try:
        for our_guest, alternative_guest, blocks in halves:
            _half(setting, keys, {ours: our_guest, alternative: alternative_guest}, blocks)
    finally:
        gc.enable()
    sides = (ours, alternative)
    return Result(
        [
            Measurement(
                "keystroke -> its echo",
                "ms",
                "time",
                *(Series(keys[side].milliseconds) for side in sides),
            ),
            Measurement(
                "server's CPU for 1000 keystrokes, mean",
                "ms",
                "CPU",
                *(Series([keys[side].cpu_per_thousand]) for side in sides),
            ),
        ],
        [
            f"{len(keys[ours].milliseconds)} keystrokes a side, one at a time. Both ways lead "
            "through the same ssh client, libvirtd and QEMU, which are in both times.",
        ],
    )


def _half(setting: Setting, keys: dict[Side, _Keys], guests: dict[Side, str], blocks: int) -> None:
    if not blocks:
        return
    with ExitStack() as stack:
        clients = {side: Client(side, guest) for side, guest in guests.items()}
        for client in clients.values():
            stack.enter_context(client)
            client.attach()
            client.answer()
            for _ in range(_WARM_UP):
                client.echo(_KEY)
        for number in range(blocks):
            for side in setting.order(number):
                keys[side].block(side, clients[side])
        for client in clients.values():
            client.leave()
    for side in clients:
        side.settle()


ROW = Row("echo", "round trip and CPU of a keystroke in an open session", 8, run)
