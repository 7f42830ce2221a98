"""What the embedded engine knows: users, keys, hosts, grants; SQLAlchemy Core, every call waits.

Called in the service's threads, and by the ``vmconsole`` command beside a running service. Each
transaction that writes bumps a revision, by which readers see that something changed.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from types import MappingProxyType

import msgspec
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from sqlalchemy import Connection, delete, insert, select

from vmconsole.engine.embedded.database import Database, grants, hosts, keys, users
from vmconsole.engine.keyline import KeyLine, parse_key_line
from vmconsole.errors import StoreError
from vmconsole.interfaces import Role
from vmconsole.publickeys import RSA_BITS, fingerprint
from vmconsole.text import printable

_USER_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")
# It stands in URIs and in file names of others: no slash, no @, no leading dash.
_HOST_NAME = re.compile(r"[A-Za-z0-9_:][A-Za-z0-9_.:-]{0,252}")
_MAX_PATTERN = 255
_PRIVATE_KEY = re.compile("PRIVATE KEY|PuTTY-User-Key-File", re.IGNORECASE)


class UserRecord(msgspec.Struct, frozen=True):
    """A user. Times are seconds since the epoch, here and below."""

    id: str
    name: str
    created: int


class KeyRecord(msgspec.Struct, frozen=True):
    """A public key of ``user`` (a name)."""

    fingerprint: str
    user_id: str
    user: str
    type: str
    blob: bytes
    comment: str
    created: int


class HostRecord(msgspec.Struct, frozen=True):
    """A host whose VMs are served. ``uri`` may be empty: the configuration's rule."""

    name: str
    uri: str


class GrantRecord(msgspec.Struct, frozen=True):
    """``user`` (a name) may open the VMs that ``pattern`` matches."""

    user_id: str
    user: str
    pattern: str
    role: Role
    created: int


class Snapshot(msgspec.Struct, frozen=True):
    """All that answers are made of, as of one moment."""

    revision: int
    user_ids: frozenset[str]
    keys: Sequence[KeyRecord]
    hosts: Mapping[str, str]
    """URIs by name."""
    grants: Mapping[str, Sequence[GrantRecord]]
    """By user id."""


