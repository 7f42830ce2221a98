"""Who logged in, who opened which console, and how it ended: one structured event for each.

Audit events are no diagnostics: they have a namespace of their own (``vmconsole.audit``), a fixed
set of named fields, and everything from outside in them is escaped.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

import msgspec
from twisted.logger import Logger

from vmconsole.interfaces import ConsoleInfo, User
from vmconsole.text import printable

# What others choose is quoted: a name with spaces must not look like fields of its own.
_USER = (
    "user={user!r} user_id={user_id!r} fingerprint={fingerprint} certificate={certificate!r} "
    "address={address}"
)
_SESSION = f"session={{session}} channel={{channel}} {_USER}"
_PLACE = "vm={vm_name!r} vm_id={vm_id!r} host={host!r}"


class Login(msgspec.Struct, frozen=True):
    """One authenticated ssh connection."""

    session: str
    """Our id of the connection, hex."""
    user: User
    fingerprint: str
    """``SHA256:...`` of the key, as ssh-keygen -l shows it; of a certificate, the certified one."""
    address: str
    answered: float | None = None
    """When the engine said that this is the user's key (``clock.seconds()``), if it did not
    answer at the login; None: it did."""
    certificate: str = ""
    """Serial, CA and id of the certificate, already escaped; empty: it was a plain key."""


class Audit:
    """Writes the events. ``logger`` may be one with an observer of its own."""

    def __init__(self, logger: Logger | None = None) -> None:
        self._log = logger or Logger("vmconsole.audit")

    def login_accepted(self, login: Login) -> None:
        """A key was verified, and its user let in."""
        self._log.info(
            f"login accepted session={{session}} {_USER}",
            event="login_accepted",
            **_identity(login),
        )

    def login_refused(
        self, session: str, address: str, name: str, fingerprints: Sequence[str], reason: str
    ) -> None:
        """A connection ended without a login, though one was tried."""
        self._log.info(
            "login refused session={session} login_name={login_name!r} "
            "fingerprints={fingerprints} address={address} reason={reason!r}",
            event="login_refused",
            session=session,
            address=address,
            login_name=printable(name),
            fingerprints=list(fingerprints),
            reason=reason,
        )

    def revoked(self, login: Login, reason: str) -> None:
        """A login that no longer holds was ended."""
        self._log.info(
            f"revoked session={{session}} {_USER} reason={{reason!r}}",
            event="revoked",
            reason=reason,
            **_identity(login),
        )

    def unchecked(self, login: Login, since: float) -> None:
        """The engine no longer says whether an open session may go on; it last did at ``since``
        (POSIX seconds)."""
        self._log.info(
            f"unchecked session={{session}} {_USER} since={{since}}",
            event="unchecked",
            since=datetime.fromtimestamp(since, UTC).isoformat(timespec="seconds"),
            **_identity(login),
        )

    def checked(self, login: Login) -> None:
        """The engine says again that an open session may go on."""
        self._log.info(
            f"checked again session={{session}} {_USER}", event="checked", **_identity(login)
        )

    def attached(self, login: Login, channel: int, console: ConsoleInfo) -> None:
        """A console was opened. ``channel`` tells the sessions of one connection apart."""
        self._log.info(
            f"attached {_SESSION} {_PLACE}",
            event="attached",
            channel=channel,
            **_identity(login),
            **_place(console),
        )

    def interrupted(self, login: Login, channel: int, console: ConsoleInfo, reason: str) -> None:
        """An open console ended, and its user waits for it."""
        self._log.info(
            f"interrupted {_SESSION} {_PLACE} reason={{reason!r}}",
            event="interrupted",
            channel=channel,
            reason=reason,
            **_identity(login),
            **_place(console),
        )

    def resumed(self, login: Login, channel: int, console: ConsoleInfo) -> None:
        """It is open again, perhaps on another host."""
        self._log.info(
            f"resumed {_SESSION} {_PLACE}",
            event="resumed",
            channel=channel,
            **_identity(login),
            **_place(console),
        )

    def attach_failed(self, login: Login, channel: int, console: ConsoleInfo, reason: str) -> None:
        """A console that the user may open could not be opened."""
        self._log.info(
            f"attach failed {_SESSION} {_PLACE} reason={{reason!r}}",
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
            f"detached {_SESSION} {_PLACE} bytes_in={{bytes_in}} bytes_out={{bytes_out}} "
            "seconds={seconds:.1f} reason={reason!r}",
            event="detached",
            channel=channel,
            bytes_in=bytes_in,
            bytes_out=bytes_out,
            seconds=seconds,
            reason=reason,
            **_identity(login),
            **_place(console),
        )

    def changed(self, actor: str, action: str, subject: str) -> None:
        """Somebody changed what the embedded engine knows."""
        self._log.info(
            "changed actor={actor!r} action={action} subject={subject!r}",
            event="changed",
            actor=printable(actor),
            action=printable(action),
            subject=printable(subject),
        )


def _identity(login: Login) -> dict[str, str]:
    return {
        "session": login.session,
        "user": printable(login.user.name),
        "user_id": printable(login.user.id),
        "fingerprint": login.fingerprint,
        "certificate": login.certificate,
        "address": login.address,
    }


def _place(console: ConsoleInfo) -> dict[str, str]:
    return {
        "vm_name": printable(console.vm_name),
        "vm_id": printable(console.vm_id),
        "host": printable(console.host),
    }
