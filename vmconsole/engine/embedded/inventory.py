"""Which VM stands on which host, as the hosts' libvirt tells it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from twisted.logger import Logger
from zope.interface import implementer

from vmconsole.interfaces import Domain, DomainState, IDomainObserver
from vmconsole.text import printable


class Placement(NamedTuple):
    """A VM and the host that it stands on, or is defined on."""

    domain: Domain
    host: str


class _Sighting(NamedTuple):
    # In the order of what counts when a VM is seen on two hosts, as during a migration: it
    # runs, where it can be reached; it runs; and then the one that was heard of last.
    placed_and_reached: bool
    state: int
    at: int
    host: str
    domain: Domain


_STATES = {DomainState.SHUT_OFF: 0, DomainState.PAUSED: 1, DomainState.RUNNING: 2}


@implementer(IDomainObserver)
class Inventory:
    """Remembers the domains of the hosts; on the reactor's thread only.

    The domains of a host that was lost stay, so that their users are told what is wrong with
    the host instead of that there is no VM.
    """

    _log = Logger()

    def __init__(self) -> None:
        self._domains: dict[str, dict[str, tuple[int, Domain]]] = {}
        self._lost: set[str] = set()
        self._events = 0

    def placements(self) -> Iterator[Placement]:
        """Every VM once, with the host where it runs; by id."""
        best: dict[str, _Sighting] = {}
        for host, domains in self._domains.items():
            for id, (at, domain) in domains.items():
                placed = domain.state is not DomainState.SHUT_OFF
                sighting = _Sighting(
                    placed and host not in self._lost, _STATES[domain.state], at, host, domain
                )
                if id not in best or best[id][:3] < sighting[:3]:
                    best[id] = sighting
        for _, sighting in sorted(best.items()):
            yield Placement(sighting.domain, sighting.host)

    def forget(self, host: str) -> None:
        """The host is none of ours any more."""
        self._domains.pop(host, None)
        self._lost.discard(host)

    def domains_listed(self, host: str, domains: Sequence[Domain]) -> None:
        """See IDomainObserver."""
        self._lost.discard(host)
        self._domains[host] = {domain.id: self._seen(domain) for domain in domains}
        self._log.info("{host} has {count} VMs", host=printable(host), count=len(domains))

    def domain_changed(self, host: str, domain: Domain) -> None:
        """See IDomainObserver."""
        self._domains.setdefault(host, {})[domain.id] = self._seen(domain)

    def domain_removed(self, host: str, domain_id: str) -> None:
        """See IDomainObserver."""
        self._domains.get(host, {}).pop(domain_id, None)

    def host_lost(self, host: str, reason: str) -> None:
        """See IDomainObserver. Who lost it has logged why."""
        self._lost.add(host)

    def _seen(self, domain: Domain) -> tuple[int, Domain]:
        self._events += 1
        return self._events, domain


def matches(pattern: str, domain: Domain) -> bool:
    """Whether a grant's ``pattern`` covers the VM: its id, its name, or a pattern of names."""
    return pattern in (domain.id, domain.name) or fnmatchcase(domain.name, pattern)
