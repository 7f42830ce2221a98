"""The realm, and its avatars: what somebody who is logged in may do."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import msgspec
from twisted.conch.avatar import ConchUser
from twisted.conch.interfaces import IConchUser
from twisted.cred.portal import IRealm
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from zope.interface import Interface, implementer

from vmconsole.audit import Audit, Login
from vmconsole.interfaces import IPermissions, IWatch, KeyOwner
from vmconsole.publickeys import fingerprint
from vmconsole.ssh.commands import Commands
from vmconsole.ssh.session import SessionChannel


class Connection(msgspec.Struct, frozen=True):
    """The cred *mind*: the connection on which somebody logs in."""

    session: str
    address: str
    blob: bytes


class ConsoleAvatar(ConchUser):
    """A user who is logged in: has session channels, and nothing else."""

    watch: IWatch
    """The look at whether the login still holds."""

    def __init__(
        self, login: Login, commands: Commands, clock: IReactorTime, max_sessions: int
    ) -> None:
        super().__init__()
        self.login = login
        self.max_sessions = max_sessions
        self.revoked = ""
        """Why it does not."""
        self.channelLookup[b"session"] = partial(SessionChannel, clock=clock)
        self._commands = commands

    def run(self, channel: SessionChannel, line: bytes) -> Deferred[int]:
        """Carry out a command line on ``channel``; fires with the exit status."""
        return Deferred.fromCoroutine(self._commands.run(channel, self.login, self.watch, line))

    def revoke(self, reason: str) -> None:
        """End all that the user does here, and the connection."""
        self.revoked = reason
        self.conn.end_all(reason)


@implementer(IRealm)
class ConsoleRealm:
    """Makes avatars of the engine's users, and has them looked at while they are here."""

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

    def requestAvatar(  # type: ignore[override]
        self, avatarId: KeyOwner, mind: Connection, *interfaces: type[Interface]
    ) -> tuple[type[Interface], ConsoleAvatar, Callable[[], None]]:
        """See IRealm; the mind is the Connection."""
        if IConchUser not in interfaces:
            raise NotImplementedError("a console user is an IConchUser, nothing else")
        login = Login(
            session=mind.session,
            user=avatarId.user,
            fingerprint=fingerprint(mind.blob),
            address=mind.address,
            answered=avatarId.answered,
        )
        avatar = ConsoleAvatar(login, self._commands, self._clock, self._max_sessions)

        def revoked(reason: str) -> None:
            self._audit.revoked(login, reason)
            avatar.revoke(reason)

        def unchecked(since: float | None) -> None:
            if since is None:
                self._audit.checked(login)
            else:
                self._audit.unchecked(login, since)

        avatar.watch = self._permissions.watch(
            mind.blob, mind.address, avatarId, revoked, unchecked
        )
        return IConchUser, avatar, avatar.watch.stop
