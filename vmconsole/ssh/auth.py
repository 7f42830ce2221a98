"""Public-key logins: the userauth service, the credentials checker, the realm and its avatar."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec
from twisted.conch.avatar import ConchUser
from twisted.conch.error import IgnoreAuthentication, ValidPublicKey
from twisted.conch.interfaces import IConchUser
from twisted.conch.ssh import transport, userauth
from twisted.conch.ssh.common import NS, getNS
from twisted.conch.ssh.keys import BadKeyError, Key
from twisted.cred.checkers import ICredentialsChecker
from twisted.cred.credentials import ISSHPrivateKey, SSHPrivateKey
from twisted.cred.error import UnauthorizedLogin
from twisted.cred.portal import IRealm
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from zope.interface import Interface, implementer

from vmconsole.audit import Audit, Login
from vmconsole.errors import EngineError, EngineUnreachable, KeyRefused
from vmconsole.interfaces import IPermissions, IWatch, KeyOwner
from vmconsole.publickeys import KEY_TYPES, RSA_BITS, fingerprint
from vmconsole.ssh.commands import Commands
from vmconsole.ssh.logs import conch_logger
from vmconsole.ssh.session import SessionChannel
from vmconsole.text import ago, printable, printable_bytes

if TYPE_CHECKING:
    from vmconsole.ssh.transport import ConsoleTransport

MSG_USERAUTH_BANNER = 53  # RFC 4252, section 5.4; Conch does not know it
# Flags in a security key's signature (OpenSSH's PROTOCOL.u2f).
_USER_PRESENT = 0x01
_USER_VERIFIED = 0x04
_UNPARSABLE = (BadKeyError, ValueError, LookupError, struct.error)
# Requests that a client may send before the first is answered (RFC 4252, section 5.1).
_MAX_WAITING = 16

# Signature algorithm -> the type of key that makes such signatures: never RSA with SHA-1.
USER_KEY_ALGORITHMS = {
    **{kind.encode(): kind.encode() for kind in sorted(KEY_TYPES - {"ssh-rsa"})},
    b"rsa-sha2-512": b"ssh-rsa",
    b"rsa-sha2-256": b"ssh-rsa",
}


class Connection(msgspec.Struct, frozen=True):
    """The cred *mind*: the connection on which somebody logs in."""

    session: str
    address: str
    blob: bytes


class AddressedKey(SSHPrivateKey):
    """A key, and where it comes from: the engine may let it in from some addresses only."""

    def __init__(self, credentials: SSHPrivateKey, address: str) -> None:
        super().__init__(
            credentials.username,
            credentials.algName,
            credentials.blob,
            credentials.sigData,
            credentials.signature,
        )
        self.address = address


class _NotHere(UnauthorizedLogin):
    """The options of a known key do not let it in; the text may be shown."""


@implementer(ICredentialsChecker)
class EngineKeyChecker:
    """Knows a key when the engine does, and says so truthfully when it is only asked about.

    Names outside ``users``, unknown keys, and keys that may not be used here fail with
    UnauthorizedLogin, a known key without a signature with ValidPublicKey (RFC 4252, section 7),
    no answer from the engine with EngineError. The avatar id is the KeyOwner.
    """

    credentialInterfaces = (ISSHPrivateKey,)

    def __init__(self, permissions: IPermissions, users: Sequence[str]) -> None:
        self._permissions = permissions
        self._users = frozenset(name.encode() for name in users)

    # cred's avatar ids are bytes; the KeyOwner saves the realm from asking again.
    def requestAvatarId(  # type: ignore[override]
        self, credentials: AddressedKey
    ) -> Deferred[KeyOwner]:
        """See ICredentialsChecker."""
        return Deferred.fromCoroutine(self._check(credentials))

    async def _check(self, credentials: AddressedKey) -> KeyOwner:
        if credentials.username not in self._users:
            raise UnauthorizedLogin("no such user name here")
        key = _acceptable_key(credentials.algName, credentials.blob)
        try:
            owner = await self._permissions.owner(credentials.blob, credentials.address)
        except KeyRefused as error:
            raise _NotHere(str(error)) from error
        if owner is None:
            raise UnauthorizedLogin("the engine knows no user with this key")
        if credentials.signature is None:
            raise ValidPublicKey
        _verify(key, credentials, owner.verify_required)
        return owner


def _acceptable_key(algorithm: bytes, blob: bytes) -> Key:
    # Conch trusts the algorithm that the client names, and has no floor for a key's size.
    key_type = USER_KEY_ALGORITHMS.get(algorithm)
    if key_type is None:
        raise UnauthorizedLogin(f"algorithm {printable_bytes(algorithm)} is not accepted")
    try:
        key: Key = Key.fromString(blob, type="BLOB")
    except _UNPARSABLE as error:
        raise UnauthorizedLogin("the key cannot be parsed") from error
    if key.sshType() != key_type:
        raise UnauthorizedLogin("the key is not of the type that its algorithm names")
    if key_type == b"ssh-rsa" and key.size() not in RSA_BITS:
        raise UnauthorizedLogin(f"RSA keys have {RSA_BITS[0]} to {RSA_BITS[-1]} bits here")
    return key


def _verify(key: Key, credentials: SSHPrivateKey, verify_required: bool) -> None:
    signature = credentials.signature
    try:
        named, _, rest = getNS(signature, 2)
    except struct.error as error:
        raise UnauthorizedLogin("the signature cannot be parsed") from error
    if named != credentials.algName:
        raise UnauthorizedLogin("the signature is not of the algorithm that was named")
    if key.isSecurityKey() and not (rest and rest[0] & _USER_PRESENT):
        raise UnauthorizedLogin("nobody touched the security key")
    if verify_required and not (rest and rest[0] & _USER_VERIFIED):
        raise UnauthorizedLogin("the security key did not verify its user (verify-required)")
    try:
        good = key.verify(signature, credentials.sigData)
    except Exception as error:  # cryptography has several for bytes that are no signature
        raise UnauthorizedLogin("the signature cannot be parsed") from error
    if not good:
        raise UnauthorizedLogin("the signature is wrong")


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


class UserAuth(userauth.SSHUserAuthServer):
    """RFC 4252 with the publickey method alone, one request at a time, within limits."""

    transport: ConsoleTransport
    # Ours count, for each connection: Conch's would start anew with each SERVICE_REQUEST.
    attemptsBeforeDisconnect = 1000
    _log = conch_logger("vmconsole.ssh.conch")
    log = Logger()

    def serviceStarted(self) -> None:
        """Conch's timer of ten hours is not wanted: the grace period runs in the transport."""
        self.clock = self.transport.factory.clock
        super().serviceStarted()
        # Only cancels that timer.
        super().serviceStopped()
        if self.transport.factory.banner:
            self.tell(self.transport.factory.banner)

    def serviceStopped(self) -> None:
        """No timer is left to stop."""

    def tell(self, text: str) -> None:
        """Show a text before the login (USERAUTH_BANNER, RFC 4252, section 5.4), once."""
        tries = self.transport.tries
        if text not in tries.told:
            tries.told.add(text)
            shown = text.rstrip("\n").replace("\n", "\r\n") + "\r\n"
            self.transport.sendPacket(MSG_USERAUTH_BANNER, NS(shown.encode()) + NS(b""))

    def ssh_USERAUTH_REQUEST(self, packet: bytes) -> None:
        """Requests are answered one after the other, whatever the client pipelines."""
        tries = self.transport.tries
        tries.waiting += 1
        if tries.waiting > _MAX_WAITING:
            self._end(b"too many requests at once")
            return
        tries.lock.run(Deferred.fromCoroutine, self._answer(packet)).addErrback(
            self.transport.broken_packet
        )

    async def _answer(self, packet: bytes) -> None:
        self.transport.tries.waiting -= 1
        # After a success, or a disconnect, what was pipelined behind it is void.
        if self.transport.service is not self or self.transport.ending:
            return
        name = getNS(packet)[0]
        self.transport.tries.name = name.decode("utf-8", "backslashreplace")
        if name not in self.transport.factory.user_names:
            self.tell(_wrong_name(self.transport.factory.user_names))
        answered = super().ssh_USERAUTH_REQUEST(packet)
        if answered is not None:
            await answered

    def auth_publickey(self, packet: bytes) -> Deferred[Any]:
        """Section 7. Queries and signatures are counted apart: agents offer many keys."""
        return Deferred.fromCoroutine(self._publickey(packet))

    async def _publickey(self, packet: bytes) -> Any:
        tries = self.transport.tries
        try:
            credentials = self._credentials(packet)
        except _UNPARSABLE as error:
            tries.refusal = "the request cannot be parsed"
            raise UnauthorizedLogin(tries.refusal) from error
        if self.nextService != b"ssh-connection":
            # Else somebody would be logged in, and then refused the service.
            tries.refusal = "another service than ssh-connection was asked for"
            raise UnauthorizedLogin(tries.refusal)
        tries.note_key(fingerprint(credentials.blob))
        self._count(credentials.signature is not None)
        mind = Connection(self.transport.session_id, self.transport.address, credentials.blob)
        try:
            result = await self.portal.login(
                AddressedKey(credentials, mind.address), mind, IConchUser
            )
        except ValidPublicKey:
            algorithm_and_blob = NS(credentials.algName) + NS(credentials.blob)
            self.transport.sendPacket(userauth.MSG_USERAUTH_PK_OK, algorithm_and_blob)
            tries.refusal = "a known key was offered, and not used"
            raise IgnoreAuthentication from None
        except UnauthorizedLogin as refusal:
            tries.refusal = str(refusal)
            if isinstance(refusal, _NotHere):
                self.tell(f"[vmconsole: {refusal}]")
            raise
        except EngineError as error:
            tries.refusal = str(error)
            self.log.warn(
                "session {session}: no login without the engine: {error}",
                session=self.transport.session_id,
                error=error,
            )
            self.tell(_no_engine(error))
            raise UnauthorizedLogin("the engine could not be asked") from None
        _, avatar, logout = result
        if self.transport.ending:
            # The client went while the engine was asked; nobody else will log its user out.
            logout()
            raise IgnoreAuthentication
        if avatar.login.answered is not None:
            self.log.warn(
                "session {session}: the engine does not answer; {user} is let in by its answer "
                "from {age}",
                session=self.transport.session_id,
                user=printable(avatar.login.user.name),
                age=ago(self.clock.seconds() - avatar.login.answered),
            )
        self.transport.logged_in(avatar.login)
        return result

    def _credentials(self, packet: bytes) -> SSHPrivateKey:
        algorithm, blob, rest = getNS(packet[1:], 2)
        if packet[:1] == b"\x00":
            return SSHPrivateKey(self.user, algorithm, blob, None, None)
        signature = getNS(rest)[0]
        signed = self._signed(algorithm, blob, signature)
        return SSHPrivateKey(self.user, algorithm, blob, signed, signature)

    def _count(self, has_signature: bool) -> None:
        tries, limits = self.transport.tries, self.transport.factory.limits
        if has_signature:
            tries.signatures += 1
        else:
            tries.queries += 1
        if tries.signatures > limits.auth_tries or tries.queries > limits.auth_queries:
            tries.refusal = tries.refusal or "too many tries"
            self._end(b"too many authentication failures")
            raise IgnoreAuthentication

    def _signed(self, algorithm: bytes, blob: bytes, signature: bytes) -> bytes:
        # What the client signed: RFC 4252, section 7; for security keys OpenSSH's PROTOCOL.u2f.
        message = (
            NS(self.transport.sessionID or b"")
            + bytes((userauth.MSG_USERAUTH_REQUEST,))
            + NS(self.user or b"")
            + NS(self.nextService or b"")
            + NS(b"publickey")
            + b"\x01"
            + NS(algorithm)
            + NS(blob)
        )
        if not algorithm.startswith(b"sk-"):
            return message
        application = b"ssh:"
        if not blob.endswith(NS(application)):
            raise ValueError("the security key is not one for ssh")
        return bytes(self._wrapMessageWithSKMetadata(signature, message, application))

    def _end(self, text: bytes) -> None:
        self.transport.sendDisconnect(transport.DISCONNECT_NO_MORE_AUTH_METHODS_AVAILABLE, text)


def _wrong_name(names: Sequence[bytes]) -> str:
    known = " or ".join(printable(name.decode()) for name in names)
    return f"[vmconsole: log in as {known}.]"


def _no_engine(error: EngineError) -> str:
    if isinstance(error, EngineUnreachable):
        return (
            "[vmconsole: the engine, which knows your key, does not answer. It is not your key's "
            "fault: try again later.]"
        )
    return (
        "[vmconsole: the engine, which knows your key, gave no usable answer. It is not your "
        "key's fault: tell who runs this proxy.]"
    )
