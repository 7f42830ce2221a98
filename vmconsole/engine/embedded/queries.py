"""The store's questions, each within somebody's transaction."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from sqlalchemy import Column, ColumnElement, Connection, Select, delete, exists, false, select

from vmconsole.engine.embedded.records import (
    GrantRecord,
    GroupRecord,
    HostRecord,
    KeyRecord,
    UserRecord,
)
from vmconsole.engine.embedded.schema import grants, groups, hosts, keys, members, users
from vmconsole.errors import StoreError
from vmconsole.text import printable

# Keys that are read at a time: less than a millisecond of anybody's work.
_PART = 250
# What users and groups may be called.
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")


def quoted(text: str) -> str:
    """What somebody gave, as it is shown in an error."""
    return f"'{printable(text, 80)}'"


def matches(column: Column[str], text: str) -> ColumnElement[bool]:
    """Whether ``column`` is what somebody gave."""
    # All that is stored is visible. Of the rest, no database takes all: NUL, half characters.
    return column == text if text.isprintable() else false()


def find_user(connection: Connection, name: str) -> str | None:
    """The id of the user; None: there is none."""
    return connection.execute(select(users.c.id).where(matches(users.c.name, name))).scalar()


def find_group(connection: Connection, name: str) -> str | None:
    """The id of the group; None: there is none."""
    return connection.execute(select(groups.c.id).where(matches(groups.c.name, name))).scalar()


def user_id(connection: Connection, name: str) -> str:
    """The id of the user. Raises StoreError when there is none."""
    found = find_user(connection, name)
    if found is None:
        raise StoreError(f"There is no user {quoted(name)}{_cure('user', name)}.")
    return found


def group_id(connection: Connection, name: str) -> str:
    """The id of the group. Raises StoreError when there is none."""
    found = find_group(connection, name)
    if found is None:
        raise StoreError(f"There is no group {quoted(name)}{_cure('group', name)}.")
    return found


def subject_id(connection: Connection, subject: str) -> dict[str, str]:
    """The column and the id of a user, or of ``@GROUP``. Raises StoreError."""
    if subject.startswith("@"):
        return {"group_id": group_id(connection, subject[1:])}
    return {"user_id": user_id(connection, subject)}


def is_member(connection: Connection, group_id: str, user_id: str) -> bool:
    """Whether the user is in the group."""
    query = select(members.c.user_id).where(
        members.c.group_id == group_id, members.c.user_id == user_id
    )
    return connection.execute(query).first() is not None


def all_groups(connection: Connection) -> list[GroupRecord]:
    """By name, with the names of their members."""
    names: dict[str, list[str]] = {}
    query = select(members.c.group_id, users.c.name).join(users).order_by(users.c.name)
    for id, name in connection.execute(query):
        names.setdefault(id, []).append(name)
    found = select(groups.c.id, groups.c.name, groups.c.created).order_by(groups.c.name)
    return [
        GroupRecord(id, name, tuple(names.get(id, ())), created)
        for id, name, created in connection.execute(found)
    ]


def all_keys(connection: Connection, user_id: str | None = None) -> list[KeyRecord]:
    """The keys of that user, or of all, by user."""
    query = _keys()
    if user_id is not None:
        query = query.where(keys.c.user_id == user_id)
    return [KeyRecord(*row) for row in connection.execute(query)]


def keys_in_parts(connection: Connection) -> Iterator[Sequence[KeyRecord]]:
    """All keys, some at a time."""
    rows = connection.execution_options(yield_per=_PART).execute(_keys())
    for part in rows.partitions():
        yield [KeyRecord(*row) for row in part]


def keyless_in_parts(connection: Connection) -> Iterator[Sequence[UserRecord]]:
    """The users who have no key, some at a time."""
    query = (
        select(users.c.id, users.c.name, users.c.created)
        .where(~exists().where(keys.c.user_id == users.c.id))
        .order_by(users.c.name)
    )
    rows = connection.execution_options(yield_per=_PART).execute(query)
    for part in rows.partitions():
        yield [UserRecord(*row) for row in part]


def find_key(connection: Connection, fingerprint: str) -> KeyRecord | None:
    """The key with this fingerprint; None: there is none."""
    row = connection.execute(_keys().where(matches(keys.c.fingerprint, fingerprint))).first()
    return None if row is None else KeyRecord(*row)


def refuse_duplicate(connection: Connection, key: KeyRecord) -> None:
    """Raise StoreError when somebody has the key already."""
    there = find_key(connection, key.fingerprint)
    if there is not None:
        raise StoreError(f"User {quoted(there.user)} has the key {key.fingerprint} already.")


def all_hosts(connection: Connection) -> list[HostRecord]:
    """By name."""
    query = select(hosts.c.name, hosts.c.uri).order_by(hosts.c.name)
    return [HostRecord(*row) for row in connection.execute(query)]


def all_grants(connection: Connection) -> list[GrantRecord]:
    """By subject and pattern; groups come first."""
    query = (
        select(users.c.name, groups.c.name, grants.c.pattern, grants.c.role, grants.c.created)
        .select_from(grants)
        .outerjoin(users)
        .outerjoin(groups)
    )
    found = [
        GrantRecord(user if group is None else f"@{group}", *row)
        for user, group, *row in connection.execute(query)
    ]
    return sorted(found, key=lambda grant: (grant.subject, grant.pattern))


def delete_grant(connection: Connection, owner: dict[str, str], pattern: str) -> bool:
    """Whether ``owner``, of subject_id, had that grant."""
    [(column, id)] = owner.items()
    statement = delete(grants).where(grants.c[column] == id, matches(grants.c.pattern, pattern))
    return connection.execute(statement).rowcount > 0


def _keys() -> Select[Any]:
    return (
        select(
            keys.c.fingerprint,
            keys.c.user_id,
            users.c.name,
            keys.c.type,
            keys.c.blob,
            keys.c.comment,
            keys.c.created,
            keys.c.options,
        )
        .join_from(keys, users)
        .order_by(users.c.name, keys.c.created, keys.c.fingerprint)
    )


def _cure(kind: str, name: str) -> str:
    return f": add it with `vmconsole {kind} add {name}`" if NAME.fullmatch(name) else ""
