"""Who logged in, who opened which console, and how it ended: one structured event for each.

Audit events are no diagnostics: they have a namespace of their own (``vmconsole.audit``), a fixed
set of named fields, and everything from outside in them is escaped.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from twisted.logger import Logger

from vmconsole.interfaces import ConsoleInfo, User
from vmconsole.text import printable


class Login(msgspec.Struct, frozen=True):
    """One authenticated ssh connection."""

    session: str
    """Our id of the connection, hex."""
    user: User
    fingerprint: str
    """``SHA256:...`` of the key, as ssh-keygen -l shows it."""
    address: str


class Audit:
    """Writes the events. ``logger`` may be one with an observer of its own."""

    def __init__(self, logger: Logger | None = None) -> None:
        self._log = logger or Logger("vmconsole.audit")

    def login_accepted(self, login: Login) -> None:
        """A key was verified, and its user let in."""
        self._log.info(
            "login accepted session={session} user={user} user_id={user_id} "
            "fingerprint={fingerprint} address={address}",
            event="login_accepted",
            **_identity(login),
        )

    def login_refused(
        self, session: str, address: str, name: str, fingerprints: Sequence[str], reason: str
    ) -> None:
        """A connection ended without a login, though one was tried."""
        self._log.info(
            "login refused session={session} login_name={login_name} "
            "fingerprints={fingerprints} address={address} reason={reason!r}",
            event="login_refused",
            session=session,
            address=address,
            login_name=printable(name),
            fingerprints=list(fingerprints),
            reason=reason,
        )

    def attached(self, login: Login, channel: int, console: ConsoleInfo) -> None:
        """A console was opened. ``channel`` tells the sessions of one connection apart."""
        self._log.info(
            "attached session={session} channel={channel} user={user} user_id={user_id} "
            "fingerprint={fingerprint} address={address} vm={vm_name} vm_id={vm_id} host={host}",
            event="attached",
            channel=channel,
            **_identity(login),
            **_place(console),
        )

    def attach_failed(self, login: Login, channel: int, console: ConsoleInfo, reason: str) -> None:
        """A console that the user may open could not be opened."""
        self._log.info(
            "attach failed session={session} channel={channel} user={user} user_id={user_id} "
            "fingerprint={fingerprint} address={address} vm={vm_name} vm_id={vm_id} host={host} "
            "reason={reason!r}",
            event="attach_failed",
            channel=channel,
            reason=reason,
            **_identity(login),
            **_place(console),
        )

    def detached(
        self,
        login: Login,
        channel: int,
        console: ConsoleInfo,
        *,
        bytes_in: int,
        bytes_out: int,
        seconds: float,
        reason: str,
    ) -> None:
        """A console was left, or ended. ``bytes_in`` were typed, ``bytes_out`` printed."""
        self._log.info(
            "detached session={session} channel={channel} user={user} user_id={user_id} "
            "fingerprint={fingerprint} address={address} vm={vm_name} vm_id={vm_id} host={host} "
            "bytes_in={bytes_in} bytes_out={bytes_out} seconds={seconds:.1f} reason={reason!r}",
            event="detached",
            channel=channel,
            bytes_in=bytes_in,
            bytes_out=bytes_out,
            seconds=seconds,
            reason=reason,
            **_identity(login),
            **_place(console),
        )


def _identity(login: Login) -> dict[str, str]:
    return {
        "session": login.session,
        "user": printable(login.user.name),
        "user_id": printable(login.user.id),
        "fingerprint": login.fingerprint,
        "address": login.address,
    }


def _place(console: ConsoleInfo) -> dict[str, str]:
    return {
        "vm_name": printable(console.vm_name),
        "vm_id": printable(console.vm_id),
        "host": printable(console.host),
    }
