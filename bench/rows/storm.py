"""storm: what a user on a console feels while strangers make the server compute key exchanges."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

from bench import processes
from bench.client import Client
from bench.row import Result, Row
from bench.setting import Setting
from bench.side import Side
from bench.stats import Measurement, Quantity, Series
from bench.strangers import Storm, Strangers

_FULL = Storm(strangers=300, at_once=30)
_PACED = Storm(strangers=60, at_once=30, interval=0.05)
_NO_STORM = "no storm"
_FULL_WORDS = f"{_FULL.at_once} strangers at a time"
_PACED_WORDS = f"{1 / _PACED.interval:.0f} strangers a second"

# Seconds of typing without a storm, and of rest before memory is read.
_CALM = 1.0
_REST = 1.5
# Seconds from one look at the memory to the next; and storms in which it is looked at.
_LOOK = 0.02
_LOOKED_AT = 3
_KEY = b"x"
# Milliseconds that somebody who types does not notice.
_PAUSE = 20.0
_MIB = 2**20


class _Felt:
    """Milliseconds from a key to its echo, on one side, by what went on meanwhile."""

    def __init__(self) -> None:
        self.milliseconds: dict[str, list[float]] = {
            words: [] for words in (_NO_STORM, _PACED_WORDS, _FULL_WORDS)
        }

    def round(self, side: Side, strangers: Strangers, guest: str) -> None:
        """One session, in which keys are typed, each when the one before has come back: without
        a storm, and during both. Raises BenchError."""
        with Client(side, guest) as client:
            client.attach()
            client.answer()
            end = time.monotonic() + _CALM
            self._type(_NO_STORM, client, lambda: time.monotonic() < end)
            # The full one is the last: what it leaves behind disturbs nothing.
            for words, storm in ((_PACED_WORDS, _PACED), (_FULL_WORDS, _FULL)):
                strangers.begin(storm)
                self._type(words, client, strangers.going)
                strangers.seconds()
            client.leave()
        side.settle()

    def _type(self, words: str, client: Client, more: Callable[[], bool]) -> None:
        while more():
            self.milliseconds[words].append(client.echo(_KEY) * 1000)


class _Cost:
    """What full storms, during which nobody is on a console, cost one side."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._cpu = self._strangers_cpu = 0.0

    def storm(self, side: Side, strangers: Strangers) -> None:
        """Raises BenchError."""
        before, strangers_before = side.cpu(), strangers.cpu()
        strangers.begin(_FULL)
        self.seconds.append(strangers.seconds())
        side.settle()
        self._cpu += side.cpu() - before
        self._strangers_cpu += strangers.cpu() - strangers_before

    @property
    def cpu_each(self) -> float:
        """Milliseconds of the server's CPU for one stranger."""
        return self._each(self._cpu)

    @property
    def stranger_cpu(self) -> float:
        """Milliseconds of CPU that a stranger takes."""
        return self._each(self._strangers_cpu)

    @property
    def rate(self) -> float:
        """Strangers that are served in a second."""
        return _FULL.strangers / Series(self.seconds).median

    def _each(self, seconds: float) -> float:
        return seconds * 1000 / (len(self.seconds) * _FULL.strangers)


