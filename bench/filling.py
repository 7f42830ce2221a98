"""A large site in the embedded engine's database, which no command would fill in time."""

from __future__ import annotations

import hashlib
import struct
from base64 import b64encode
from collections.abc import Iterator
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import create_engine, insert, update

from vmconsole.engine.embedded.schema import grants, hosts, keys, meta, users
from vmconsole.engine.embedded.store import Store
from vmconsole.interfaces import Domain, DomainState

KEYS = 100_000
VMS = 10_000
HOSTS = 100
_PER_HOST = VMS // HOSTS
_TYPE = "ssh-ed25519"


class User(NamedTuple):
    """One of the users; each has a key, and a grant."""

    number: int

    @property
    def id(self) -> str:
        return str(UUID(int=self.number, version=4))

    @property
    def name(self) -> str:
        return f"user{self.number}"

    @property
    def pattern(self) -> str:
        """What its grant is for."""
        if self == ADMIN:
            return "*"
        if self == TEAM:
            return "vm001??.example.com"
        return vm_name(self.number % VMS)


ADMIN = User(0)
"""May open all VMs."""
TEAM = User(1)
"""May open a hundred."""


def fill(url: str) -> None:
    """Make the database at ``url``. Raises StoreError."""
    store = Store(url)
    store.open()
    store.close()
    engine = create_engine(url)
    everybody = [User(number) for number in range(KEYS)]
    owners = [{"id": user.id, "name": user.name, "created": 1} for user in everybody]
    rights = [
        {"user_id": user.id, "pattern": user.pattern, "role": "operator", "created": 1}
        for user in everybody
    ]
    with engine.begin() as connection:
        connection.execute(insert(users), owners)
        connection.execute(insert(keys), list(_key_rows(everybody)))
        connection.execute(insert(grants), rights)
        connection.execute(insert(hosts), [{"name": name, "uri": ""} for name in host_names()])
        revisions = ("revision", "keys_revision", "access_revision", "hosts_revision")
        connection.execute(update(meta).values({name: 1 for name in revisions}))
    engine.dispose()


def host_names() -> list[str]:
    """All hosts."""
    return [f"host{number:03}.example.com" for number in range(HOSTS)]


def domains(host: str) -> list[Domain]:
    """What stands on a host."""
    first = host_names().index(host) * _PER_HOST
    return [
        Domain(str(UUID(int=number, version=4)), vm_name(number), DomainState.RUNNING)
        for number in range(first, first + _PER_HOST)
    ]


def vm_name(number: int) -> str:
    """The name of a VM."""
    return f"vm{number:05}.example.com"


def key_line(text: str) -> str:
    """A public key that ``text`` stands for, and that nobody has."""
    return f"{_TYPE} {b64encode(_blob(text)).decode()} {text}@laptop"


def _key_rows(everybody: list[User]) -> Iterator[dict[str, Any]]:
    for user in everybody:
        blob = _blob(user.name)
        digest = b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")
        yield {
            "fingerprint": f"SHA256:{digest}",
            "user_id": user.id,
            "type": _TYPE,
            "blob": blob,
            "comment": f"{user.name}@laptop",
            "created": 1,
            "options": "",
        }


def _blob(text: str) -> bytes:
    fields = (_TYPE.encode(), hashlib.sha256(text.encode()).digest())
    return b"".join(struct.pack(">I", len(field)) + field for field in fields)
