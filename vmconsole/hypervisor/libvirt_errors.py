"""What libvirt says, in words for a user: pure functions from its error to one of ours.

Many situations share a code, so the text decides; the texts are those of libvirt 9 and later.
"""

from __future__ import annotations

from typing import Any

from vmconsole.errors import (
    ConsoleBusy,
    ConsoleElsewhere,
    ConsoleError,
    ConsoleUnavailable,
    HostUnreachable,
)
from vmconsole.interfaces import ConsoleInfo
from vmconsole.text import printable

# virErrorNumber: stable numbers, so that no libvirt module is needed here.
NO_SUPPORT = 3
INVALID_ARG = 8
OPERATION_FAILED = 9
NO_DOMAIN = 42
AUTH_FAILED = 45
OPERATION_INVALID = 55
AUTH_CANCELLED = 79
AUTH_UNAVAILABLE = 80
# virErrorDomain: the connection itself.
FROM_RPC = 7

NO_CONSOLE = "has no console device: add <console type='pty'/> to its XML"
NOT_RUNNING = "is shut off. Start it, then connect again."
NO_PTY = "not a pty, which libvirt cannot open: use <console type='pty'/>"

_TLS_OURS = (
    "Cannot read CA certificate",
    "Cannot read client certificate",
    "Our own certificate",
    "client certificate",
    "Unable to set x509",
    "Unable to import",
)


class ConsoleLocked(ConsoleBusy):
    """A libvirtd that was restarted has not yet found out that nobody has the console."""


def message(error: Any) -> str:
    """The libvirtError's own text, safe to show, without a full stop."""
    return printable(str(error.get_error_message() or error)).rstrip(".")


def host_unreachable(error: Any, host: str, pki: str) -> HostUnreachable:
    """Why ``virConnectOpen`` failed, or an open connection: ``pki`` names the folder with ours."""
    said, code = message(error), error.get_error_code()
    host, pki = printable(host), printable(pki) or "/etc/pki"
    if any(words in said for words in _TLS_OURS):
        text = (
            f"The TLS certificate for {host} is no good: {said}. Look at cacert.pem, "
            f"clientcert.pem and clientkey.pem in {pki}."
        )
    elif "Failed to verify peer's certificate" in said:
        text = (
            f"The TLS certificate of {host} cannot be verified: it is not signed by the CA in "
            f"{pki}, has expired, or is for another name."
        )
    elif "TLS confirmation" in said:
        text = (
            f"{host} rejected our TLS certificate: is the one in {pki} signed by the CA that "
            "its libvirtd trusts, and in its tls_allowed_dn_list?"
        )
    elif "TLS handshake" in said:
        text = f"No TLS connection to {host}: {said}. Is it a libvirtd that listens there?"
    elif code in (AUTH_FAILED, AUTH_CANCELLED, AUTH_UNAVAILABLE):
        text = f"The libvirtd of {host} refused our login: {said}."
    elif "resolve address" in said:
        text = f"The name {host} does not resolve: {said}. Check its URI, or the DNS."
    elif "unable to connect" in said or "connect socket" in said:
        text = (
            f"Cannot connect to {host}: {said}. Is its libvirtd running, and does the firewall "
            "let us through?"
        )
    else:
        text = f"The libvirtd of {host} cannot be used: {said}."
    return HostUnreachable(text)


def connection_lost(host: str) -> str:
    """The text for an open connection that ended."""
    return (
        f"The connection to {printable(host)} was lost: its libvirtd stopped, or the host does "
        "not answer."
    )


def console_error(error: Any, host: str, name: str, vm_id: str) -> ConsoleError:
    """Why a lookup of the domain or ``virDomainOpenConsole`` failed."""
    said, code = message(error), error.get_error_code()
    host, name = printable(host), printable(name)
    if code == OPERATION_FAILED and "Active console session" in said:
        return ConsoleBusy(
            f"The console of {name} is in use by another program on {host} (virsh console, "
            "perhaps); ask its user to leave, then try again."
        )
    if code == OPERATION_FAILED and "locked by lock file" in said:
        return ConsoleLocked(
            f"The console of {name} is locked by another program on {host}; ask its user to "
            "leave, then try again."
        )
    if code == OPERATION_INVALID:
        return ConsoleUnavailable(f"{name} {NOT_RUNNING}")
    if code in (NO_DOMAIN, INVALID_ARG):
        return _unknown(host, name, vm_id)
    if "cannot find character device" in said:
        return ConsoleUnavailable(f"{name} {NO_CONSOLE}.")
    if "not using a PTY" in said:
        return ConsoleUnavailable(f"The console of {name} is {NO_PTY} in its XML.")
    if is_connection_lost(error):
        return HostUnreachable(f"The connection to {host} was lost: {said}.")
    if code == NO_SUPPORT:
        return ConsoleUnavailable(
            f"The hypervisor of {host} has no consoles that can be opened: {said}."
        )
    return ConsoleUnavailable(f"The console of {name} on {host} cannot be opened: {said}.")


def guest_error(error: Any, console: ConsoleInfo, what: str) -> ConsoleError:
    """Why ``what`` could not be sent to a guest."""
    said, code = message(error), error.get_error_code()
    host, name = printable(console.host), printable(console.vm_name)
    if code == OPERATION_INVALID:
        return ConsoleUnavailable(f"{name} {NOT_RUNNING}")
    if code == NO_DOMAIN:
        return _unknown(host, name, console.vm_id)
    if is_connection_lost(error):
        return HostUnreachable(f"The connection to {host} was lost: {said}.")
    return ConsoleUnavailable(f"{what} cannot be sent to {name}: {said}.")


def is_connection_lost(error: Any) -> bool:
    """Whether the connection ended under the call."""
    return bool(error.get_error_domain() == FROM_RPC)


def left_behind(host: str, name: str) -> ConsoleBusy:
    """We left a console, and the host has not noticed: its guest holds up that connection."""
    return ConsoleBusy(
        f"{printable(host)} still clears up the last session on the console of "
        f"{printable(name)}, which takes no input; try again in half a minute."
    )


def _unknown(host: str, name: str, vm_id: str) -> ConsoleElsewhere:
    return ConsoleElsewhere(
        f"{host} does not know {name} [{printable(vm_id)}] any more; it may have moved: try again."
    )
