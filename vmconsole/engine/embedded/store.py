"""What the embedded engine knows: users, groups, keys, hosts, grants; SQLAlchemy Core.

Called in the service's threads, and by the ``vmconsole`` command beside a running service. Each
transaction that writes bumps a revision, by which readers see that something changed, and has a
record of the change.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType

import msgspec
from sqlalchemy import Connection, delete, insert, select, union

from vmconsole.engine.embedded import queries
from vmconsole.engine.embedded.database import Database, Part, random_step
from vmconsole.engine.embedded.keyfile import parse_public_keys
from vmconsole.engine.embedded.queries import quoted
from vmconsole.engine.embedded.records import (
    Access,
    ChangeRecord,
    GrantRecord,
    GroupRecord,
    HostRecord,
    KeyRecord,
    Revisions,
    Rule,
    UserRecord,
)
from vmconsole.engine.embedded.schema import (
    changes,
    grants,
    groups,
    hosts,
    keys,
    members,
    meta,
    users,
)
from vmconsole.errors import StoreError
from vmconsole.interfaces import Role
from vmconsole.publickeys import fingerprint
from vmconsole.text import printable

# It stands in URIs and in file names of others: no slash, no @, no leading dash.
_HOST_NAME = re.compile(r"[A-Za-z0-9_:][A-Za-z0-9_.:-]{0,252}")
_MAX_PATTERN = 255
_MAX_URI = 1024
_MAX_ACTOR = 255


class Store:
    """The records in the database at ``url`` (SQLAlchemy's form).

    All methods wait, and raise StoreError, with a text for the person who asked; StoreUnavailable
    when the database does not work now. ``now`` gives seconds since the epoch, ``actor`` is who
    makes the changes, ``step`` by how much a revision grows. ``open`` comes first.
    """

    def __init__(
        self,
        url: str,
        now: Callable[[], float] = time.time,
        actor: str = "vmconsole",
        step: Callable[[], int] = random_step,
    ) -> None:
        self._database = Database(url, step)
        self._now = now
        self._actor = printable(actor)[:_MAX_ACTOR]

    def open(self) -> str:
        """Make the tables where there are none, and upgrade older ones; says what was done."""
        return self._database.open()

    def check(self) -> None:
        """Raise what ``open`` would, as far as it shows without changing anything."""
        self._database.check()

    def close(self) -> None:
        """Close the connections to the database."""
        self._database.close()

    # What answers are made of.

    def revisions(self) -> Revisions:
        """By which it shows what has changed."""
        columns = (meta.c.all_revision, meta.c.keys_revision)
        query = select(*columns, meta.c.access_revision, meta.c.hosts_revision)
        with self._database.reading() as connection:
            return Revisions(*connection.execute(query).one())

    def read_keys(
        self,
        known: int | None,
        take: Callable[[Sequence[KeyRecord]], None],
        take_users: Callable[[Sequence[UserRecord]], None] = lambda users: None,
    ) -> int:
        """The keys' revision; unless it is ``known``, ``take`` gets all keys, some at a time.

        ``take_users`` gets the users who have none.
        """
        with self._database.reading() as connection:
            revision = self._database.revision(connection, "keys")
            if revision != known:
                for some in queries.keys_in_parts(connection):
                    take(some)
                for others in queries.keyless_in_parts(connection):
                    take_users(others)
            return revision

    def access(self, user_id: str, known: Access | None = None) -> Access | None:
        """What the user with this id may open; None: there is no such user.

        ``known`` itself comes back when it still holds.
        """
        columns = (grants.c.pattern, grants.c.role)
        own = select(*columns).where(grants.c.user_id == user_id)
        shared = (
            select(*columns)
            .join(members, members.c.group_id == grants.c.group_id)
            .where(members.c.user_id == user_id)
        )
        query = union(own, shared).order_by("pattern", "role")
        with self._database.reading() as connection:
            revision = self._database.revision(connection, "access")
            if known is not None and known.revision == revision:
                return known
            there = select(users.c.id).where(queries.matches(users.c.id, user_id))
            if connection.execute(there).first() is None:
                return None
            return Access(revision, tuple(Rule(*row) for row in connection.execute(query)))

    def host_uris(self) -> Mapping[str, str]:
        """The hosts' URIs, which may be empty, by name."""
        return MappingProxyType({host.name: host.uri for host in self.hosts()})

    def changes_after(self, id: int, limit: int) -> list[ChangeRecord]:
        """The first ``limit`` changes after that one, in their order."""
        query = select(changes).where(changes.c.id > id).order_by(changes.c.id).limit(limit)
        with self._database.reading() as connection:
            return [ChangeRecord(*row) for row in connection.execute(query)]

    def last_changes(self, limit: int | None = None) -> list[ChangeRecord]:
        """The last ``limit`` changes (None: all), in their order."""
        query = select(changes).order_by(changes.c.id.desc()).limit(limit)
        with self._database.reading() as connection:
            return [ChangeRecord(*row) for row in connection.execute(query)][::-1]

    # Users.

    def users(self) -> list[UserRecord]:
        """All users, by name."""
        query = select(users.c.id, users.c.name, users.c.created).order_by(users.c.name)
        with self._database.reading() as connection:
            return [UserRecord(*row) for row in connection.execute(query)]

    def add_user(self, name: str) -> UserRecord:
        """A new user, who has no key and no grant."""
        user = UserRecord(_new_id(), _checked_name("user", name), self._seconds())
        # The list of keys tells of users without one, too.
        with self._changing("user.add", name, "access", "keys") as connection:
            if queries.find_user(connection, name) is not None:
                raise StoreError(f"There is a user {quoted(name)} already.")
            connection.execute(insert(users).values(msgspec.structs.asdict(user)))
        return user

    def remove_user(self, name: str) -> None:
        """The user, with keys, grants and memberships."""
        with self._changing("user.remove", name, "access", "keys") as connection:
            user_id = queries.user_id(connection, name)
            connection.execute(delete(users).where(users.c.id == user_id))

    # Groups.

    def groups(self) -> list[GroupRecord]:
        """All groups, by name, with the names of their members."""
        with self._database.reading() as connection:
            return queries.all_groups(connection)

    def add_group(self, name: str) -> GroupRecord:
        """A new group, which has no members and no grant."""
        group = GroupRecord(_new_id(), _checked_name("group", name), (), self._seconds())
        with self._changing("group.add", f"@{name}", "access") as connection:
            if queries.find_group(connection, name) is not None:
                raise StoreError(f"There is a group {quoted(name)} already.")
            values = {"id": group.id, "name": name, "created": group.created}
            connection.execute(insert(groups).values(values))
        return group

    def remove_group(self, name: str) -> None:
        """The group, with its grants; its members stay users."""
        with self._changing("group.remove", f"@{name}", "access") as connection:
            group_id = queries.group_id(connection, name)
            connection.execute(delete(groups).where(groups.c.id == group_id))

    def add_member(self, group: str, user: str) -> None:
        """From now on the group's grants are the user's, too."""
        with self._changing("member.add", f"@{group} {user}", "access") as connection:
            group_id, user_id = (
                queries.group_id(connection, group),
                queries.user_id(connection, user),
            )
            if queries.is_member(connection, group_id, user_id):
                raise StoreError(f"User {quoted(user)} is in group {quoted(group)} already.")
            connection.execute(insert(members).values(group_id=group_id, user_id=user_id))

    def remove_member(self, group: str, user: str) -> None:
        """From now on the group's grants are not the user's."""
        with self._changing("member.remove", f"@{group} {user}", "access") as connection:
            group_id, user_id = (
                queries.group_id(connection, group),
                queries.user_id(connection, user),
            )
            statement = delete(members).where(
                members.c.group_id == group_id, members.c.user_id == user_id
            )
            if not connection.execute(statement).rowcount:
                raise StoreError(
                    f"User {quoted(user)} is not in group {quoted(group)}: `vmconsole group list` "
                    "shows who is."
                )

    # Keys.

    def keys(self, user: str | None = None) -> list[KeyRecord]:
        """The keys of ``user``, or of all, by user."""
        with self._database.reading() as connection:
            owner = None if user is None else queries.user_id(connection, user)
            return queries.all_keys(connection, owner)

    def add_keys(
        self, user: str, text: str, hand_out: Callable[[], object] = lambda: None
    ) -> list[KeyRecord]:
        """Every key of ``text``, which has one a line as authorized_keys has; all or none.

        ``hand_out`` is called within the transaction, last: when it raises, no key was added.
        """
        lines = parse_public_keys(text)
        records = [
            KeyRecord(
                fingerprint(line.blob),
                "",
                user,
                line.type,
                line.blob,
                line.comment,
                self._seconds(),
                str(line.options),
            )
            for line in lines
        ]
        subject = f"{user} {' '.join(record.fingerprint for record in records)}"
        with self._changing("key.add", subject, "keys") as connection:
            user_id = queries.user_id(connection, user)
            records = [msgspec.structs.replace(record, user_id=user_id) for record in records]
            for record in records:
                queries.refuse_duplicate(connection, record)
                values = msgspec.structs.asdict(record)
                del values["user"]
                connection.execute(insert(keys).values(values))
            hand_out()
        return records

    def remove_key(self, name: str) -> KeyRecord:
        """The key with that fingerprint, given with or without ``SHA256:``."""
        wanted = "SHA256:" + name.removeprefix("SHA256:")
        with self._database.writing("keys") as connection:
            record = queries.find_key(connection, wanted)
            if record is None:
                raise StoreError(
                    f"There is no key {quoted(wanted)}: `vmconsole key list` shows the "
                    "fingerprints."
                )
            connection.execute(delete(keys).where(keys.c.fingerprint == wanted))
            self._note(connection, "key.remove", f"{record.user} {wanted}")
        return record

    # Hosts.

    def hosts(self) -> list[HostRecord]:
        """All hosts, by name."""
        with self._database.reading() as connection:
            return queries.all_hosts(connection)

    def add_host(self, name: str, uri: str = "") -> HostRecord:
        """A new host. Whether ``uri`` may be used, the caller has checked."""
        if not _HOST_NAME.fullmatch(name):
            raise StoreError(f"{quoted(name)} is no host name, and no IP address.")
        if len(uri) > _MAX_URI or not uri.isascii() or not uri.isprintable() or " " in uri:
            raise StoreError(f"{quoted(uri)} is no URI.")
        with self._changing("host.add", f"{name} {uri}".rstrip(), "hosts") as connection:
            if any(host.name == name for host in queries.all_hosts(connection)):
                raise StoreError(
                    f"There is a host {quoted(name)} already: to change its URI, "
                    f"`vmconsole host remove {name}` first."
                )
            connection.execute(insert(hosts).values(name=name, uri=uri))
        return HostRecord(name, uri)

    def remove_host(self, name: str) -> None:
        """The host; its VMs are no longer served."""
        with self._changing("host.remove", name, "hosts") as connection:
            statement = delete(hosts).where(queries.matches(hosts.c.name, name))
            if not connection.execute(statement).rowcount:
                raise StoreError(
                    f"There is no host {quoted(name)}: `vmconsole host list` shows them."
                )

    # Grants.

    def grants(self) -> list[GrantRecord]:
        """All grants, by subject and pattern."""
        with self._database.reading() as connection:
            return queries.all_grants(connection)

    def grant(self, subject: str, pattern: str, role: Role = "operator") -> GrantRecord:
        """Let ``subject``, a user or ``@GROUP``, open the VMs that ``pattern`` matches.

        The pattern is an id, a name, or a shell pattern of names. A grant that is there already
        gets the new role.
        """
        if not pattern or len(pattern) > _MAX_PATTERN or not pattern.isprintable():
            raise StoreError(
                f"{quoted(pattern)} is no VM: an id, a name, or a pattern such as 'web*', of at "
                f"most {_MAX_PATTERN} visible characters."
            )
        grant = GrantRecord(subject, pattern, role, self._seconds())
        with self._changing("grant", f"{subject} {pattern} {role}", "access") as connection:
            owner = queries.subject_id(connection, subject)
            queries.delete_grant(connection, owner, pattern)
            values = {**owner, "pattern": pattern, "role": role, "created": grant.created}
            connection.execute(insert(grants).values(values))
        return grant

    def revoke(self, subject: str, pattern: str) -> None:
        """Take back the grant with exactly this pattern."""
        with self._changing("revoke", f"{subject} {pattern}", "access") as connection:
            owner = queries.subject_id(connection, subject)
            if not queries.delete_grant(connection, owner, pattern):
                raise StoreError(
                    f"{quoted(subject)} has no grant {quoted(pattern)}: "
                    "`vmconsole grants` shows them."
                )

    @contextmanager
    def _changing(self, action: str, subject: str, *parts: Part) -> Iterator[Connection]:
        """A transaction that changes ``parts``, with the record of it."""
        with self._database.writing(*parts) as connection:
            yield connection
            self._note(connection, action, subject)

    def _note(self, connection: Connection, action: str, subject: str) -> None:
        change = {
            "time": self._seconds(),
            "actor": self._actor,
            "action": action,
            "subject": subject,
        }
        connection.execute(insert(changes).values(change))

    def _seconds(self) -> int:
        return int(self._now())


def _new_id() -> str:
    return str(uuid.uuid4())


def _checked_name(kind: str, name: str) -> str:
    if not queries.NAME.fullmatch(name):
        raise StoreError(
            f"{quoted(name)} is no name for a {kind}: at most 64 letters, digits, '.', '_', "
            "'-', the first one a letter, a digit or '_'."
        )
    return name
