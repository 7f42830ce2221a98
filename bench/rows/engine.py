"""engine: what a site's size costs: many keys, many VMs, and an engine that has to be asked.

How our own engine answers is measured by itself: see engine_server."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from bench import lists, processes
from bench.client import Client
from bench.engine import KEYS, Engine
from bench.errors import BenchError
from bench.row import Result, Row
from bench.rows import engine_server
from bench.setting import Setting
from bench.side import Side
from bench.site import Site
from bench.stats import Measurement, Quantity, Series

_KEYS = (10, 1_000, 100_000)
_VMS = (10, 10_000)
_FEW, _MANY = _KEYS[0], _KEYS[-1]

# Lines of our [engine]. Everything is remembered:
_WARM = "timeout = 30.0\ncache_ttl = 3600.0\nrecheck = 3600.0\n"
# Shorter than the time between two rounds: each of them asks once for the keys, and for the VMs.
_ANEW = "cache_ttl = 0.1\n"
# Logins and an open session have the keys fetched again all the time.
_BUSY = "timeout = 30.0\ncache_ttl = 0.5\nrecheck = 1.0\n"

_WARM_UP = 2
# Seconds: of typing, from one login meanwhile to the next, and of rest before memory is read.
_TYPING = 5.0
_LOGINS = 0.5
_REST = 1.5
_KEY = b"x"
_PROMPT = b"\r\n> "
# Milliseconds for which the reactor may be held.
_PAUSE = 20.0
_MIB = 2**20


class _Times:
    """Milliseconds of one side, and the server's CPU seconds."""

    def __init__(self) -> None:
        self.milliseconds: list[float] = []
        self._cpu = 0.0

    def login(self, side: Side) -> None:
        """Log in for one word of the server."""
        with self._cpu_of(side), Client(side, "info", terminal=False) as client:
            _, first = client.read()
            self.milliseconds.append((first - client.started) * 1000)
            client.end()

    def menu(self, side: Side) -> None:
        """Log in, await the menu's prompt, and choose nothing."""
        with self._cpu_of(side), Client(side, "") as client:
            prompt = client.read_until(_PROMPT)
            self.milliseconds.append((prompt - client.started) * 1000)
            client.press(b"q\r")
            client.end()

    @property
    def cpu_each(self) -> float:
        """Milliseconds of CPU for one of them."""
        return self._cpu * 1000 / len(self.milliseconds)

    @contextmanager
    def _cpu_of(self, side: Side) -> Iterator[None]:
        before = side.cpu()
        yield
        side.settle()
        self._cpu += side.cpu() - before


_Measure = Callable[[_Times, Side], None]


class _Found:
    """What was measured, by kind, and what else is to be said."""

    def __init__(self) -> None:
        self.times: list[Measurement] = []
        self.cpu: list[Measurement] = []
        self.memory: list[Measurement] = []
        self.notes: list[str] = []
        self.configuration = ""

    def add_times(self, what: str, of: dict[Side, _Times], setting: Setting) -> None:
        """Both sides' times, and their CPU."""
        ours, alternative = of[setting.ours], of[setting.alternative]
        self.times.append(_time(what, ours.milliseconds, alternative.milliseconds))
        each = [ours.cpu_each], [alternative.cpu_each]
        self.cpu.append(_measured(f"server's CPU: {what}, mean", "ms", "CPU", *each))

    def add_memory(self, what: str, setting: Setting) -> None:
        """Both servers' memory now."""
        each = ([processes.pss(side.pid) / _MIB] for side in (setting.ours, setting.alternative))
        name = f"server's memory, {what} (PSS)"
        self.memory.append(_measured(name, "MiB", "memory", *each))