class Store:
    """The records in the database at ``url`` (SQLAlchemy's form).

    All methods raise StoreError, with a text for the person who asked. ``now`` gives seconds
    since the epoch. ``open`` comes first.
    """

    def __init__(self, url: str, now: Callable[[], float] = time.time) -> None:
        self._database = Database(url)
        self._now = now

    def open(self) -> None:
        """Make the tables where there are none."""
        self._database.open()

    def close(self) -> None:
        """Close the connections to the database."""
        self._database.close()

    def snapshot(self, known: Snapshot | None = None) -> Snapshot:
        """What holds now: ``known`` itself when nothing was written since."""
        with self._database.reading() as connection:
            revision = self._database.revision(connection)
            if known is not None and known.revision == revision:
                return known
            by_user: dict[str, list[GrantRecord]] = {}
            for grant in _grants(connection):
                by_user.setdefault(grant.user_id, []).append(grant)
            return Snapshot(
                revision,
                frozenset(connection.execute(select(users.c.id)).scalars()),
                _keys(connection),
                MappingProxyType({host.name: host.uri for host in _hosts(connection)}),
                MappingProxyType(by_user),
            )

    def users(self) -> list[UserRecord]:
        """All users, by name."""
        query = select(users.c.id, users.c.name, users.c.created).order_by(users.c.name)
        with self._database.reading() as connection:
            return [UserRecord(*row) for row in connection.execute(query)]

    def add_user(self, name: str) -> UserRecord:
        """A new user, who has no key and no grant."""
        if not _USER_NAME.fullmatch(name):
            raise StoreError(
                f"{_quoted(name)} is no name for a user: at most 64 letters, digits, '.', '_', "
                "'-', the first one a letter, a digit or '_'."
            )
        user = UserRecord(str(uuid.uuid4()), name, int(self._now()))
        with self._writing() as connection:
            if connection.execute(select(users.c.id).where(users.c.name == name)).first():
                raise StoreError(f"There is a user {_quoted(name)} already.")
            connection.execute(insert(users).values(msgspec.structs.asdict(user)))
        return user

    def remove_user(self, name: str) -> None:
        """The user, with keys and grants."""
        with self._writing() as connection:
            connection.execute(delete(users).where(users.c.id == _user_id(connection, name)))

    def keys(self, user: str | None = None) -> list[KeyRecord]:
        """The keys of ``user``, or of all, by user."""
        with self._database.reading() as connection:
            return _keys(connection, None if user is None else _user_id(connection, user))

    def add_keys(self, user: str, text: str) -> list[KeyRecord]:
        """Every key of ``text``, which has one a line as authorized_keys has; all or none."""
        lines = parse_public_keys(text)
        created = int(self._now())
        with self._writing() as connection:
            user_id = _user_id(connection, user)
            records = [
                KeyRecord(
                    fingerprint(line.blob),
                    user_id,
                    user,
                    line.type,
                    line.blob,
                    line.comment,
                    created,
                )
                for line in lines
            ]
            for record in records:
                _refuse_duplicate(connection, record)
                values = msgspec.structs.asdict(record)
                del values["user"]
                connection.execute(insert(keys).values(values))
        return records

    def remove_key(self, name: str) -> KeyRecord:
        """The key with that fingerprint, given with or without ``SHA256:``."""
        wanted = "SHA256:" + name.removeprefix("SHA256:")
        with self._writing() as connection:
            for record in _keys(connection):
                if record.fingerprint == wanted:
                    connection.execute(delete(keys).where(keys.c.fingerprint == wanted))
                    return record
        raise StoreError(
            f"There is no key {_quoted(wanted)}: `vmconsole key list` shows the fingerprints."
        )

    def hosts(self) -> list[HostRecord]:
        """All hosts, by name."""
        with self._database.reading() as connection:
            return _hosts(connection)

    def add_host(self, name: str, uri: str = "") -> HostRecord:
        """A new host. Whether ``uri`` may be used, the caller has checked."""
        if not _HOST_NAME.fullmatch(name):
            raise StoreError(f"{_quoted(name)} is no host name, and no IP address.")
        if len(uri) > 1024 or not uri.isascii() or not uri.isprintable() or " " in uri:
            raise StoreError(f"{_quoted(uri)} is no URI.")
        with self._writing() as connection:
            if any(host.name == name for host in _hosts(connection)):
                raise StoreError(
                    f"There is a host {_quoted(name)} already: to change its URI, "
                    f"`vmconsole host remove {name}` first."
                )
            connection.execute(insert(hosts).values(name=name, uri=uri))
        return HostRecord(name, uri)

    def remove_host(self, name: str) -> None:
        """The host; its VMs are no longer served."""
        with self._writing() as connection:
            if not connection.execute(delete(hosts).where(hosts.c.name == name)).rowcount:
                raise StoreError(
                    f"There is no host {_quoted(name)}: `vmconsole host list` shows them."
                )

    def grants(self) -> list[GrantRecord]:
        """All grants, by user and pattern."""
        with self._database.reading() as connection:
            return _grants(connection)

    def grant(self, user: str, pattern: str, role: Role = "operator") -> GrantRecord:
        """Let ``user`` open the VMs that ``pattern`` matches: an id, a name, or a shell pattern.

        A grant that is there already gets the new role.
        """
        if not pattern or len(pattern) > _MAX_PATTERN or not pattern.isprintable():
            raise StoreError(
                f"{_quoted(pattern)} is no VM: an id, a name, or a pattern such as 'web*', of at "
                f"most {_MAX_PATTERN} visible characters."
            )
        with self._writing() as connection:
            user_id = _user_id(connection, user)
            _delete_grant(connection, user_id, pattern)
            grant = GrantRecord(user_id, user, pattern, role, int(self._now()))
            values = msgspec.structs.asdict(grant)
            del values["user"]
            connection.execute(insert(grants).values(values))
        return grant

    def revoke(self, user: str, pattern: str) -> None:
        """Take back the grant with exactly this pattern."""
        with self._writing() as connection:
            if not _delete_grant(connection, _user_id(connection, user), pattern):
                raise StoreError(
                    f"User {_quoted(user)} has no grant {_quoted(pattern)}: "
                    "`vmconsole grants` shows them."
                )

    def _writing(self) -> AbstractContextManager[Connection]:
        return self._database.writing()


