"""Holes in who is admitted, behind a balancer and in what operators' texts are taken for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.fuzz.world import World
from vmconsole.keyoptions import KeyOptions
from vmconsole.ssh import admission, proxy_protocol
from vmconsole.ssh.admission import Admission, Entry
from vmconsole.ssh.connection import ConsoleConnection
from vmconsole.ssh.proxy_protocol import ProxiedConnection
from vmconsole.ssh.revocation import RevocationList, parse_revocation_list
from vmconsole.ssh.sources import Source


class _Unbounded(Admission):
    """As many connections as anybody likes."""

    def _refusal(self, source: Source | None, now: float) -> str | None:
        return None if source is None or now >= source.banned_until else "banned"


class _Hasty(Admission):
    """No address is ever slowed down."""

    def place(self, entry: Entry, name: str | None) -> None:
        """See Admission."""
        if name is not None:
            self._sources.find(name, self._clock.seconds())._tokens = 10.0
        super().place(entry, name)


class _Greedy(Admission):
    """A login costs its address as much as a failure."""

    def logged_in(self, entry: Entry) -> None:
        """See Admission."""
        if entry.source is not None:
            entry.source._tokens -= 1.0
        super().logged_in(entry)


class _Neglecting(Admission):
    """Who has to wait is forgotten."""

    def _serve_later(self, source: Source, now: float) -> None:
        """See Admission."""


class _Unfair(Admission):
    """The last to come is the first to be let in."""

    def _serve_next(self, source: Source) -> None:
        source.waiting = dict(reversed(source.waiting.items()))
        super()._serve_next(source)


class _Leaking(Admission):
    """Who leaves without a login is counted for ever."""

    def left(self, entry: Entry, failed: bool) -> None:
        """See Admission."""
        super().left(entry, failed)
        self._open += entry.state is not admission.State.LOGGED_IN


class _Lenient(Admission):
    """Nobody is banned."""

    def _failed(self, source: Source) -> None:
        """See Admission."""


class _Harsh(Admission):
    """Each ban is for ten times as long."""

    def _failed(self, source: Source) -> None:
        super()._failed(source)
        if source.banned_until > self._clock.seconds():
            source.banned_until += 9 * self._limits.ban_seconds


class _Closed(Admission):
    """Once accepting pauses, it never goes on."""

    def _make_room(self) -> None:
        """See Admission."""


class _Crammed(Admission):
    """Nobody is dropped for those in the backlog."""

    def _drop_one(self) -> None:
        self._drop = None


class _Impatient(Admission):
    """Who has just come is dropped."""

    def _drop_one(self) -> None:
        for entry in self._unauthenticated:
            entry.accepted_at -= 10.0
        super()._drop_one()


class _Blind(ProxiedConnection):
    """The balancer's address is taken for the client's."""

    def getPeer(self) -> Any:
        """See ITransport."""
        return self.transport.getPeer()


class _Gullible(ProxiedConnection):
    """Who sends no header is let through."""

    def dataReceived(self, data: bytes) -> None:
        """See IProtocol."""
        if self._read is None:
            try:
                proxy_protocol.read_header(self._header + data)
            except proxy_protocol.BadHeader:
                self._read = proxy_protocol.Header(None, 0)
                if self._tell is not None:
                    self._tell(proxy_protocol.Client("unknown", True))
                return
        super().dataReceived(data)


class _Transferable(ConsoleConnection):
    """That we have our host keys is proved for any session."""

    def gotGlobalRequest(self, requestType: bytes, data: bytes) -> int | tuple[int, bytes]:
        """See SSHConnection."""
        if self._host_keys is not None:
            self._host_keys._session_id = b""
        return super().gotGlobalRequest(requestType, data)


class _Obliging(ConsoleConnection):
    """It is proved as often as anybody likes."""

    def gotGlobalRequest(self, requestType: bytes, data: bytes) -> int | tuple[int, bytes]:
        """See SSHConnection."""
        if self._host_keys is not None:
            self._host_keys._requests = 0
        return super().gotGlobalRequest(requestType, data)


def with_connection(connection: type[ConsoleConnection]) -> Callable[[Any], World]:
    """Makes a server with this connection service."""

    def make(ring: Any) -> World:
        world = World(ring)
        services = {**world.factory.services, b"ssh-connection": connection}
        world.factory.services = services  # type: ignore[misc]
        return world

    return make


def _with_admission(kind: type[Admission]) -> Callable[[Any], World]:
    def make(ring: Any) -> World:
        world = World(ring)
        world.admission_type = kind
        return world

    return make


def _behind(kind: type[ProxiedConnection]) -> Callable[[Any], World]:
    def make(ring: Any) -> World:
        world = World(ring)
        world.balancer.protocol = kind  # type: ignore[method-assign,assignment]
        return world

    return make


def _first_line(content: bytes) -> RevocationList:
    """What is behind a line with a comment is not read."""
    return parse_revocation_list(content.partition(b"#")[0])


def _skipping(content: bytes) -> RevocationList:
    """A list with a mistake in it is an empty one."""
    try:
        return parse_revocation_list(content)
    except ValueError:
        return RevocationList()


def _shortened(ring: Any) -> World:
    world = World(ring)
    world.parse_revocation_list = _first_line
    return world


def _skipped(ring: Any) -> World:
    world = World(ring)
    world.parse_revocation_list = _skipping
    return world


def _everywhere(ring: Any) -> World:
    # What excludes an address is not looked at.
    def refusal(options: KeyOptions, address: str, now: float) -> str:
        kept = tuple(each for each in options.sources if not each.startswith("!"))
        return KeyOptions(kept, options.expires).refusal(address, now)

    world = World(ring)
    world.refusal = refusal
    return world


HOLES: dict[str, Callable[[Any], World]] = {
    "unbounded": _with_admission(_Unbounded),
    "hasty": _with_admission(_Hasty),
    "greedy": _with_admission(_Greedy),
    "neglecting": _with_admission(_Neglecting),
    "unfair": _with_admission(_Unfair),
    "leaking": _with_admission(_Leaking),
    "lenient": _with_admission(_Lenient),
    "harsh": _with_admission(_Harsh),
    "closed": _with_admission(_Closed),
    "crammed": _with_admission(_Crammed),
    "impatient": _with_admission(_Impatient),
    "transferable": with_connection(_Transferable),
    "obliging": with_connection(_Obliging),
    "blind": _behind(_Blind),
    "gullible": _behind(_Gullible),
    "shortened": _shortened,
    "skipped": _skipped,
    "everywhere": _everywhere,
}
"""What each is called -> how a server that has it is made."""