def run(setting: Setting, rounds: int) -> Result:
    """``rounds`` logins of each side for each number of keys, half as many menus for each number
    of VMs, and keystrokes while others log in."""
    found = _Found()
    site = Site(setting, setting.directory / "engine")
    started: dict[int, float] = {}
    with ExitStack() as stack:
        stack.callback(site.engine.stop)
        site.engine.start()
        for keys in _KEYS:
            with site.servers(f"{keys}-keys", keys, _VMS[0], _WARM) as servers:
                started[keys] = _logins(servers, keys, rounds, found)
                if keys == _MANY:
                    calm = _keystrokes(servers.ours, servers.guests[0])
                    alternative = _keystrokes(servers.alternative, servers.guests[1])
        with site.servers("rsa", _MANY, _VMS[0], _WARM, lists.RSA) as servers:
            _first_login(servers, f"{_MANY:,} RSA keys", found)
            time.sleep(_REST)
            found.add_memory(f"{_MANY:,} RSA keys", servers)
        for vms in _VMS:
            with site.servers(f"{vms}-vms", _FEW, vms, _ANEW) as servers:
                _check_menu(servers, site.number(vms))
                _menus(servers, vms, max(1, rounds // 2), found)
        with site.servers("busy", _MANY, _VMS[0], _BUSY, restless=True) as servers:
            busy = _busy(servers, site.engine, found)
            found.configuration = _configuration(servers)
    for words, ours in (("index warm", calm), ("keys fetched anew", busy)):
        found.times.append(_time(f"keystroke -> echo, {words}", ours, alternative))
        found.times.append(_time(f"longest echo, {words}", [max(ours)], [max(alternative)]))
    cost = (started[_MANY] - started[_FEW]) * 1000
    found.notes.append(f"To fetch and index {_MANY:,} keys takes ours {cost:.0f} ms of CPU.")
    return Result(
        [*found.times, *found.cpu, *found.memory],
        [*_NOTES, *found.notes],
        found.configuration,
        [engine_server.run(setting.directory / "embedded", rounds)],
    )


def _logins(setting: Setting, keys: int, rounds: int, found: _Found) -> float:
    """The first login of each, and some; CPU seconds of ours from its start to its first."""
    if keys == _MANY:
        _first_login(setting, f"{keys:,} keys", found)
    else:
        _series(setting, 1, _Times.login)
    cpu = setting.ours.cpu()
    _series(setting, _WARM_UP, _Times.login)
    times = _series(setting, rounds, _Times.login)
    found.add_times(f"login, {keys:,} keys", times, setting)
    if keys in (_FEW, _MANY):
        time.sleep(_REST)
        found.add_memory(f"{keys:,} keys", setting)
    return cpu


def _first_login(setting: Setting, what: str, found: _Found) -> None:
    times = _series(setting, 1, _Times.login)
    each = (times[side].milliseconds for side in (setting.ours, setting.alternative))
    found.times.append(_time(f"first login, {what}", *each))


def _menus(setting: Setting, vms: int, rounds: int, found: _Found) -> None:
    _series(setting, _WARM_UP, _Times.menu)
    found.add_times(f"menu, {vms:,} VMs", _series(setting, rounds, _Times.menu), setting)


def _series(setting: Setting, rounds: int, measure: _Measure) -> dict[Side, _Times]:
    times: dict[Side, _Times] = {setting.ours: _Times(), setting.alternative: _Times()}
    for number in range(rounds):
        for side in setting.order(number):
            measure(times[side], side)
    return times


def _check_menu(setting: Setting, number: int) -> None:
    """Fail unless both menus lead to the guest. Raises BenchError."""
    for side in (setting.ours, setting.alternative):
        with Client(side, "") as client:
            client.read_until(_PROMPT)
            client.press(b"%d\r" % number)
            client.read_until(side.attached)
            client.answer()
            client.leave()
        side.settle()


def _keystrokes(side: Side, guest: str) -> list[float]:
    """Milliseconds from a key to its echo, one key at a time, while others log in."""
    milliseconds = []
    with ExitStack() as stack, Client(side, guest) as client:
        client.attach()
        client.answer()
        visitor: Client | None = None
        gc.disable()
        stack.callback(gc.enable)
        end = time.monotonic() + _TYPING
        visit = 0.0
        while time.monotonic() < end:
            milliseconds.append(client.echo(_KEY) * 1000)
            if time.monotonic() >= visit and (visitor is None or visitor.has_ended()):
                if visitor is not None:
                    # Only tells whether it went well.
                    visitor.end()
                visitor = stack.enter_context(Client(side, "info", terminal=False))
                visit = time.monotonic() + _LOGINS
        client.leave()
    side.settle()
    return milliseconds


def _busy(setting: Setting, engine: Engine, found: _Found) -> list[float]:
    """The keystrokes of ours while the keys are fetched over and over. Raises BenchError."""
    _series(setting, _WARM_UP, _Times.login)
    before = engine.replies("busy", KEYS)
    milliseconds = _keystrokes(setting.ours, setting.guests[0])
    fetched = engine.replies("busy", KEYS) - before
    if fetched < 2:
        raise BenchError(f"The keys were fetched only {fetched} times while somebody typed.")
    time.sleep(_REST)
    found.add_memory(f"{_MANY:,} keys, fetched often", setting)
    held = [each for each in milliseconds if each > _PAUSE]
    peak = processes.peak(setting.ours.pid) / _MIB
    found.notes.append(
        f"In {_TYPING:g} s of typing ours fetched and indexed {_MANY:,} keys {fetched} times. Of "
        f"{len(milliseconds)} keys {len(held)} came back after more than {_PAUSE:g} ms: "
        f"{sum(held):.0f} ms in all. It then had at most {peak:.0f} MiB of memory (RSS)."
    )
    return milliseconds


def _time(name: str, ours: Sequence[float], alternative: Sequence[float]) -> Measurement:
    return _measured(name, "ms", "time", ours, alternative)


def _measured(
    name: str, unit: str, quantity: Quantity, ours: Sequence[float], alternative: Sequence[float]
) -> Measurement:
    return Measurement(name, unit, quantity, Series(ours), Series(alternative))


def _configuration(setting: Setting) -> str:
    parts = []
    for side in (setting.ours, setting.alternative):
        parts += [f"# {side.label}, with {_MANY:,} keys", "", side.configuration().rstrip(), ""]
    return "\n".join(parts)


_NOTES = (
    "Keys are ed25519 where it does not say RSA (4096 bits), one for each user; the one that logs "
    "in is in the middle. Our engine is a stand-in in a process of its own, which is not counted.",
    "Logins: the user says `info`, for which the alternative's shell has a word. Of ours, the "
    "index is warm (cache_ttl 3600 s); in the menus, the keys and the VMs are asked for in each.",
    "The alternative reads files, which somebody would have to keep up to date, and asks nobody "
    "for rights.",
    f"Keystrokes: one at a time, for {_TYPING:g} s, while somebody logs in every {_LOGINS:g} s. "
    "The alternative has nothing to fetch: its samples are the same in both.",
)

ROW = Row(
    "engine", "many keys and many VMs: logins, menus, memory, and our engine as a server", 12, run
)
