"""Which console is meant: by id, by name, or by an unambiguous beginning of either."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vmconsole.errors import VMConsoleError
from vmconsole.interfaces import ConsoleInfo
from vmconsole.text import printable

_SHOWN = 10


class NoSuchConsole(VMConsoleError):
    """None of the user's consoles is meant."""


class AmbiguousConsole(VMConsoleError):
    """More than one could be meant; the text lists them."""


def by_id(consoles: Iterable[ConsoleInfo], vm_id: str) -> ConsoleInfo:
    """The console of the VM with exactly this id. Raises NoSuchConsole."""
    for console in consoles:
        if console.vm_id.lower() == vm_id.lower():
            return console
    raise _unknown(vm_id)


def by_name(consoles: Iterable[ConsoleInfo], name: str) -> ConsoleInfo:
    """The console of the VM of exactly this name. Raises NoSuchConsole, AmbiguousConsole."""
    return _only([console for console in consoles if console.vm_name == name], name)


def by_text(consoles: Sequence[ConsoleInfo], text: str) -> ConsoleInfo:
    """An id, else a name, else the beginning of either. Raises NoSuchConsole, AmbiguousConsole."""
    try:
        return by_id(consoles, text)
    except NoSuchConsole:
        pass
    try:
        return by_name(consoles, text)
    except NoSuchConsole:
        beginning = [
            vm
            for vm in consoles
            if text and (vm.vm_name.startswith(text) or vm.vm_id.lower().startswith(text.lower()))
        ]
        return _only(beginning, text)


def _only(found: Sequence[ConsoleInfo], text: str) -> ConsoleInfo:
    if not found:
        raise _unknown(text)
    if len(found) > 1:
        names = [f"{printable(vm.vm_name)} [{printable(vm.vm_id)}]" for vm in found[:_SHOWN]]
        if len(found) > _SHOWN:
            names.append("...")
        raise AmbiguousConsole(
            f"{printable(text)} could be {', '.join(names)}. Say which one, by its id."
        )
    return found[0]


def _unknown(text: str) -> NoSuchConsole:
    return NoSuchConsole(
        f"{printable(text)} is none of your VMs: there is no such VM, or you have no access to "
        "its console. `list` shows yours."
    )
