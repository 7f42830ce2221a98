"""Domains as libvirt tells them: plain functions that wait for the host.

A virDomain keeps its connection open, so none leaves this module.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from xml.etree import ElementTree

from vmconsole.errors import ConsoleGone, GuestGone, GuestMoved, GuestStopped
from vmconsole.hypervisor.libvirt_errors import NO_CONSOLE, NO_DOMAIN, NO_PTY
from vmconsole.interfaces import ConsoleInfo, Domain, DomainState, GuestNews
from vmconsole.text import printable

# virDomainState, virDomainShutoffReason and virDomainPausedReason: stable numbers.
_PAUSED, _SHUT_OFF, _CRASHED, _PM_SUSPENDED = 3, 5, 6, 7
_SAVED = (_SHUT_OFF, 5)
_MOVED = ((_PAUSED, 2), (_SHUT_OFF, 4))
# virDomainEventType and its details.
_STARTED, _SUSPENDED, _RESUMED, _STOPPED = 2, 3, 4, 5
_NOTHING = (-1, -1)
_SUSPENDED_MIGRATED = (_SUSPENDED, 1)
_PAUSES = {
    (_SUSPENDED, 0): "is paused",
    (_SUSPENDED, 2): "is paused by an I/O error on its host",
    (_SUSPENDED, 3): "is paused by its watchdog",
}
_SHUT_OFF_REASONS = {
    2: "was powered off",
    3: "crashed",
    6: "failed: see its log on the host",
}
_STATES = {
    _PAUSED: DomainState.PAUSED,
    _PM_SUSPENDED: DomainState.PAUSED,
    _SHUT_OFF: DomainState.SHUT_OFF,
    _CRASHED: DomainState.SHUT_OFF,
}
_CONSOLE_KINDS = {"unix": "a unix socket", "tcp": "a TCP socket", "udp": "a UDP socket"}


LifecycleEvent = tuple[int, int]
"""A virDomainEventType, and its detail."""


def list_domains(connection: Any) -> list[Domain]:
    """All domains of an open virConnect, sorted by name. Raises libvirtError.

    Follows virConnectListAllDomains.
    """
    found = [_described(domain) for domain in connection.listAllDomains()]
    return sorted((domain for domain in found if domain), key=lambda domain: domain.name)


def find_domain(connection: Any, vm_id: str) -> Domain | None:
    """One domain by its UUID; None: the host does not know it. Raises libvirtError."""
    domain = _lookup(connection, vm_id)
    return None if domain is None else _described(domain)


def moved(console: ConsoleInfo, last: LifecycleEvent | None) -> GuestMoved | None:
    """Whether the last event that its host told of a domain says that it moved.

    It needs no question, which the host answers only when the domain is ended there, 0.2 s later.
    """
    if _state_told(last) in _MOVED:
        return GuestMoved(f"{printable(console.vm_name)} moved to another host.")
    return None


def console_ending(
    connection: Any, console: ConsoleInfo, last: LifecycleEvent | None = None
) -> ConsoleGone | None:
    """What became of a domain whose console ended; None: it goes on running.

    ``last`` is the last event that its host told of it: a transient domain, such as oVirt's, is
    gone when it has stopped. Raises libvirtError. Follows virDomainGetState.
    """
    name, host = printable(console.vm_name), printable(console.host)
    domain = _lookup(connection, console.vm_id)
    state = None if domain is None else _state(domain)
    if last is not None and last[0] == _STARTED:
        return GuestStopped(f"{name} was stopped, and started again.")
    state = state or _state_told(last)
    if state is None:
        return GuestGone(f"{name} is gone from {host}: it was shut off, removed or moved.")
    if state in _MOVED:
        return GuestMoved(f"{name} moved to another host.")
    if state[0] == _CRASHED:
        return GuestStopped(f"{name} crashed.")
    if state == _SAVED:
        return GuestGone(f"{name} was saved to disk.")
    if state[0] == _SHUT_OFF:
        return GuestStopped(f"{name} {_SHUT_OFF_REASONS.get(state[1], 'was shut off')}.")
    return None


def after(before: LifecycleEvent | None, event: LifecycleEvent) -> LifecycleEvent:
    """The last event that counts: a start does only behind a stop. It may come when the console of
    the domain that was started is open already."""
    if event[0] == _STARTED and (before is None or before[0] != _STOPPED):
        return before or _NOTHING
    # Of a start it is told before the start itself.
    if event[0] == _RESUMED and before is not None and before[0] == _STOPPED:
        return before
    return event


def news(event: LifecycleEvent) -> GuestNews | None:
    """What an event means for whoever has the guest's console open; None: nothing."""
    if event in _PAUSES:
        return GuestNews(runs=False, text=_PAUSES[event])
    return GuestNews(runs=True) if event[0] in (_STARTED, _RESUMED) else None


def _state_told(event: LifecycleEvent | None) -> tuple[int, int] | None:
    if event is None:
        return None
    if event == _SUSPENDED_MIGRATED:
        return _MOVED[0]
    # The details of this event count as the reasons of the state do, from 1 on.
    return (_SHUT_OFF, event[1] + 1) if event[0] == _STOPPED else None


def console_problem(xml: str) -> str:
    """Why the console in a domain's XML cannot be opened; empty: it can."""
    devices = ElementTree.fromstring(xml).find("devices")
    if devices is None:
        return NO_CONSOLE
    # libvirt opens the first console, or the first serial port of a domain without.
    for device in (devices.find("console"), devices.find("serial")):
        if device is not None:
            kind = device.get("type", "pty")
            said = _CONSOLE_KINDS.get(kind, "a device")
            return (
                ""
                if kind == "pty"
                else f"its console is {said} (type='{printable(kind)}'), {NO_PTY}"
            )
    return NO_CONSOLE


def _lookup(connection: Any, vm_id: str) -> Any:
    return _unless_gone(lambda: connection.lookupByUUIDString(vm_id))


def _described(domain: Any) -> Domain | None:
    state = _state(domain)
    xml = _unless_gone(domain.XMLDesc)
    if state is None or xml is None:
        return None
    return Domain(
        id=domain.UUIDString(),
        name=domain.name(),
        state=_STATES.get(state[0], DomainState.RUNNING),
        console_problem=console_problem(xml),
    )


def _state(domain: Any) -> tuple[int, int] | None:
    found = _unless_gone(domain.state)
    return None if found is None else (found[0], found[1])


def _unless_gone(call: Callable[[], Any]) -> Any:
    """What libvirt answers; None when the domain went away meanwhile."""
    try:
        return call()
    except Exception as error:
        code = getattr(error, "get_error_code", None)
        if code is None or code() != NO_DOMAIN:
            raise
        return None
