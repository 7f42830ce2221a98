"""What the tests of the engine share: certificates made once, an engine in memory, log lines."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar, cast

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import settings
from twisted.internet.defer import Deferred, succeed
from twisted.internet.task import Clock
from twisted.logger import ILogObserver, LogEvent, formatEvent, globalLogPublisher
from twisted.trial.unittest import SynchronousTestCase
from twisted.web.iweb import IAgent

from vmconsole import pki
from vmconsole.engine.client import EngineClient
from vmconsole.engine.embedded.answers import Answers
from vmconsole.engine.embedded.inventory import Inventory
from vmconsole.engine.embedded.servlet import ConsoleProxyServlet, make_site
from vmconsole.engine.embedded.store import Store
from vmconsole.engine.http import without_cookies
from vmconsole.engine.ticket import TicketVerifier
from vmconsole.interfaces import AuthorizedKey

T = TypeVar("T")

# How long an example takes says more about the machine than about us.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

NOW = datetime(2026, 11, 24, 8, 0, tzinfo=UTC)
URL = "http://engine.example.com/ovirt-engine/"


def authority(name: str = "test CA") -> pki.Identity:
    """A CA."""
    return _authority(name)


def signer(usage: pki.Usage = "ticket", ca: str = "test CA") -> pki.Identity:
    """A certificate of that CA, RSA 2048 as oVirt's."""
    return _signer(usage, ca)


@functools.cache
def todays_authority() -> pki.Identity:
    """A CA that is valid by the real clock."""
    return pki.make_authority("today's CA", datetime.now(UTC))


# The caches see what is passed, and not the defaults.
@functools.cache
def _authority(name: str) -> pki.Identity:
    return pki.make_authority(name, NOW)


@functools.cache
def _signer(usage: pki.Usage, ca: str) -> pki.Identity:
    return pki.issue(authority(ca), "proxy", usage, NOW, key_size=2048)


@functools.cache
def public_line(name: str) -> str:
    """An ed25519 key of ``name``, always the same."""
    key = Ed25519PrivateKey.generate().public_key()
    return f"{key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()} {name}@home"


def short_directory(test: SynchronousTestCase) -> Path:
    """An empty directory whose name leaves room for a unix socket's, gone after the test."""
    directory = TemporaryDirectory()
    test.addCleanup(directory.cleanup)
    return Path(directory.name)


def clock_at(moment: datetime = NOW) -> Clock:
    """A clock that shows this time."""
    clock = Clock()
    clock.advance(moment.timestamp())
    return clock


def client_of(
    agent: IAgent,
    clock: Clock,
    identity: pki.Identity | None = None,
    url: str = URL,
    **settings: Any,
) -> EngineClient:
    """A client that reaches its engine through ``agent``."""

    async def credentials() -> pki.Identity:
        return identity or signer()

    http = without_cookies(agent)
    return EngineClient(http, url, credentials, clock, **settings)


async def all_keys(client: EngineClient) -> Sequence[AuthorizedKey]:
    """The keys, read to the last one."""
    return tuple(key for key in (await client.authorized_keys()).keys if key is not None)


class EngineInMemory:
    """The real store and servlet, without threads and sockets."""

    def __init__(self, directory: Path, clock: Clock) -> None:
        self.clock = clock
        self.store = Store(f"sqlite:///{directory / 'engine.db'}", clock.seconds)
        self.store.open()
        self.inventory = Inventory()
        self.answers = Answers(self.store, self.inventory, at_once, clock)
        verifier = TicketVerifier([authority().certificate])
        self.site = make_site(ConsoleProxyServlet(self.answers, verifier, clock), clock)
        self.root = self.site.resource


def at_once(function: Callable[[], T]) -> Deferred[T]:
    """Instead of a thread."""
    return succeed(None).addCallback(lambda _: function())


class EngineTestCase(SynchronousTestCase):
    """Keeps what is logged, as text."""

    def setUp(self) -> None:
        self.events: list[LogEvent] = []
        observer = cast(ILogObserver, self.events.append)
        globalLogPublisher.addObserver(observer)
        self.addCleanup(globalLogPublisher.removeObserver, observer)
        self.clock = clock_at()

    def logged(self, words: str) -> Sequence[str]:
        """The lines that have these words."""
        lines = [formatEvent(event) for event in self.events]
        return [line for line in lines if words in line]

    def result(self, coroutine: Coroutine[Any, Any, T] | Awaitable[T]) -> T:
        """What it returned, by now."""
        return self.successResultOf(start(coroutine))

    def failure(self, coroutine: Awaitable[object], kind: type[Exception]) -> str:
        """The text of the exception that it raised, by now."""
        return str(self.failureResultOf(start(coroutine), kind).value)


def start(coroutine: Awaitable[T]) -> Deferred[T]:
    """Run it up to where it waits."""
    return Deferred.fromCoroutine(coroutine)  # type: ignore[arg-type]
