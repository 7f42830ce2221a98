"""The userauth service: logins with public keys, within limits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from twisted.conch.error import IgnoreAuthentication, ValidPublicKey
from twisted.conch.interfaces import IConchUser
from twisted.conch.ssh import transport, userauth
from twisted.conch.ssh.common import NS, getNS
from twisted.conch.ssh.keys import Key
from twisted.cred.credentials import SSHPrivateKey
from twisted.cred.error import UnauthorizedLogin
from twisted.internet.defer import Deferred, maybeDeferred
from twisted.logger import Logger
from twisted.python.failure import Failure

from vmconsole.errors import EngineError, EngineUnreachable
from vmconsole.publickeys import fingerprint
from vmconsole.ssh.avatar import Connection
from vmconsole.ssh.certificates import SUFFIX, UNPARSABLE, CertificateError, parse_certificate
from vmconsole.ssh.checker import AddressedKey, NotHere
from vmconsole.ssh.logs import conch_logger
from vmconsole.text import ago, printable

if TYPE_CHECKING:
    from vmconsole.ssh.transport import ConsoleTransport

MSG_USERAUTH_BANNER = 53  # RFC 4252, section 5.4; Conch does not know it
# Requests that a client may send before the first is answered (RFC 4252, section 5.1).
_MAX_WAITING = 16


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
        tries.lock.run(Deferred.fromCoroutine, self._answer(packet)).addErrback(self._broken)

    def _broken(self, failure: Failure) -> None:
        assert isinstance(failure.value, Exception)
        self.transport.broken_packet(failure.value)

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

    def tryAuth(self, kind: bytes, user: bytes, data: bytes) -> Deferred[Any]:
        """Count the request, whatever is in it, and see what it asks for."""
        return maybeDeferred(self._try, kind, user, data)

    def _try(self, kind: bytes, user: bytes, data: bytes) -> Deferred[Any]:
        # Signatures apart: agents offer many keys.
        self._count(kind == b"publickey" and data[:1] != b"\x00")
        tried: Deferred[Any] = super().tryAuth(kind, user, data)
        return tried

    def auth_publickey(self, packet: bytes) -> Deferred[Any]:
        """Section 7."""
        return Deferred.fromCoroutine(self._publickey(packet))

    async def _publickey(self, packet: bytes) -> Any:
        tries = self.transport.tries
        try:
            credentials = self._credentials(packet)
        except UNPARSABLE as error:
            tries.refusal = "the request cannot be parsed"
            raise UnauthorizedLogin(tries.refusal) from error
        if self.nextService != b"ssh-connection":
            # Else somebody would be logged in, and then refused the service.
            tries.refusal = "another service than ssh-connection was asked for"
            raise UnauthorizedLogin(tries.refusal)
        tries.note_key(_shown(credentials))
        mind = Connection(self.transport.session_id, self.transport.address)
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
            if isinstance(refusal, NotHere):
                self.tell(f"[vmconsole: {refusal}]")
            raise
        except EngineError as error:
            tries.refusal = str(error)
            tries.not_their_fault = True
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
        if not algorithm.startswith(b"sk-") or algorithm.endswith(SUFFIX):
            return message
        application = Key.fromString(blob, type="BLOB").application or b""
        return bytes(self._wrapMessageWithSKMetadata(signature, message, application))

    def _end(self, text: bytes) -> None:
        self.transport.sendDisconnect(transport.DISCONNECT_NO_MORE_AUTH_METHODS_AVAILABLE, text)


def _shown(credentials: SSHPrivateKey) -> str:
    """A key for the audit; of a certificate, the certified key, and what else tells it apart."""
    if credentials.algName.endswith(SUFFIX):
        try:
            certificate = parse_certificate(credentials.blob)
        except CertificateError:
            pass
        else:
            return f"{fingerprint(certificate.key_blob)} ({certificate})"
    return fingerprint(credentials.blob)


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
