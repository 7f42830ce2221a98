"""migrate: how soon a user hears again of a guest that was moved to another host, live."""

from __future__ import annotations

import gc
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from statistics import fmean
from typing import NamedTuple

from bench.alternative import Alternative
from bench.client import Client
from bench.errors import BenchError
from bench.lifecycle import Arrivals
from bench.ours import Ours
from bench.row import Result, Row
from bench.setting import Setting
from bench.side import Side
from bench.stats import Measurement, Quantity, Series
from tests import lab

# Ours and the alternative's: a session of ours is never left. Our user may open light*.
_GUESTS = ("light-ours", "light-other")
_COUNT = b"i=0; while :; do echo n=$i=; i=$((i+1)); usleep 20000; done\r"
_LINE = rb"n=(\d+)=\r\n"
_END = b"=\r\n"
_WARM_UP = 1
# Milliseconds that may pass until the first line.
_GOAL = 2000.0
# Seconds that a move takes at most.
_PATIENCE = 30.0

_Hosts = tuple[lab.LibvirtHost, lab.LibvirtHost]


class _Line(NamedTuple):
    number: int
    at: float


class _Lines:
    """The counter's lines that a user sees: the first and the last before some words, and the
    first behind them."""

    def __init__(self, words: bytes) -> None:
        self.begun: _Line | None = None
        self.last: _Line | None = None
        self.first: _Line | None = None
        self._pattern = re.compile(_LINE + b"|" + re.escape(words))
        self._behind = False
        self._unread = b""

    def hear(self, client: Client) -> None:
        """Listen until the first line behind the words, or until ssh ends. Raises BenchError."""
        deadline = time.perf_counter() + _PATIENCE
        for data, now in client.pieces():
            self._take(data, now)
            if self.first is not None:
                return
            if now > deadline:
                raise BenchError(f"the guest did not move within {_PATIENCE:g} s")

    def _take(self, data: bytes, now: float) -> None:
        self._unread += data
        end = 0
        for found in self._pattern.finditer(self._unread):
            end = found.end()
            if found[1] is None:
                self._behind = True
            elif self._behind:
                self.first = self.first or _Line(int(found[1]), now)
            else:
                self.last = _Line(int(found[1]), now)
                self.begun = self.begun or self.last
        self._unread = self._unread[end:]


class _Moves:
    """Milliseconds of one side's user in all moves, and how many lines never came."""

    def __init__(self) -> None:
        self.resumed: list[float] = []
        self.silence: list[float] = []
        self.interval: list[float] = []
        self.lost: list[float] = []

    def add(self, lines: _Lines, resumed: float) -> None:
        """``resumed`` is when the guest went on. Raises BenchError."""
        begun, last, first = lines.begun, lines.last, lines.first
        if begun is None or last is None or first is None or begun == last:
            raise BenchError(f"a counter was to be seen on both hosts: {begun}, {last}, {first}")
        if first.number <= last.number or first.at < resumed:
            raise BenchError(f"after {last} came {first}, and the guest went on at {resumed}")
        self.resumed.append((first.at - resumed) * 1000)
        self.silence.append((first.at - last.at) * 1000)
        self.interval.append((last.at - begun.at) * 1000 / (last.number - begun.number))
        self.lost.append(first.number - last.number - 1)


class _Wanderer:
    """A guest that counts, and goes back and forth between two hosts."""

    def __init__(self, name: str, hosts: _Hosts, arrivals: Mapping[str, Arrivals]) -> None:
        """It is on the first host. ``arrivals`` are by host."""
        self.name = name
        self.hosts = hosts
        """Where it is, and where it moves to."""
        self._arrivals = arrivals
        self._mover = ThreadPoolExecutor(1)

    @contextmanager
    def move(self, lines: _Lines, moves: _Moves) -> Iterator[None]:
        """Move it, and let ``lines`` be listened to meanwhile. Raises LabError and BenchError."""
        source, target = self.hosts
        started = time.perf_counter()
        moving = self._mover.submit(source.migrate, self.name, target)
        try:
            yield
        finally:
            # If it failed, that is what went wrong.
            moving.result()
        self.hosts = target, source
        moves.add(lines, self._arrivals[target.name].of(self.name, started))


def _follow(guest: _Wanderer, client: Client, moves: _Moves) -> None:
    """Stay on the console while the guest moves."""
    # What came since the last time.
    client.read()
    lines = _Lines(b"is back, on %s.]" % guest.hosts[1].name.encode())
    with guest.move(lines, moves):
        lines.hear(client)


def _come_back(guest: _Wanderer, servers: Mapping[str, Side], moves: _Moves) -> None:
    """Be on the console while the guest moves, and log in again the moment that ssh has ended.
    ``servers`` are by host."""
    source, target = (servers[host.name] for host in guest.hosts)
    lines = _Lines(target.attached)
    with Client(source, guest.name) as client:
        client.attach()
        client.read_until(_END)
        with guest.move(lines, moves):
            lines.hear(client)
            with Client(target, guest.name) as again:
                lines.hear(again)
                again.leave()
    for side in (source, target):
        side.settle()


