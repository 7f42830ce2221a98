"""Which console is meant: by id, name, an unambiguous beginning of either, or a shell pattern."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Sequence

from vmconsole.errors import EngineUnreachable, VMConsoleError
from vmconsole.interfaces import ConsoleInfo, ConsoleList
from vmconsole.text import printable

_SHOWN = 10
# More than a pattern that is typed has; how long one takes grows with its length.
_LONGEST_PATTERN = 128


class NoSuchConsole(VMConsoleError):
    """None of the user's consoles is meant."""


class AmbiguousConsole(VMConsoleError):
    """More than one could be meant; the text lists them."""


def by_id(consoles: Iterable[ConsoleInfo], vm_id: str) -> ConsoleInfo:
    """The console of the VM with exactly this id. Raises NoSuchConsole."""
    lower = vm_id.lower()
    for console in consoles:
        if console.vm_id.lower() == lower:
            return console
    raise _unknown(vm_id)


def by_name(consoles: Iterable[ConsoleInfo], name: str) -> ConsoleInfo:
    """The console of the VM of exactly this name. Raises NoSuchConsole, AmbiguousConsole."""
    return _only([console for console in consoles if console.vm_name == name], name)


def still_listed(found: ConsoleList, vm_id: str) -> ConsoleInfo | None:
    """Where a VM stands that was listed before; None: the engine lists it no more. Raises
    EngineUnreachable when it is missing from an old answer, which takes nothing away."""
    place = next((console for console in found.consoles if console.vm_id == vm_id), None)
    if place is None and found.answered is not None:
        raise EngineUnreachable("The engine does not answer.")
    return place


def by_id_or_name(consoles: Sequence[ConsoleInfo], text: str) -> ConsoleInfo:
    """The console of the VM of exactly this id, else name. Raises NoSuchConsole,
    AmbiguousConsole."""
    try:
        return by_id(consoles, text)
    except NoSuchConsole:
        return by_name(consoles, text)


def by_text(consoles: Sequence[ConsoleInfo], text: str) -> ConsoleInfo:
    """An id, else a name, else the beginning of either, else a shell pattern that either matches.

    The case counts in names, and not in ids. Raises NoSuchConsole, AmbiguousConsole.
    """
    try:
        return by_id(consoles, text)
    except NoSuchConsole:
        pass
    try:
        return by_name(consoles, text)
    except NoSuchConsole:
        pass
    lower = text.lower()
    found = [
        vm
        for vm in consoles
        if text and (vm.vm_name.startswith(text) or vm.vm_id.lower().startswith(lower))
    ]
    if not found and _is_pattern(text):
        name_matches, id_matches = _matcher(text), _matcher(lower)
        found = [vm for vm in consoles if name_matches(vm.vm_name) or id_matches(vm.vm_id.lower())]
    return _only(found, text)


def matching(consoles: Iterable[ConsoleInfo], text: str) -> list[ConsoleInfo]:
    """Those that have ``text`` in their name or id or, when it is a shell pattern, whose whole
    name or id matches it; in any case."""
    folded = text.casefold()
    if _is_pattern(folded):
        matches = _matcher(folded)
        return [
            vm for vm in consoles if matches(vm.vm_name.casefold()) or matches(vm.vm_id.casefold())
        ]
    return [
        vm for vm in consoles if folded in vm.vm_name.casefold() or folded in vm.vm_id.casefold()
    ]


def matching_names(consoles: Iterable[ConsoleInfo], patterns: Iterable[str]) -> list[ConsoleInfo]:
    """Those whose name matches one of these shell patterns; the case counts."""
    matchers = [_matcher(pattern) for pattern in patterns]
    return [vm for vm in consoles if any(matches(vm.vm_name) for matches in matchers)]


def _is_pattern(text: str) -> bool:
    return len(text) <= _LONGEST_PATTERN and any(char in text for char in "*?[")


def _matcher(pattern: str) -> Callable[[str], bool]:
    # fnmatchcase would keep 32768 patterns, whoever they came from.
    match = re.compile(fnmatch.translate(pattern)).match
    # What does not even have the longest piece without a wildcard, most by far, is out at once.
    piece = max(re.split(r"[*?]", pattern.partition("[")[0]), key=len)
    return lambda text: piece in text and match(text) is not None


def _only(found: Sequence[ConsoleInfo], text: str) -> ConsoleInfo:
    if not found:
        raise _unknown(text)
    if len(found) > 1:
        names = [f"{printable(vm.vm_name)} [{printable(vm.vm_id)}]" for vm in found[:_SHOWN]]
        if len(found) > _SHOWN:
            names.append(f"... and {len(found) - _SHOWN} more")
        raise AmbiguousConsole(
            f"{printable(text)} could be {', '.join(names)}. Say which one, by its id."
        )
    return found[0]


def _unknown(text: str) -> NoSuchConsole:
    return NoSuchConsole(
        f"{printable(text)} is none of your VMs: there is no such VM, or you have no access to "
        "its console. `list` shows yours."
    )
