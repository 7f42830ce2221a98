"""The seams: what the parts promise each other, and the values that cross.

``ssh`` asks ``IPermissions`` who somebody is and what they may open, and ``IConsoleEndpoints`` for
the way to a guest; permissions come from an ``IEngine``; the embedded engine is an
``IDomainObserver`` of an ``IDomainSource``, the hosts. Everything else is plain classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from typing import Literal

import msgspec
from twisted.internet.interfaces import IConsumer, ITransport
from zope.interface import Attribute, Interface

from vmconsole.keyoptions import NO_OPTIONS, KeyOptions

Role = Literal["operator", "viewer"]


class User(msgspec.Struct, frozen=True):
    """Somebody whom the engine knows."""

    id: str
    name: str


class AuthorizedKey(msgspec.Struct, frozen=True, gc=False):
    """One public key of one user, as the engine tells it."""

    user_id: str
    user_name: str
    blob: bytes
    """The key in the wire format of RFC 4253, section 6.6."""
    options: KeyOptions = NO_OPTIONS


class KeyList(msgspec.Struct, frozen=True):
    """The engine's keys, of all users."""

    digest: bytes
    """The same for the same answer: who has an index of it need not read it again."""
    keys: Iterable[AuthorizedKey | User | None]
    """Read as they are taken, once, each step in little time; a User: one without a usable key;
    None: a step without either. Raises EngineError when the answer is no use after all."""


class KeyOwner(msgspec.Struct, frozen=True):
    """Who may log in with a key."""

    user: User
    verify_required: bool = False
    """Whether the signature has to say that the user was verified, not only present."""
    answered: float | None = None
    """When the engine said so (``clock.seconds()``), if it does not answer now; None: it just
    did."""


class ConsoleInfo(msgspec.Struct, frozen=True):
    """A console that a user may open, and where it stands. The engine's own words, unescaped."""

    vm_id: str
    vm_name: str
    host: str
    console: str = "default"
    role: Role = "operator"
    problem: str = ""
    """Why its console cannot be opened, and what to do; empty: it can, as far as the engine
    knows."""


class ConsoleList(msgspec.Struct, frozen=True):
    """What a user may open, by name."""

    consoles: Sequence[ConsoleInfo]
    answered: float | None = None
    """As in KeyOwner."""


class DomainState(Enum):
    """The states of a libvirt domain that matter to a console."""

    RUNNING = "running"
    PAUSED = "paused"
    SHUT_OFF = "shut off"


class Domain(msgspec.Struct, frozen=True):
    """A VM as its host's libvirt tells it."""

    id: str
    """The UUID."""
    name: str
    state: DomainState
    console_problem: str = ""
    """Why its console cannot be opened even while it runs, and what to do; empty: it can."""


class GuestNews(msgspec.Struct, frozen=True):
    """What happened to a guest."""

    runs: bool
    text: str = ""
    """What is to be told, behind the VM's name."""


class IEngine(Interface):
    """An engine, asked anew by each call. All methods raise EngineError."""

    async def authorized_keys() -> KeyList:
        """Every key of every user."""

    async def consoles(user_id: str) -> Sequence[ConsoleInfo]:
        """The consoles that the user may open, sorted by name."""


class IPermissions(Interface):
    """Who may log in, what they may open, and until when."""

    placed_only = Attribute(
        "Whether a VM that runs nowhere is not listed, as an oVirt Engine does."
    )

    async def owner(blob: bytes, address: str) -> KeyOwner | None:
        """Whose key this is, in RFC 4253's format; None: nobody's.

        Raises KeyRefused when its options do not let it in from ``address`` now, EngineError.
        """

    async def user_named(names: Sequence[str]) -> KeyOwner | None:
        """The first of ``names``, in their order, that is exactly the name of one user; None:
        none is. Raises KeyRefused when there is no such name, but one that several users have,
        EngineError."""

    async def consoles(user_id: str, fresh: bool = False) -> ConsoleList:
        """The consoles that the user may open. ``fresh`` passes by what is remembered of an
        earlier answer, unless the engine does not answer. Raises EngineError."""

    async def user_ids() -> Sequence[str]:
        """The ids of all users whom the engine tells, of whom there may be many. Raises
        EngineError."""

    def watch(
        blob: bytes | None,
        address: str,
        owner: KeyOwner,
        revoked: Callable[[str], None],
        unchecked: Callable[[float | None], None],
    ) -> IWatch:
        """Look again and again whether a login still holds.

        ``blob`` is its key; None: it goes by a certificate, and so by the user's name.
        ``revoked`` is called once, with a sentence for the user. ``unchecked`` is called with the
        time (``clock.seconds()``) of the last good look when the engine gives no usable answer any
        more, and with None when it does again.
        """


