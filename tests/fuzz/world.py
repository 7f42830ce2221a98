"""The server that is fuzzed, with doubles behind its seams; it outlives its connections."""

from __future__ import annotations

import gc
import os
import sys
import types
import weakref
from base64 import b64encode
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall
from twisted.logger import LogLevel, globalLogBeginner, globalLogPublisher
from zope.interface.interface import InterfaceClass

from tests.fakes import console
from tests.fuzz.authority import REVOKED_ID, REVOKED_SERIALS, TRUSTED, authorities, public_line
from tests.fuzz.certify import Judged, Truth, judge_certificate
from tests.fuzz.keyring import Known, make_ring
from tests.fuzz.peer import ServerEnd
from tests.fuzz.sealed import SUITES
from tests.sshpair import ALICE, SSHPair
from vmconsole.config import SSH, Config, Limits
from vmconsole.config import Console as ConsoleSettings
from vmconsole.interfaces import AuthorizedKey, User
from vmconsole.keyoptions import KeyOptions
from vmconsole.refusals import SummedRefusals
from vmconsole.ssh.admission import Admission
from vmconsole.ssh.hostkeys import load_host_certificates
from vmconsole.ssh.proxy_protocol import BehindBalancer
from vmconsole.ssh.revocation import parse_revocation_list
from vmconsole.ssh.session_counts import SessionCounts
from vmconsole.ssh.trust import load_user_authorities

# All that a client of the harness may speak.
_NAMES = [suite.split() for suite in SUITES]
CIPHERS = dict.fromkeys(cipher for cipher, _ in _NAMES)
MACS = dict.fromkeys(mac for _, mac in _NAMES)
USERS: dict[str, str | None] = {
    ALICE.name: ALICE.id,
    "bob@internal": "u-bob",
    "carol@internal": "u-carol@internal",
    "twin": None,
}
"""Whom the engine knows, by their names; two are called twin."""
_KEYLESS = ("carol@internal", "twin1", "twin2")
# So that a certificate may have ended long ago.
_EPOCH = 1.7e9
# Shared by all objects, or none of the server's.
_NOT_OURS = (type, types.ModuleType, types.FunctionType, types.CodeType, InterfaceClass)


class Accepted(NamedTuple):
    """A connection at the server's end."""

    server: Any
    """The ConsoleTransport."""
    receiver: Any
    """What gets the bytes: that, or what reads a PROXY header before it."""
    end: ServerEnd


