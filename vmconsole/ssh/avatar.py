"""The realm, and its avatars: what somebody who is logged in may do."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import msgspec
from twisted.conch.avatar import ConchUser
from twisted.conch.interfaces import IConchUser
from twisted.cred.portal import IRealm
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger
from zope.interface import Interface, implementer

from vmconsole.audit import Audit, Login
from vmconsole.clocks import posix_now, posix_of
from vmconsole.interfaces import IPermissions, IWatch
from vmconsole.publickeys import fingerprint
from vmconsole.ssh.certificates import Certificate
from vmconsole.ssh.checker import Proof
from vmconsole.ssh.commands import Commands
from vmconsole.ssh.session import SessionChannel

# Seconds after which a certificate's end is looked at again: meanwhile the clock may be set.
_EXPIRY_LOOK = 60.0


class Connection(msgspec.Struct, frozen=True):
    """The cred *mind*: the connection on which somebody logs in."""

    session: str
    address: str


class ConsoleAvatar(ConchUser):
    """A user who is logged in: has session channels, and nothing else."""

    watch: IWatch
    """The look at whether the login still holds."""
    expiry: IDelayedCall | None = None
    """The next look at whether its certificate does."""

    def __init__(
        self,
        login: Login,
        proof: Proof,
        commands: Commands,
        clock: IReactorTime,
        max_sessions: int,
    ) -> None:
        super().__init__()
        self.login = login
        self.proof = proof
        self.max_sessions = max_sessions
        self.revoked = ""
        """Why it does not."""
        self.channelLookup[b"session"] = partial(SessionChannel, clock=clock)
        self._commands = commands

    @property
    def permits_pty(self) -> bool:
        """Whether the user may have a terminal: a certificate has to say so."""
        return self.proof.certificate is None or self.proof.certificate.permits_pty

    def run(self, channel: SessionChannel, line: bytes) -> Deferred[int]:
        """Carry out a command line on ``channel``; fires with the exit status.

        A certificate with ``force-command`` has its own in the line's place.
        """
        if self.proof.certificate is not None:
            forced = self.proof.certificate.force_command
            line = line if forced is None else forced
        return Deferred.fromCoroutine(self._commands.run(channel, self.login, self.watch, line))

    def revoke(self, reason: str) -> None:
        """End all that the user does here, and the connection."""
        self.revoked = reason
        self.conn.end_all(reason)


@implementer(IRealm)
class ConsoleRealm:
    """Makes avatars of the engine's users, and has them looked at while they are here.

    A login by a certificate ends with that.
    """

    _log = Logger()

    def __init__(
        self,
        permissions: IPermissions,
        commands: Commands,
        audit: Audit,
        clock: IReactorTime,
        max_sessions: int,
    ) -> None:
        self._permissions = permissions
        self._commands = commands
        self._audit = audit
        self._clock = clock
        self._max_sessions = max_sessions
        # By when their users logged in.
        self._avatars: dict[ConsoleAvatar, None] = {}

    def end_refused(self, refusal: Callable[[bytes, Certificate | None], str]) -> None:
        """End each login whose key or certificate is refused now, with the reason."""
        for avatar in list(self._avatars):
            reason = refusal(avatar.proof.blob, avatar.proof.certificate)
            if reason:
                with self._log.failuresHandled("Ending a login that is revoked"):
                    avatar.watch.revoke(reason)

    def requestAvatar(  # type: ignore[override]
        self, avatarId: Proof, mind: Connection, *interfaces: type[Interface]
    ) -> tuple[type[Interface], ConsoleAvatar, Callable[[], None]]:
        """See IRealm; the mind is the Connection."""
        if IConchUser not in interfaces:
            raise NotImplementedError("a console user is an IConchUser, nothing else")
        owner, certificate = avatarId.owner, avatarId.certificate
        login = Login(
            session=mind.session,
            user=owner.user,
            fingerprint=fingerprint(avatarId.blob),
            address=mind.address,
            answered=owner.answered,
            certificate="" if certificate is None else str(certificate),
        )
        avatar = ConsoleAvatar(login, avatarId, self._commands, self._clock, self._max_sessions)
        self._avatars[avatar] = None
        if certificate is not None and certificate.expires is not None:
            self._look_later(avatar, certificate.expires)

        def revoked(reason: str) -> None:
            if not avatar.revoked:
                self._audit.revoked(login, reason)
                avatar.revoke(reason)

        def unchecked(since: float | None) -> None:
            if since is None:
                self._audit.checked(login)
            else:
                self._audit.unchecked(login, posix_of(self._clock, since))

        avatar.watch = self._permissions.watch(
            avatarId.blob if certificate is None else None,
            mind.address,
            owner,
            revoked,
            unchecked,
        )

        def logout() -> None:
            self._avatars.pop(avatar, None)
            if avatar.expiry is not None and avatar.expiry.active():
                avatar.expiry.cancel()
            avatar.watch.stop()

        return IConchUser, avatar, logout

    def _look_later(self, avatar: ConsoleAvatar, expires: float) -> None:
        left = max(0.0, expires - posix_now(self._clock))
        avatar.expiry = self._clock.callLater(
            min(left, _EXPIRY_LOOK), self._look_at_expiry, avatar, expires
        )

    def _look_at_expiry(self, avatar: ConsoleAvatar, expires: float) -> None:
        if posix_now(self._clock) < expires:
            self._look_later(avatar, expires)
        else:
            avatar.watch.revoke("Your certificate has expired.")
