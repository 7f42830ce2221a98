"""Doubles for the seams: they implement the interfaces, and append to one list what happens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.error import ConnectionDone
from twisted.internet.interfaces import IAddress, IProtocolFactory, IStreamClientEndpoint
from twisted.logger import LogPublisher
from twisted.python.failure import Failure
from zope.interface import implementer

from vmconsole.errors import ConsoleError, EngineError, EngineUnreachable, VMConsoleError
from vmconsole.interfaces import (
    AuthorizedKey,
    ConsoleInfo,
    IConsoleEndpoints,
    IConsoleTransport,
    IEngine,
    KeyList,
    Role,
    User,
)


def console(
    name: str, vm_id: str = "", host: str = "node1", role: Role = "operator"
) -> ConsoleInfo:
    """A ConsoleInfo; the id is made of the name when none is given."""
    return ConsoleInfo(vm_id=vm_id or f"id-{name}", vm_name=name, host=host, role=role)


@implementer(IAddress)
class GuestAddress:
    """The address of a guest that is not there."""


@implementer(IConsoleTransport)
class GuestTransport:
    """A stream to a guest that a test plays: ``typed`` is what it got."""

    def __init__(self, protocol: Any) -> None:
        self.protocol = protocol
        self.typed = b""
        self.unsent = 0
        self.confirmations = 0
        self.producer: Any = None
        self.open = True

    def write(self, data: bytes) -> None:
        self.typed += data

    def writeSequence(self, data: Any) -> None:
        self.write(b"".join(data))

    def registerProducer(self, producer: Any, streaming: bool) -> None:
        assert streaming
        self.producer = producer

    def unregisterProducer(self) -> None:
        self.producer = None

    def confirm(self) -> None:
        self.confirmations += 1

    def loseConnection(self) -> None:
        self.end(Failure(ConnectionDone()))

    def getPeer(self) -> IAddress:
        return GuestAddress()

    def getHost(self) -> IAddress:
        return GuestAddress()

    # What the test, as the guest and its host, does.

    def print(self, data: bytes) -> None:
        """The guest prints."""
        self.protocol.dataReceived(data)

    def end(self, reason: Failure | ConsoleError) -> None:
        """The stream ends."""
        if self.open:
            self.open = False
            failure = reason if isinstance(reason, Failure) else Failure(reason)
            if self.producer is not None:
                self.producer.stopProducing()
            self.protocol.connectionLost(failure)


@implementer(IConsoleEndpoints)
class Guests:
    """Endpoints to guests in memory. ``answer`` decides how a connection goes: None, at once;
    an exception, it fails; a Deferred, the test fires it."""

    def __init__(self) -> None:
        self.answer: ConsoleError | Deferred[None] | None = None
        self.opened: list[GuestTransport] = []
        self.cancelled = 0
        self.asked: list[tuple[str, str]] = []
        """The VM's name, and ``open``, ``force``, ``break`` or ``sysrq`` and the letter."""
        self.places: list[ConsoleInfo] = []
        """Where it was tried to open a console."""
        self.refusal: ConsoleError | None = None
        """Why neither BREAK nor SysRq can be sent."""
        self.types_sysrq = True
        """SysRq goes by BREAK, so that the letter has to be typed."""

    @property
    def guest(self) -> GuestTransport:
        """The guest that was opened last."""
        return self.opened[-1]

    def console_endpoint(self, console: ConsoleInfo, force: bool = False) -> IStreamClientEndpoint:
        self.asked.append((console.vm_name, "force" if force else "open"))
        self.places.append(console)
        return GuestEndpoint(self)

    async def send_break(self, console: ConsoleInfo) -> None:
        self.asked.append((console.vm_name, "break"))
        if self.refusal is not None:
            raise self.refusal

    async def send_sysrq(self, console: ConsoleInfo, letter: str) -> bytes:
        self.asked.append((console.vm_name, f"sysrq {letter}"))
        if self.refusal is not None:
            raise self.refusal
        return letter.encode() if self.types_sysrq else b""


@implementer(IStreamClientEndpoint)
class GuestEndpoint:
    """See Guests."""

    def __init__(self, guests: Guests) -> None:
        self._guests = guests

    def connect(self, protocolFactory: IProtocolFactory) -> Deferred[Any]:
        answer = self._guests.answer
        if isinstance(answer, ConsoleError):
            return fail(answer)
        waited: Deferred[None] = succeed(None)
        if isinstance(answer, Deferred):
            waited = Deferred(lambda _: self._cancelled())
            answer.addCallbacks(lambda _: waited.callback(None), waited.errback)

        def connected(_: None) -> Any:
            protocol: Any = protocolFactory.buildProtocol(GuestAddress())
            guest = GuestTransport(protocol)
            self._guests.opened.append(guest)
            protocol.makeConnection(guest)
            return protocol

        return waited.addCallback(connected)

    def _cancelled(self) -> None:
        self._guests.cancelled += 1


@implementer(IEngine)
class Engine:
    """An engine whose answers a test sets; ``error`` makes every call fail.

    ``asked`` has the questions: "keys", or a user's id. When a gate is set, the answer comes once
    it fires.
    """

    def __init__(self, *keys: AuthorizedKey | User) -> None:
        self.keys = list(keys)
        self.vms: dict[str, list[ConsoleInfo]] = {}
        self.error: VMConsoleError | None = None
        self.unknown: set[str] = set()
        """The ids of users about whom the question fails."""
        self.silent: set[str] = set()
        """The ids of users about whom there is no answer."""
        self.asked: list[str] = []
        self.read = 0
        """Keys that were read."""
        self.broken_after: int | None = None
        """So many keys can be read, and then the answer turns out to be no use."""
        self.keys_gate: Deferred[None] | None = None
        self.consoles_gate: Deferred[None] | None = None

    async def authorized_keys(self) -> KeyList:
        self.asked.append("keys")
        if self.keys_gate is not None:
            await self.keys_gate
        if self.error is not None:
            raise self.error
        return KeyList(repr(self.keys).encode(), self._read(list(self.keys)))

    async def consoles(self, user_id: str) -> Sequence[ConsoleInfo]:
        self.asked.append(user_id)
        if self.consoles_gate is not None:
            await self.consoles_gate
        if self.error is not None:
            raise self.error
        if user_id in self.unknown:
            raise EngineError("500")
        if user_id in self.silent:
            raise EngineUnreachable("no answer")
        return tuple(self.vms.get(user_id, []))

    def _read(self, keys: list[AuthorizedKey | User]) -> Iterator[AuthorizedKey | User]:
        for number, key in enumerate(keys, 1):
            self.read += 1
            yield key
            if number == self.broken_after:
                raise EngineError("The answer is cut.")


class Events(LogPublisher):
    """Collects log events; give it to a Logger as its observer."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[dict[str, Any]] = []
        self.addObserver(self.seen.append)

    def named(self, event: str) -> list[dict[str, Any]]:
        """The audit events of this kind."""
        return [seen for seen in self.seen if seen.get("event") == event]