class World(SSHPair):
    """A server for many connections, on one clock. Its users have VMs and keys."""

    def __init__(self, ring: Any = None, trusted: Sequence[str] = TRUSTED) -> None:
        self.ring = ring or make_ring()
        folder = TemporaryDirectory()
        weakref.finalize(self, folder.cleanup)
        self._folder, self._written = Path(folder.name), 0
        self.ahead = _EPOCH
        """Seconds that the time of day is ahead of the clock."""
        self._trusted = trusted
        self._write_first()
        super().__init__(_config(self._folder))
        self.clock.time_of_day = self.time_of_day  # type: ignore[attr-defined]
        self.truth = Truth(
            frozenset(authorities()[name].blob for name in TRUSTED),
            frozenset((self.ring["lost"].blob, authorities()["gone"].blob)),
            frozenset((REVOKED_ID,)),
            frozenset((REVOKED_SERIALS,)),
        )
        """What the files say at first."""
        self.engine.keys = [
            AuthorizedKey(
                USERS[known.user] or "",
                known.user,
                known.blob,
                KeyOptions(known.sources, None, known.verify),
            )
            for name, known in self.ring.items()
            if name != "stranger"
        ]
        self.engine.keys += [User(id=f"u-{name}", name=name.rstrip("12")) for name in _KEYLESS]
        self._keys = list(self.engine.keys)
        for user_id in filter(None, USERS.values()):
            self.engine.vms[user_id] = [console("vm1")]
        self.engine.vms[ALICE.id] = [
            console("vm1"),
            console("vm2"),
            console("vm two", role="viewer"),
            console("\x1b[2J"),
        ]
        self.users = frozenset(name.encode() for name in self.config.ssh.users)
        self.transport: Any = None
        """What a connection is instead of a ConsoleTransport."""
        self.balancer = BehindBalancer(self.factory, self.clock)
        self.admission_type: type[Admission] = Admission
        self.counts_type: type[SessionCounts] = SessionCounts
        self.parse_revocation_list = parse_revocation_list
        self.load_user_authorities = load_user_authorities
        self.load_host_certificates = load_host_certificates
        self.refusal = KeyOptions.refusal
        self._count = 0
        globals_ = (vars(module) for module in list(sys.modules.values()) if module is not None)
        # Kept, so that nothing else gets the id of one.
        self._lasting = [self, *vars(self).values(), *globals_]
        self.shared = {id(each) for each in self._lasting}
        """The ids of what outlives connections, and of what belongs to the modules."""

    def time_of_day(self) -> float:
        """In seconds since the epoch."""
        return self.ahead + float(self.clock.seconds())

    def judge_certificate(self, blob: bytes, address: str) -> Judged:
        """What a certificate is worth here and now."""
        return judge_certificate(blob, self.truth, USERS, self.time_of_day(), address)

    def _write_first(self) -> None:
        self.write("user_ca", "".join(map(public_line, self._trusted)))
        self.write("revoked_keys", revocation_text(self.ring))

    def write(self, name: str, content: str | bytes) -> Path:
        """Write a file, such as ``user_ca`` or ``revoked_keys``, as an operator's editor does."""
        # No two are of the same time.
        self._written += 1
        new = self._folder / "new"
        new.write_bytes(content.encode() if isinstance(content, str) else content)
        os.utime(new, ns=(self._written, self._written))
        return new.replace(self._folder / name)

    def _connect(self) -> None:
        """There is no connection at first."""

    def new_address(self) -> str:
        """Nobody else's."""
        self._count += 1
        number = self._count
        return f"10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}"

    def accept(self, address: str, behind: bool = False) -> Accepted:
        """A TCP connection from this address; ``behind``: it is a balancer's."""
        server: Any = self.factory.buildProtocol(None)
        receiver = self.balancer.protocol(self.balancer, server) if behind else server
        if self.transport is not None:
            server.__class__ = self.transport
        end = ServerEnd(receiver, address)
        receiver.makeConnection(end)
        return Accepted(server, receiver, end)

    def admit(
        self,
        limits: Limits,
        random_below: Callable[[int], int],
        pause: Callable[[], None],
        resume: Callable[[], None],
    ) -> Admission:
        """Have connections admitted within these limits from now on."""
        admission = self.admission_type(self.clock, limits, random_below, pause, resume)
        self.factory.admission = admission
        self.factory.session_counts = self.counts_type(limits.sessions_per_user, self.clock)
        self.factory.limits = limits
        return admission

    def reset_admission(self) -> None:
        """Go back to the admission and the limits of the configuration."""
        self.factory.admission, self.factory.limits = self.admission, self.config.limits

    def restore(self) -> None:
        """Be again as it was at first, whatever a play has changed."""
        self.reset_admission()
        self.ahead = _EPOCH
        self.engine.keys = list(self._keys)
        self._write_first()
        for service in (self.trust, self.permissions):
            if service.running:
                service.stopService()
        self.trust.reload()
        Deferred.fromCoroutine(self.permissions.user_ids())

    def timers(self) -> list[IDelayedCall]:
        """Those that should not be there: none of those by which the log is kept short."""
        return [
            call
            for call in super().timers()
            if not isinstance(getattr(call.func, "__self__", None), SummedRefusals)  # type: ignore[attr-defined]
        ]

    def weight(self) -> int:
        """Bytes that the server holds between connections."""
        around = {id(each) for each in (self.events, self.engine, self.guests, self.config)}
        ours = [self.factory, self.balancer]
        return weigh(ours, (self.shared | around) - {id(each) for each in ours}).size

    def forget(self) -> None:
        """Drop what the doubles have noted: that grows, and is none of the server's."""
        self.events.seen.clear()
        self.engine.asked.clear()
        self.guests.asked.clear()
        self.guests.places.clear()
        self.guests.opened[:] = [guest for guest in self.guests.opened if guest.open]


def revocation_text(ring: dict[str, Known]) -> str:
    """The revocation list at first."""
    first, last = REVOKED_SERIALS
    lost = f"ssh-ed25519 {b64encode(ring['lost'].blob).decode()}"
    gone = public_line("gone")
    return f"{lost}\n{gone}id: {REVOKED_ID.decode()}\nserial: {first}-{last}\n"


def _config(folder: Path) -> Config:
    return Config(
        # Often enough for programs to see them: keepalives and new keys.
        ssh=SSH(
            ciphers=(*CIPHERS,),
            macs=(*MACS,),
            keepalive=9.0,
            rekey_seconds=60.0,
            rekey_bytes=1 << 20,
            user_ca=str(folder / "user_ca"),
            revoked_keys=str(folder / "revoked_keys"),
        ),
        console=ConsoleSettings(linger=0.0),
    )


@contextmanager
def watched_log(found: list[str]) -> Iterator[None]:
    """Note every event of the log that is an error, or worse."""

    def note(event: dict[str, Any]) -> None:
        if event["log_level"] in (LogLevel.error, LogLevel.critical):
            failure = event.get("log_failure")
            text = failure.getTraceback() if failure else str(event.get("log_format"))
            found.append(f"{event['log_namespace']}: {text}")

    globalLogPublisher.addObserver(note)
    try:
        yield
    finally:
        globalLogPublisher.removeObserver(note)


def start_logging() -> None:
    """Let Twisted keep no events for an observer that may come: those hold connections."""
    globalLogBeginner.beginLoggingTo([], redirectStandardIO=False)


class Weight(NamedTuple):
    """What something holds."""

    size: int
    """Bytes."""
    objects: int


def weigh(root: Any, shared: Collection[int]) -> Weight:
    """What is held by ``root`` alone, so not by what is ``shared`` (ids of objects)."""
    seen, size, count, waiting = set(shared), 0, 0, [root]
    while waiting:
        each = waiting.pop()
        if id(each) in seen or isinstance(each, _NOT_OURS):
            continue
        seen.add(id(each))
        size += sys.getsizeof(each)
        count += 1
        waiting.extend(gc.get_referents(each))
    return Weight(size, count)
