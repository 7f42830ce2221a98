"""Which VM stands on which host, as the hosts' libvirt tells it."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from typing import NamedTuple

from twisted.logger import Logger
from zope.interface import implementer

from vmconsole.interfaces import Domain, DomainState, IDomainObserver
from vmconsole.text import printable


class Placement(NamedTuple):
    """A VM and the host that it stands on, or is defined on."""

    domain: Domain
    host: str


_STATES = {DomainState.SHUT_OFF: 0, DomainState.PAUSED: 1, DomainState.RUNNING: 2}


@implementer(IDomainObserver)
class Inventory:
    """Remembers the domains of the hosts; on the reactor's thread only.

    The domains of a host that was lost stay, so that their users are told what is wrong with
    the host instead of that there is no VM.
    """

    _log = Logger()

    def __init__(self) -> None:
        # By id, where each was seen: by host, when, and what.
        self._sightings: dict[str, dict[str, tuple[int, Domain]]] = {}
        self._hosts: dict[str, set[str]] = {}
        self._lost: set[str] = set()
        self._events = 0
        self._placements: dict[str, Placement] = {}
        self._ids: list[str] = []
        self._by_name: dict[str, set[str]] = {}
        self.version = 0
        """Grows with each change of what is placed where."""

    def __len__(self) -> int:
        return len(self._ids)

    def ids(self) -> Sequence[str]:
        """The ids of all VMs now, sorted."""
        return tuple(self._ids)

    def find(self, id: str) -> Placement | None:
        """The VM with this id; None: there is none."""
        return self._placements.get(id)

    def called(self, name: str) -> Sequence[str]:
        """The ids of the VMs of this name, which need not be unique, sorted."""
        return sorted(self._by_name.get(name, ()))

    def forget(self, host: str) -> None:
        """The host is none of ours any more."""
        ids = self._hosts.pop(host, set())
        self._lost.discard(host)
        for id in ids:
            del self._sightings[id][host]
            self._place(id)

    def domains_listed(self, host: str, domains: Sequence[Domain]) -> None:
        """See IDomainObserver."""
        was_lost = host in self._lost
        self._lost.discard(host)
        before = self._hosts.get(host, set())
        for id in before - {domain.id for domain in domains}:
            self._remove(host, id)
        for domain in domains:
            self._see(host, domain)
        if was_lost:
            self._place_all(host)
        self._log.info("{host} has {count} VMs", host=printable(host), count=len(domains))

    def domain_changed(self, host: str, domain: Domain) -> None:
        """See IDomainObserver."""
        self._see(host, domain)

    def domain_removed(self, host: str, domain_id: str) -> None:
        """See IDomainObserver."""
        if domain_id in self._hosts.get(host, ()):
            self._remove(host, domain_id)

    def host_lost(self, host: str, reason: str) -> None:
        """See IDomainObserver. Who lost it has logged why."""
        if host not in self._lost:
            self._lost.add(host)
            self._place_all(host)

    def _see(self, host: str, domain: Domain) -> None:
        self._events += 1
        self._hosts.setdefault(host, set()).add(domain.id)
        self._sightings.setdefault(domain.id, {})[host] = (self._events, domain)
        self._place(domain.id)

    def _remove(self, host: str, id: str) -> None:
        self._hosts[host].discard(id)
        del self._sightings[id][host]
        self._place(id)

    def _place_all(self, host: str) -> None:
        for id in self._hosts.get(host, ()):
            self._place(id)

    def _place(self, id: str) -> None:
        """Find out where a VM stands, of the hosts that know it."""
        before = self._placements.get(id)
        seen = self._sightings[id]
        if not seen:
            del self._sightings[id]
            placement = None
        elif len(seen) == 1:
            [(host, (_, domain))] = seen.items()
            placement = Placement(domain, host)
        else:
            host = max(seen, key=self._rank(seen))
            placement = Placement(seen[host][1], host)
        if placement == before:
            return
        self.version += 1
        self._index(id, before, placement)

    def _rank(self, seen: dict[str, tuple[int, Domain]]) -> Callable[[str], tuple[bool, int, int]]:
        # What counts when a VM is seen on two hosts, as during a migration: it runs, where it can
        # be reached; it runs; and then the one that was heard of last.
        def rank(host: str) -> tuple[bool, int, int]:
            at, domain = seen[host]
            placed = domain.state is not DomainState.SHUT_OFF
            return placed and host not in self._lost, _STATES[domain.state], at

        return rank

    def _index(self, id: str, before: Placement | None, placement: Placement | None) -> None:
        if before is None:
            insort(self._ids, id)
        elif placement is None:
            del self._ids[bisect_left(self._ids, id)]
        if before is not None:
            ids = self._by_name[before.domain.name]
            ids.discard(id)
            if not ids:
                del self._by_name[before.domain.name]
        if placement is None:
            del self._placements[id]
            return
        self._placements[id] = placement
        self._by_name.setdefault(placement.domain.name, set()).add(id)