class IWatch(Interface):
    """The look at one login."""

    unconfirmed = Attribute(
        "When the engine gave the old answer by which the login was let in (clock.seconds()), "
        "until it has given a new one, or the user was told; None: one of these."
    )

    def console(
        console: ConsoleInfo, revoked: Callable[[str], None], role: Callable[[Role], None]
    ) -> Callable[[], None]:
        """Look at the permission for a console, too, from when its stream is open until the
        result is called. ``role`` is called when the user's role has changed."""

    def revoke(reason: str) -> None:
        """End the login, and its open consoles, as if the engine had taken the permission."""

    def stop() -> None:
        """The login is over."""


class IConsoleEndpoints(Interface):
    """The ways to the consoles of guests."""

    def console_endpoint(console: ConsoleInfo, force: bool = False) -> object:
        """An IStreamClientEndpoint whose stream is the guest's console.

        Its ``connect`` fails with a ConsoleError that says what is wrong and what to do. With
        ``force`` the first one that succeeds takes the console from another program on the host.
        The transport is an IConsoleTransport; when the console ends, the protocol's
        ``connectionLost`` gets a ConsoleGone that says why, by its type, too.
        """

    async def send_break(console: ConsoleInfo) -> None:
        """Send BREAK to a console that is open. Raises ConsoleError: what is missing for it."""

    async def send_sysrq(console: ConsoleInfo, letter: str) -> bytes:
        """Send SysRq and ``letter``, one of a to z and 0 to 9, to a guest whose console is open.

        Returns what has to be typed there to complete it; empty: it is complete. Nothing else may
        be typed from the call until then. Raises ConsoleError: what is missing for it.
        """


class IGuestObserver(Interface):
    """Is told what happens to guests on the hosts that are in use, on the reactor's thread."""

    def guest_changed(vm_id: str, news: GuestNews) -> None:
        """It was paused, or runs (again); perhaps it just arrived from another host."""


class IConsoleTransport(ITransport, IConsumer):
    """The stream to a guest's console.

    What is written is typed into the guest, at the pace at which the guest takes it; a push
    producer that is registered is paused when too much waits. After ``loseConnection`` the
    protocol's ``connectionLost`` comes at once: nobody waits for the host.
    """

    unsent = Attribute("Bytes that were written, and that the host has not confirmed.")

    def confirm() -> None:
        """Ask the host now whether it took all that was written; ``unsent`` tells."""


class IDomainObserver(Interface):
    """Is told what stands on the hosts, on the reactor's thread."""

    def domains_listed(host: str, domains: Sequence[Domain]) -> None:
        """All domains of a host, at connect."""

    def domain_changed(host: str, domain: Domain) -> None:
        """A domain appeared, or changed its state or name."""

    def domain_removed(host: str, domain_id: str) -> None:
        """A domain is no longer known to the host (undefined, or was transient)."""

    def host_lost(host: str, reason: str) -> None:
        """The connection to the host ended, or could not be made; a next try follows by itself."""


class IDomainSource(Interface):
    """The hosts, for who wants to know what stands on them."""

    observer = Attribute("The IDomainObserver that is told; None: nobody.")

    def watch(host: str, uri: str) -> None:
        """Keep a connection to ``host``, and tell the observer. ``uri`` may be empty: the rule
        of the configuration. A second call with another URI reconnects. Raises ConfigError when
        the URI is none that may be used."""

    def unwatch(host: str) -> None:
        """Close that connection and forget the host."""
