"""BREAK and SysRq: plain functions that wait for the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar
from xml.etree import ElementTree

import msgspec

from vmconsole.errors import ConsoleUnavailable
from vmconsole.hypervisor.libvirt_errors import NO_CONSOLE, NOT_RUNNING, guest_error
from vmconsole.interfaces import ConsoleInfo
from vmconsole.text import printable

T = TypeVar("T")

_SET_BREAK = "set console.break in the proxy's configuration"
_ADD_KEYBOARD = "add <input type='keyboard' bus='usb'/> to its XML"
# The types of targets whose devices in QEMU pass BREAK on.
_PASS_BREAK = ("serial", "isa-serial", "pci-serial", "usb-serial", "system-serial")
# virKeycodeSet, a stable number, and Linux's codes of keys.
_LINUX = 0
_ALT, _SYSRQ = 56, 99
_KEYS = {
    key: code
    for first, row in ((2, "1234567890"), (16, "qwertyuiop"), (30, "asdfghjkl"), (44, "zxcvbnm"))
    for code, key in enumerate(row, first)
}
_HOLD = 100  # milliseconds


class Devices(msgspec.Struct, frozen=True):
    """What a running domain has for BREAK and SysRq."""

    alias: str
    """The console's."""
    target: str
    """What the console is for the guest: ``isa-serial``, ``virtio``..."""
    has_keyboard: bool

    @property
    def passes_break(self) -> bool:
        """Whether BREAK on the console reaches the guest."""
        return self.target in _PASS_BREAK


class _Error(msgspec.Struct, frozen=True):
    desc: str = "no reason given"


class _Reply(msgspec.Struct, frozen=True):
    error: _Error | None = None


def send_break(connection: Any, monitor: Any, console: ConsoleInfo) -> None:
    """Send BREAK to a console. ``monitor``: the module libvirt_qemu; None: not allowed.

    Raises ConsoleError. Follows QEMU's chardev-send-break.
    """
    if monitor is None:
        raise ConsoleUnavailable(f"BREAK is not allowed here: {_SET_BREAK}.")
    devices = _devices(connection, console, "BREAK")
    if not devices.passes_break:
        raise ConsoleUnavailable(
            f"The console of {printable(console.vm_name)} takes no BREAK: {_no_port(devices)}."
        )
    _break(connection, monitor, console, devices)


def send_sysrq(connection: Any, monitor: Any, console: ConsoleInfo, letter: str) -> bytes:
    """Send SysRq and ``letter``: by BREAK where that can be done, else by the keyboard.

    Returns what has to be typed on the console now. Raises ConsoleError. Follows
    virDomainSendKey.
    """
    if letter not in _KEYS:
        raise ConsoleUnavailable(
            f"SysRq takes a letter from a to z or a digit, not '{printable(letter)}'."
        )
    devices = _devices(connection, console, "SysRq")
    if monitor is not None and devices.passes_break:
        _break(connection, monitor, console, devices)
        return letter.encode()
    if not devices.has_keyboard:
        name = printable(console.vm_name)
        if devices.passes_break:
            why, cure = "BREAK is not allowed", f"{_ADD_KEYBOARD}, or {_SET_BREAK}"
        else:
            why, cure = f"its console takes no BREAK, as {_no_port(devices)}", _ADD_KEYBOARD
        raise ConsoleUnavailable(f"{name} has no keyboard, and {why}: {cure}.")
    keys = [_ALT, _SYSRQ, _KEYS[letter]]
    _call(
        connection,
        console,
        "SysRq",
        lambda domain: domain.sendKey(_LINUX, _HOLD, keys, len(keys), 0),
    )
    return b""


def guest_devices(domain: ElementTree.Element, console: str) -> Devices | None:
    """What a running domain has by its XML; ``console``: an alias, or ``default``.

    None: it has no such console.
    """
    devices = domain.find("devices")
    if devices is None:
        return None
    serials, consoles = devices.findall("serial"), devices.findall("console")
    # In libvirt's order: a console that stands for a serial port has that port's alias.
    for device in (*consoles, *serials):
        alias = _alias(device)
        if console in ("default", alias):
            port = next((serial for serial in serials if _alias(serial) == alias), device)
            target = port.find("target")
            return Devices(
                alias=alias,
                target="serial" if target is None else target.get("type", "serial"),
                has_keyboard=devices.find("input[@type='keyboard']") is not None,
            )
    return None


def _alias(device: ElementTree.Element) -> str:
    alias = device.find("alias")
    return "" if alias is None else alias.get("name", "")


def _no_port(devices: Devices) -> str:
    return f"it is no serial port (target type='{printable(devices.target)}')"


def _devices(connection: Any, console: ConsoleInfo, what: str) -> Devices:
    xml = _call(connection, console, what, lambda domain: domain.XMLDesc())
    domain = ElementTree.fromstring(xml)
    name = printable(console.vm_name)
    # The XML of a domain that is off has neither an id nor aliases.
    if domain.get("id") is None:
        raise ConsoleUnavailable(f"{name} {NOT_RUNNING}")
    devices = guest_devices(domain, console.console)
    if devices is None:
        raise ConsoleUnavailable(f"{name} {NO_CONSOLE}.")
    return devices


def _break(connection: Any, monitor: Any, console: ConsoleInfo, devices: Devices) -> None:
    command = {"execute": "chardev-send-break", "arguments": {"id": f"char{devices.alias}"}}
    text = msgspec.json.encode(command).decode()
    reply = _call(
        connection,
        console,
        "BREAK",
        lambda domain: monitor.qemuMonitorCommand(domain, text, 0),
    )
    # QEMU's errors are no libvirtErrors.
    error = msgspec.json.decode(reply, type=_Reply).error
    if error is not None:
        raise ConsoleUnavailable(
            f"BREAK cannot be sent to {printable(console.vm_name)}: QEMU says: "
            f"{printable(error.desc)}."
        )


def _call(connection: Any, console: ConsoleInfo, what: str, call: Callable[[Any], T]) -> T:
    """What ``call`` makes of the virDomain. Raises ConsoleError."""
    try:
        return call(connection.lookupByUUIDString(console.vm_id))
    except Exception as error:
        if not hasattr(error, "get_error_code"):
            raise
        problem = guest_error(error, console, what)
    # Out here it holds none of the frames in which the domain is.
    raise problem
