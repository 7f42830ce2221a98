"""What the server owes its client, and what it may say: the replies that RFC 4252 to 4254 allow."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import suppress

from tests.fuzz.certify import NO_CERTIFICATE, Judged
from tests.fuzz.channels import Channels, Owed, Wrong, settle, take
from tests.fuzz.keyring import PROVE, Known, Malformed, Reader, proves
from tests.fuzz.logins import Request, judge

_DISCONNECT, _IGNORE, _UNIMPLEMENTED, _DEBUG = 1, 2, 3, 4
_SERVICE_REQUEST, _SERVICE_ACCEPT, _EXT_INFO, _KEXINIT, _NEWKEYS = 5, 6, 7, 20, 21
_AUTH, _AUTH_FAILURE, _AUTH_SUCCESS, _BANNER, _PK_OK = 50, 51, 52, 53, 60
_GLOBAL, _GLOBAL_SUCCESS, _GLOBAL_FAILURE = 80, 81, 82
_KEX_REPLIES = frozenset(range(30, 50))
# What a server may say before its first NEWKEYS are in use.
_HANDSHAKE = {_DISCONNECT, _IGNORE, _UNIMPLEMENTED, _DEBUG, _EXT_INFO, _KEXINIT, _NEWKEYS}
_LAST = 100
# Reasons for which a client that broke no rule may be put out (RFC 4253, section 11.1): service
# not available, by application, too many connections, no more methods.
_LAWFUL_REASONS = {7, 11, 12, 14}
_REASONS = range(1, 16)
# Each costs the server a signature.
_MOST_PROOFS = 2


class Ledger:
    """The account of one connection. ``sent`` and ``received`` are told each payload in the clear,
    ``settle`` that the server has had its turn, and owes nothing any more."""

    def __init__(
        self,
        ring: dict[str, Known],
        users: frozenset[bytes],
        sessions: int,
        certified: Callable[[bytes], Judged] = lambda blob: NO_CERTIFICATE,
    ) -> None:
        """``certified`` judges a certificate."""
        self._ring, self._users, self._certified = ring, users, certified
        self.channels = Channels(sessions)
        self.logged_in = False
        self.logins: list[Request] = []
        """Requests that may have logged in."""
        self.session = b""
        """The session id (RFC 4253, section 7.2)."""
        self.reason: int | None = None
        """The reason of the server's DISCONNECT, whose text are the ``words``."""
        self.words = ""
        self.secure = False
        """The first key exchange is over."""
        self.exchanging = False
        """A key exchange is under way."""
        self._tampered = False
        self._vague = False
        self._auth: deque[Owed] = deque()
        self._global: deque[Owed] = deque()
        self._services: deque[Owed] = deque()
        # What host keys the client asks to have proved, and how often the server did that.
        self._to_prove: list[bytes] = []
        self._proved = 0
        # Requests of the server's that the client has not answered.
        self._asked = 0
        self._authenticating = False
        # Whether it must be told, may be, and was, why a certificate does not count.
        self._must_tell = self._may_tell = self._told = False
        # Packets that need not be understood -> whether that must be said.
        self._strange: dict[int, bool] = {}
        self._before_login: dict[int, Callable[[Reader, bool], None]] = {
            _SERVICE_REQUEST: self._sent_service,
            _AUTH: self._sent_auth,
        }
        self._after_login = {_GLOBAL: self._sent_global, **self.channels.sent}

    @property
    def lawful(self) -> bool:
        """The client has kept all rules so far."""
        return self.channels.lawful and not self._tampered

    @property
    def owes_answer(self) -> bool:
        """The server has asked for something, and waits for the answer."""
        return self._asked > 0

    def tamper(self) -> None:
        """The client breaks a rule."""
        self._tampered = True

    # --- what the client sent

    def sent(self, payload: bytes, sequence: int) -> None:
        """The client sent this, which the server can decrypt, as its packet ``sequence``."""
        number = payload[0] if payload else -1
        if number in (_DISCONNECT, _IGNORE, _UNIMPLEMENTED, _DEBUG, _EXT_INFO):
            # None is answered; all but a good IGNORE may end the connection.
            if number != _IGNORE or len(payload) < 5:
                self.tamper()
            return
        if number in (_GLOBAL_SUCCESS, _GLOBAL_FAILURE) and self._asked:
            self._asked -= 1
            return
        handlers = self._after_login if self.logged_in else self._before_login
        if not self.logged_in and any(_AUTH_SUCCESS in owed.allowed for owed in self._auth):
            # Sent behind a login that may succeed: whether it counts is seen by the answers.
            handlers = {**self._after_login, **self._before_login}
            self._vague, self._strange[sequence] = True, False
            self.tamper()
        handler = handlers.get(number)
        if handler is None:
            # Before the login, those of later services are forbidden (RFC 4252, section 6).
            known = 20 <= number <= _LAST or number < 8 or (number >= 80 and not self.logged_in)
            if known:
                self.tamper()
            self._strange[sequence] = not known
            return
        if number == _AUTH and not self._authenticating and not self._services:
            self.tamper()
            self._strange[sequence] = False
            return
        try:
            handler(Reader(payload[1:]), False)
        except Malformed:
            self._sent_malformed(handler, payload)

    def _sent_malformed(self, handler: Callable[[Reader, bool], None], payload: bytes) -> None:
        self.tamper()
        # Conch takes a string that is cut for a shorter one; it may answer, and need not.
        self._vague = True
        try:
            handler(Reader(payload[1:], lenient=True), True)
        except Malformed:
            if handler == self._sent_auth:
                self._auth.append(Owed(frozenset((_AUTH_FAILURE,)), False))

    def _sent_service(self, reader: Reader, lenient: bool) -> None:
        if reader.string() != b"ssh-userauth" or self._authenticating:
            self.tamper()
        self._services.append(Owed(frozenset((_SERVICE_ACCEPT,)), False))

    def _sent_auth(self, reader: Reader, lenient: bool) -> None:
        request = judge(reader, self.session, self._ring, self._users, self._certified)
        certificate = request.certificate
        self._may_tell = self._may_tell or (certificate is not None and certificate.vouched)
        self._must_tell = self._must_tell or (request.told and not lenient)
        allowed = {_AUTH_FAILURE}
        if request.good:
            self.logins.append(request)
            # One that is good but for a length in it may be refused.
            exact = request.exact and not lenient
            allowed = {_AUTH_SUCCESS} if exact else {_AUTH_SUCCESS, _AUTH_FAILURE}
        elif request.asked:
            allowed = {_PK_OK} if request.exact and not lenient else {_PK_OK, _AUTH_FAILURE}
        self._auth.append(Owed(frozenset(allowed), not lenient))

    def _sent_global(self, reader: Reader, lenient: bool) -> None:
        name, wanted = reader.string(), reader.boolean()
        if wanted:
            allowed = {_GLOBAL_FAILURE}
            if name == PROVE:
                allowed.add(_GLOBAL_SUCCESS)
                self._to_prove.append(reader.rest)
            self._global.append(Owed(frozenset(allowed), not lenient))

    # --- what the server sent

    def received(self, number: int, payload: bytes) -> None:
        """The server sent this. Raises Wrong."""
        if self.reason is not None:
            raise Wrong("after-disconnect", f"message {number} came after DISCONNECT")
        reader = Reader(payload)
        try:
            if not self._got(number, reader):
                raise Wrong("unasked", f"message {number} has no place here")
        except Malformed:
            raise Wrong("malformed", f"message {number}: {payload.hex()}") from None

    def _got(self, number: int, reader: Reader) -> bool:
        if number == _DISCONNECT:
            self._got_disconnect(reader)
        elif not self.secure:
            return number in _HANDSHAKE or number in _KEX_REPLIES
        elif number == _UNIMPLEMENTED:
            self._got_unimplemented(reader.uint32())
        elif number == _SERVICE_ACCEPT:
            self._got_service(reader.string())
        elif number in (_AUTH_FAILURE, _AUTH_SUCCESS, _PK_OK) and not self.logged_in:
            self._got_auth(number)
        elif number == _BANNER and self._authenticating and not self.logged_in:
            self._got_banner(reader.string())
        elif number in (_GLOBAL_SUCCESS, _GLOBAL_FAILURE):
            take(self._global, number)
            if number == _GLOBAL_SUCCESS:
                self._got_proof(reader.rest)
        elif number == _GLOBAL and self.logged_in:
            reader.string()
            self._asked += reader.boolean()
        elif number in self.channels.got and self.logged_in:
            self.channels.got[number](reader)
        else:
            return number in (_IGNORE, _DEBUG, _EXT_INFO, _KEXINIT, _NEWKEYS) or (
                number in _KEX_REPLIES and self.exchanging
            )
        return True

    def _got_proof(self, answer: bytes) -> None:
        self._proved += 1
        if self._proved > _MOST_PROOFS:
            raise Wrong("proof", f"the host keys are proved {self._proved} times")
        for asked in self._to_prove:
            with suppress(Malformed):
                if proves(answer, asked, self.session):
                    return
        raise Wrong("proof", "it is not about the keys that were named, or not for this session")

    def _got_disconnect(self, reader: Reader) -> None:
        reason, text, _ = reader.uint32(), reader.string(), reader.string()
        self.reason, self.words = reason, text.decode("latin-1")
        if reason not in _REASONS:
            raise Wrong("disconnect", f"reason {reason}, {text!r}")
        if self.lawful and reason not in _LAWFUL_REASONS:
            raise Wrong("disconnect", f"for no fault of the client: reason {reason}, {text!r}")

    def _got_unimplemented(self, sequence: int) -> None:
        if not self._strange:
            raise Wrong("unimplemented", f"packet {sequence}, though that is implemented")
        if sequence not in self._strange:
            raise Wrong("sequence", f"packet {sequence}, and it was one of {list(self._strange)}")
        del self._strange[sequence]

    def _got_service(self, name: bytes) -> None:
        take(self._services, _SERVICE_ACCEPT)
        if self.logged_in or name != b"ssh-userauth":
            raise Wrong("service", f"{name!r} was accepted")
        self._authenticating = True

    def _got_banner(self, text: bytes) -> None:
        self._told = self._told or (text[:1] == b"[" and b"log in as" not in text)
        # A security key's certificate is refused for what it is, whoever has issued it.
        if b"certificate" in text and b"sk-" not in text and not self._may_tell:
            raise Wrong("told", f"of a certificate of nobody's: {text!r}")

    def _got_auth(self, number: int) -> None:
        if number == _AUTH_SUCCESS and not any(number in owed.allowed for owed in self._auth):
            raise Wrong("login", "USERAUTH_SUCCESS, and nobody who may log in has signed")
        take(self._auth, number)
        if number == _AUTH_SUCCESS:
            self.logged_in = True
            terminals = (
                each.certificate is None or each.certificate.terminal for each in self.logins
            )
            self.channels.terminals = any(terminals)
            # What was sent behind a request that succeeds is void (RFC 4252, section 5.1).
            self._auth.clear()

    def settle(self) -> None:
        """The server has had its turn. Raises Wrong when it owes a reply."""
        vague, self._vague = self._vague, False
        if self.reason is None:
            settle(self._auth, vague, "USERAUTH_REQUEST")
            settle(self._global, vague, "GLOBAL_REQUEST")
            self.channels.settle(vague)
            if self._must_tell and not (self._told or self.logged_in or vague):
                raise Wrong("told", "nothing, of a trusted CA's certificate that is refused")
            if any(self._strange.values()):
                raise Wrong("unanswered", f"UNIMPLEMENTED of packets {list(self._strange)}")
        self._strange.clear()
        self._services.clear()
        self._to_prove.clear()
        self._must_tell = self._may_tell = False
        if not self.logged_in:
            self.logins.clear()