def parse_public_keys(text: str) -> list[KeyLine]:
    """The keys in the lines of ``text``; comments and blank lines are left out.

    Raises StoreError, whose text never holds what was read: it may be a private key.
    """
    if _PRIVATE_KEY.search(text):
        raise StoreError("This is a private key. Give the public one: its file ends in .pub.")
    lines = [line.strip() for line in re.split("\r\n|\r|\n", text)]
    numbered = [(at, line) for at, line in enumerate(lines, 1) if line and line[0] != "#"]
    if not numbered:
        raise StoreError("There is no key in it.")
    return [_parse_public_key(at, line) for at, line in numbered]


def _parse_public_key(at: int, line: str) -> KeyLine:
    try:
        key = parse_key_line(line)
        if key.options.names:
            raise ValueError(
                f"the embedded engine cannot keep the option {', '.join(key.options.names)} yet, "
                "so the key was not added: leave the option out"
            )
        # Into authorized_keys files of other proxies, too: there a line break would be an entry.
        if not key.comment.isprintable():
            raise ValueError("its comment has control characters")
        public = load_ssh_public_key(f"{key.type} {str(key).split()[1]}".encode())
        if isinstance(public, rsa.RSAPublicKey) and public.key_size not in RSA_BITS:
            raise ValueError(
                f"an RSA key needs {RSA_BITS[0]} to {RSA_BITS[-1]} bits, "
                f"and this one has {public.key_size}"
            )
    except UnsupportedAlgorithm:
        raise StoreError(f"Line {at}: the key's type is not accepted.") from None
    except ValueError as error:
        raise StoreError(f"Line {at}: {error}.") from None
    return key


def _quoted(text: str) -> str:
    return f"'{printable(text, 80)}'"


def _user_id(connection: Connection, name: str) -> str:
    row = connection.execute(select(users.c.id).where(users.c.name == name)).first()
    if row is None:
        if name.startswith("@"):
            raise StoreError("Groups do not exist yet: name a user.")
        cure = f": add it with `vmconsole user add {name}`" if _USER_NAME.fullmatch(name) else ""
        raise StoreError(f"There is no user {_quoted(name)}{cure}.")
    return str(row[0])


def _keys(connection: Connection, user_id: str | None = None) -> list[KeyRecord]:
    query = (
        select(
            keys.c.fingerprint,
            keys.c.user_id,
            users.c.name,
            keys.c.type,
            keys.c.blob,
            keys.c.comment,
            keys.c.created,
        )
        .join(users)
        .order_by(users.c.name, keys.c.created, keys.c.fingerprint)
    )
    if user_id is not None:
        query = query.where(keys.c.user_id == user_id)
    return [KeyRecord(*row) for row in connection.execute(query)]


def _refuse_duplicate(connection: Connection, key: KeyRecord) -> None:
    query = select(users.c.name).join_from(keys, users).where(keys.c.fingerprint == key.fingerprint)
    row = connection.execute(query).first()
    if row is not None:
        raise StoreError(f"User {_quoted(row[0])} has the key {key.fingerprint} already.")


def _hosts(connection: Connection) -> list[HostRecord]:
    query = select(hosts.c.name, hosts.c.uri).order_by(hosts.c.name)
    return [HostRecord(*row) for row in connection.execute(query)]


def _grants(connection: Connection) -> list[GrantRecord]:
    query = (
        select(grants.c.user_id, users.c.name, grants.c.pattern, grants.c.role, grants.c.created)
        .join(users)
        .order_by(users.c.name, grants.c.pattern)
    )
    return [GrantRecord(*row) for row in connection.execute(query)]


def _delete_grant(connection: Connection, user_id: str, pattern: str) -> bool:
    statement = delete(grants).where(grants.c.user_id == user_id, grants.c.pattern == pattern)
    return connection.execute(statement).rowcount > 0
