"""What the embedded engine's database holds, as values. Times are seconds since the epoch."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from vmconsole.interfaces import Role


class UserRecord(msgspec.Struct, frozen=True):
    """A user."""

    id: str
    name: str
    created: int


class GroupRecord(msgspec.Struct, frozen=True):
    """A group, with the names of its members."""

    id: str
    name: str
    members: Sequence[str]
    created: int


class KeyRecord(msgspec.Struct, frozen=True, gc=False):
    """A public key of ``user`` (a name)."""

    fingerprint: str
    user_id: str
    user: str
    type: str
    blob: bytes
    comment: str
    created: int
    options: str
    """As in a line of authorized_keys; empty: none that would restrict it."""


class HostRecord(msgspec.Struct, frozen=True):
    """A host whose VMs are served. ``uri`` may be empty: the configuration's rule."""

    name: str
    uri: str


class GrantRecord(msgspec.Struct, frozen=True):
    """``subject`` may open the VMs that ``pattern`` matches.

    It is a user's name, or ``@`` and a group's.
    """

    subject: str
    pattern: str
    role: Role
    created: int


class Rule(msgspec.Struct, frozen=True):
    """What a grant says of VMs."""

    pattern: str
    role: Role


class Access(msgspec.Struct, frozen=True):
    """What a user may open, by grants of their own and of their groups, as of one moment."""

    revision: int
    rules: Sequence[Rule]


class ChangeRecord(msgspec.Struct, frozen=True):
    """One change that was made: ``actor`` did ``action`` to ``subject``."""

    id: int
    time: int
    actor: str
    action: str
    subject: str


class Revisions(msgspec.Struct, frozen=True):
    """Each grows with every change of its part; ``all`` with every change at all."""

    all: int
    keys: int
    access: int
    hosts: int