def run(setting: Setting, rounds: int) -> Result:
    """In each round, for each side: a full storm to tell what it costs, and a session in which
    keys are typed without a storm, and during both."""
    sides: tuple[Side, Side] = (setting.ours, setting.alternative)
    guest = setting.guests[0]
    felt: dict[Side, _Felt] = {side: _Felt() for side in sides}
    cost: dict[Side, _Cost] = {side: _Cost() for side in sides}
    with ExitStack() as stack:
        strangers: dict[Side, Strangers] = {
            side: stack.enter_context(Strangers(side.access.port)) for side in sides
        }
        stack.enter_context(setting.held_open(guest))
        # First of all: what storms leave behind would hide what they take.
        memory = {side: _memory(side, strangers[side]) for side in sides}
        gc.disable()
        stack.callback(gc.enable)
        for number in range(rounds):
            for side in setting.order(number):
                cost[side].storm(side, strangers[side])
                felt[side].round(side, strangers[side], guest)
    idle, most = ([memory[side][which] / _MIB for side in sides] for which in (0, 1))
    more = [most[0] - idle[0], most[1] - idle[1]]
    return Result(
        [
            *_keystrokes(*(felt[side].milliseconds for side in sides)),
            _measured(
                f"storm of {_FULL.strangers}, {_FULL.at_once} at a time, until all were served",
                "s",
                "time",
                *(cost[side].seconds for side in sides),
            ),
            _measured(
                "server's CPU for one stranger, mean",
                "ms",
                "CPU",
                *([cost[side].cpu_each] for side in sides),
            ),
            _measured("server's memory, idle (PSS)", "MiB", "memory", *([each] for each in idle)),
            _measured(
                f"server's memory, {_FULL_WORDS}, most (PSS)",
                "MiB",
                "memory",
                *([each] for each in most),
            ),
        ],
        [*_NOTES, *_notes(setting, felt, cost, more)],
    )


def _memory(side: Side, strangers: Strangers) -> tuple[int, int]:
    """Bytes of the server's memory: idle, and the most in a few full storms. Raises BenchError."""
    side.settle()
    time.sleep(_REST)
    idle = most = processes.pss(side.pid)
    for _ in range(_LOOKED_AT):
        strangers.begin(_FULL)
        while strangers.going():
            most = max(most, processes.pss(side.pid))
            time.sleep(_LOOK)
        strangers.seconds()
        side.settle()
    return idle, most


def _keystrokes(
    ours: dict[str, list[float]], alternative: dict[str, list[float]]
) -> Iterator[Measurement]:
    for words in ours:
        samples = ours[words], alternative[words]
        yield _measured(f"keystroke -> echo, {words}", "ms", "time", *samples)
        longest = ([max(each)] for each in samples)
        yield _measured(f"longest echo, {words}", "ms", "time", *longest)


def _measured(
    name: str, unit: str, quantity: Quantity, ours: Sequence[float], alternative: Sequence[float]
) -> Measurement:
    return Measurement(name, unit, quantity, Series(ours), Series(alternative))


def _notes(
    setting: Setting, felt: dict[Side, _Felt], cost: dict[Side, _Cost], more: Sequence[float]
) -> Iterator[str]:
    ours, alternative = setting.ours, setting.alternative
    yield (
        f"In the full storm ours serves {cost[ours].rate:.0f} strangers a second, and the "
        f"alternative {cost[alternative].rate:.0f}. The client takes "
        f"{cost[ours].stranger_cpu:.1f} and {cost[alternative].stranger_cpu:.1f} ms of CPU for "
        "each of them."
    )
    yield (
        f"The full storm takes ours {more[0]:.1f} MiB of memory more than it has when idle, and "
        f"the alternative {more[1]:.1f} MiB."
    )
    for side in (ours, alternative):
        held = "; ".join(
            f"{words}: {sum(each > _PAUSE for each in milliseconds)} of {len(milliseconds)}"
            for words, milliseconds in felt[side].milliseconds.items()
        )
        yield f"{side.label}: keys that came back after more than {_PAUSE:g} ms: {held}."


_NOTES = (
    "A stranger makes a connection and a whole key exchange (curve25519-sha256), has one encrypted "
    "request answered, and leaves without a login. Each has an address of its own, so that no "
    "limit for one address takes part, and all are served.",
    "Keys are typed one at a time, on one session. What the storm costs was taken in other storms, "
    "with nobody on a console.",
    "A stranger costs the alternative three processes' time, two of which are started for it; ours "
    "is one process.",
)

ROW = Row("storm", "keystrokes of a user while strangers storm the server", 5, run)
