"""Which of the VMs somebody's rules cover, as the entries of a console list."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import translate

import msgspec

from vmconsole.engine.embedded.inventory import Inventory, Placement
from vmconsole.engine.embedded.records import Rule
from vmconsole.interfaces import Role

_WILDCARD = re.compile(r"[*?[]")
_PATTERNS = 1000
# Patterns that a VM is compared with at a time, and entries in one piece of a reply.
_AT_ONCE = 50
_PART = 250
_VIEWER = b',"role":"viewer"'


class Entry(msgspec.Struct, frozen=True):
    """A VM in the lists, as pieces of JSON."""

    placement: Placement
    plain: bytes
    """What the protocol has, without the closing brace."""
    problem: bytes
    """The field that tells why the console cannot be opened; empty: it can."""

    def json(self, *, viewer: bool, problem: bool) -> bytes:
        """The whole entry; ``problem``: with that field."""
        role = _VIEWER if viewer else b""
        return b"%b%b%b}" % (self.plain, role, self.problem if problem else b"")


class ConsoleIndex:
    """Finds VMs by rule; on the reactor's thread, a little at a time."""

    def __init__(self, inventory: Inventory) -> None:
        self._inventory = inventory
        self._entries: dict[str, Entry] = {}
        self._patterns: dict[str, re.Pattern[str]] = {}

    @property
    def version(self) -> int:
        """Grows with each change of the VMs."""
        return self._inventory.version

    def roles(self, rules: Sequence[Rule], found: dict[str, Role]) -> Iterator[None]:
        """Put the VMs that ``rules`` cover into ``found``, by id; operator outweighs viewer."""
        wildcards = []
        for rule in rules:
            ids = list(self._inventory.called(rule.pattern))
            if self._inventory.find(rule.pattern) is not None:
                ids.append(rule.pattern)
            for id in ids:
                _add(found, id, rule.role)
            if _WILDCARD.search(rule.pattern):
                wildcards.append((self._matcher(rule.pattern), rule.role))
            yield
        if not wildcards:
            return
        # A rule that lets them type first: then no other has to be looked at.
        wildcards.sort(key=lambda each: each[1] != "operator")
        for id in self._inventory.ids():
            placement = self._inventory.find(id)
            if placement is None or found.get(id) == "operator":
                continue
            for number, (matcher, role) in enumerate(wildcards, 1):
                if matcher.match(placement.domain.name):
                    _add(found, id, role)
                    break
                if not number % _AT_ONCE:
                    yield
            yield

    def entries(
        self, roles: Mapping[str, Role], parts: list[bytes], *, viewers: bool, problems: bool
    ) -> Iterator[None]:
        """Put the entries of these VMs into ``parts``, by id, some in each.

        ``viewers``: also of those that may only be watched; ``problems``: with what keeps a
        console shut.
        """
        part: list[bytes] = []
        for id in sorted(roles):
            placement, viewer = self._inventory.find(id), roles[id] != "operator"
            if placement is not None and (viewers or not viewer):
                part.append(self._entry(id, placement).json(viewer=viewer, problem=problems))
            if len(part) == _PART:
                parts.append(b",".join(part))
                part.clear()
            yield
        parts.append(b",".join(part))

    def _entry(self, id: str, placement: Placement) -> Entry:
        entry = self._entries.get(id)
        if entry is None or entry.placement is not placement:
            entry = self._entries[id] = _make_entry(placement)
            if len(self._entries) > 2 * len(self._inventory):
                # Those of VMs that are gone.
                self._entries = {id: entry}
        return entry

    def _matcher(self, pattern: str) -> re.Pattern[str]:
        matcher = self._patterns.get(pattern)
        if matcher is None:
            if len(self._patterns) >= _PATTERNS:
                self._patterns.clear()
            matcher = self._patterns[pattern] = re.compile(translate(pattern))
        return matcher


def _add(found: dict[str, Role], id: str, role: Role) -> None:
    if found.get(id) != "operator":
        found[id] = role


def _make_entry(placement: Placement) -> Entry:
    domain = placement.domain
    plain = {
        "vmid": domain.id,
        "vmname": domain.name,
        "host": placement.host,
        "console": "default",
    }
    problem = domain.console_problem
    return Entry(
        placement,
        msgspec.json.encode(plain)[:-1],
        b',"problem":%b' % msgspec.json.encode(problem) if problem else b"",
    )