def run(setting: Setting, rounds: int) -> Result:
    """``rounds`` moves for each side."""
    hosts = setting.host, lab.get().node2
    with ExitStack() as stack:
        for host in hosts:
            stack.callback(_remove, host)
        for name in _GUESTS:
            hosts[0].run(lab.LinuxGuest(name))
        proxy, servers = _servers(setting, hosts, stack)
        for name in _GUESTS:
            _count(proxy, name)
        arrivals = {host.name: stack.enter_context(Arrivals(host.local_uri)) for host in hosts}
        guests = [_Wanderer(name, hosts, arrivals) for name in _GUESTS]
        client = stack.enter_context(Client(proxy, guests[0].name))
        client.attach()
        _series(setting, _WARM_UP, guests, client, servers)
        gc.disable()
        stack.callback(gc.enable)
        moves = _series(setting, rounds, guests, client, servers)
        client.leave()
    return _result(moves[setting.ours], moves[setting.alternative])


def _series(
    setting: Setting,
    rounds: int,
    guests: Sequence[_Wanderer],
    client: Client,
    servers: Mapping[str, Side],
) -> dict[Side, _Moves]:
    moves: dict[Side, _Moves] = {setting.ours: _Moves(), setting.alternative: _Moves()}
    for number in range(rounds):
        for side in setting.order(number):
            if side is setting.ours:
                _follow(guests[0], client, moves[side])
            else:
                _come_back(guests[1], servers, moves[side])
    return moves


def _servers(setting: Setting, hosts: _Hosts, stack: ExitStack) -> tuple[Side, dict[str, Side]]:
    """A proxy of ours that knows both hosts, and an sshd for each host, started."""
    first, second = hosts
    folders = [setting.directory / f"migrate-{name}" for name in ("ours", "alternative")]
    for folder in folders:
        folder.mkdir(mode=0o711)
    proxy = Ours(folders[0], {host.name: host.uri for host in hosts})
    sshd = Alternative(folders[1], second.uri, second.pki, setting.ours.access.key)
    for side in (proxy, sshd):
        stack.callback(side.stop)
        side.start()
    return proxy, {first.name: setting.alternative, second.name: sshd}


def _count(side: Side, guest: str) -> None:
    """Log in to the guest, and leave it counting."""
    with Client(side, guest) as client:
        client.attach()
        # Its first prompt may have come before we did.
        client.press(b"\r")
        client.read_until(b"login: ")
        client.press(b"root\r")
        client.read_until(b"# ")
        client.press(_COUNT)
        client.read_until(b"n=1=")
        client.leave()
    side.settle()


def _remove(host: lab.LibvirtHost) -> None:
    for name in _GUESTS:
        # It is on the other one.
        with suppress(lab.LabError):
            host.remove(name)


def _result(ours: _Moves, alternative: _Moves) -> Result:
    def measured(
        name: str, unit: str, quantity: Quantity, samples: Callable[[_Moves], list[float]]
    ) -> Measurement:
        each = (Series(samples(side)) for side in (ours, alternative))
        return Measurement(name, unit, quantity, *each)

    longest = max(ours.resumed)
    kept = "keeps" if longest <= _GOAL else "MISSES"
    interval = Series(ours.interval + alternative.interval).median
    return Result(
        [
            measured("resumed -> first line", "ms", "time", lambda side: side.resumed),
            measured(
                "resumed -> first line, longest", "ms", "time", lambda side: [max(side.resumed)]
            ),
            measured("last line -> first line", "ms", "time", lambda side: side.silence),
            measured(
                "last line -> first line, longest", "ms", "time", lambda side: [max(side.silence)]
            ),
            measured(
                "lines lost in a move, mean", "lines", "lines", lambda side: [fmean(side.lost)]
            ),
            measured("lines lost in a move, most", "lines", "lines", lambda side: [max(side.lost)]),
        ],
        [
            f"Ours took at most {longest / 1000:.2f} s from RESUMED to the first line, which "
            f"{kept} the goal of {_GOAL / 1000:g} s.",
            f"In {len(ours.lost)} moves each ours lost {sum(ours.lost):.0f} lines of the counter, "
            f"the alternative {sum(alternative.lost):.0f}. There is one every {interval:.0f} ms: "
            "no single time is more exact than that.",
            "Ours is one session that goes on by itself. The alternative's ends with the move, and "
            "its user logs in again the moment that it has, at the sshd of the right host: a "
            "script that knows which, not somebody who has to find it out.",
        ],
    )


ROW = Row("migrate", "how soon the console goes on after a live migration", 10, run)
