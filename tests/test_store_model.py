"""Both databases, and a simple model of them, do the same, whatever is asked of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as some
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from twisted.trial.unittest import SynchronousTestCase

from tests import postgres
from tests.store_kit import SECONDS, ed25519_line
from vmconsole.engine.embedded.store import Store
from vmconsole.errors import StoreError
from vmconsole.interfaces import Role
from vmconsole.keyoptions import parse_key_options
from vmconsole.publickeys import fingerprint

_TABLES = ("users", "groups", "members", "keys", "hosts", "grants", "changes")

# Few, so that they meet; some of them are no names.
NAMES = some.sampled_from(["a", "B", "_", "a.", "é", "@a", "", "a\0", "\ud800", "x" * 64, "%", "'"])
PATTERNS = some.sampled_from(["*", "a", "B", "%", "\\", "'", "é", "", "a\n", "\0", "\ud800"])
SUBJECTS = some.one_of(NAMES, NAMES.map("@{}".format))
ROLES = some.sampled_from(["operator", "viewer"])
OPTIONS = some.sampled_from(["", "restrict", 'from="10.0.0.0/8"', 'expiry-time="20300101Z"', "pty"])
URIS = some.sampled_from(["", "qemu:///system", "a b", "é"])
NUMBERS = some.lists(some.integers(0, 3), min_size=0, max_size=3)


class Refused(Exception):
    """By the model."""


class Model:
    """The store, as plain sets. Ids are left out."""

    def __init__(self) -> None:
        self.users: set[str] = set()
        self.groups: dict[str, set[str]] = {}
        self.keys: dict[int, tuple[str, str]] = {}
        self.hosts: dict[str, str] = {}
        self.grants: dict[tuple[str, str], str] = {}
        self.changes: list[tuple[str, str]] = []
        self.revisions = {"keys": 0, "access": 0, "hosts": 0}

    def changed(self, parts: str, action: str, subject: str) -> None:
        """Something was."""
        for part in parts.split():
            self.revisions[part] += 1
        self.changes.append((action, subject))

    @staticmethod
    def need(condition: object) -> None:
        """Raises Refused."""
        if not condition:
            raise Refused

    def is_name(self, name: str) -> bool:
        """Of those that are in NAMES."""
        return name in ("a", "B", "_", "a.", "x" * 64)

    def is_subject(self, subject: str) -> bool:
        """Whether it is a user or a group that there is."""
        there = self.groups if subject.startswith("@") else self.users
        return subject.removeprefix("@") in there

    def add_user(self, name: str) -> None:
        """As the store."""
        self.need(self.is_name(name) and name not in self.users)
        self.users.add(name)
        self.changed("access keys", "user.add", name)

    def remove_user(self, name: str) -> None:
        """As the store."""
        self.need(name in self.users)
        self.users.remove(name)
        for members in self.groups.values():
            members.discard(name)
        self.keys = {key: value for key, value in self.keys.items() if value[0] != name}
        self.grants = {key: value for key, value in self.grants.items() if key[0] != name}
        self.changed("access keys", "user.remove", name)

    def add_group(self, name: str) -> None:
        """As the store."""
        self.need(self.is_name(name) and name not in self.groups)
        self.groups[name] = set()
        self.changed("access", "group.add", f"@{name}")

    def remove_group(self, name: str) -> None:
        """As the store."""
        self.need(name in self.groups)
        del self.groups[name]
        self.grants = {key: value for key, value in self.grants.items() if key[0] != f"@{name}"}
        self.changed("access", "group.remove", f"@{name}")

    def add_member(self, group: str, user: str) -> None:
        """As the store."""
        self.need(group in self.groups and user in self.users and user not in self.groups[group])
        self.groups[group].add(user)
        self.changed("access", "member.add", f"@{group} {user}")

    def remove_member(self, group: str, user: str) -> None:
        """As the store."""
        self.need(group in self.groups and user in self.groups[group])
        self.groups[group].remove(user)
        self.changed("access", "member.remove", f"@{group} {user}")

    def add_keys(self, user: str, numbers: list[int], options: str) -> None:
        """As the store, with a key for each number."""
        self.need(numbers and options != "pty" and user in self.users)
        self.need(len(set(numbers)) == len(numbers) and not set(numbers) & set(self.keys))
        kept = str(parse_key_options(options)) if options else ""
        self.keys.update((number, (user, kept)) for number in numbers)
        prints = " ".join(map(_fingerprint, numbers))
        self.changed("keys", "key.add", f"{user} {prints}")

    def remove_key(self, number: int) -> None:
        """As the store."""
        self.need(number in self.keys)
        user, _ = self.keys.pop(number)
        self.changed("keys", "key.remove", f"{user} {_fingerprint(number)}")

    def add_host(self, name: str, uri: str) -> None:
        """As the store."""
        self.need(self.is_name(name) and name not in self.hosts)
        self.need(uri in ("", "qemu:///system"))
        self.hosts[name] = uri
        self.changed("hosts", "host.add", f"{name} {uri}".rstrip())

    def remove_host(self, name: str) -> None:
        """As the store."""
        self.need(name in self.hosts)
        del self.hosts[name]
        self.changed("hosts", "host.remove", name)

    def grant(self, subject: str, pattern: str, role: Role) -> None:
        """As the store."""
        self.need(pattern and pattern.isprintable() and self.is_subject(subject))
        self.grants[subject, pattern] = role
        self.changed("access", "grant", f"{subject} {pattern} {role}")

    def revoke(self, subject: str, pattern: str) -> None:
        """As the store."""
        self.need(self.is_subject(subject) and (subject, pattern) in self.grants)
        del self.grants[subject, pattern]
        self.changed("access", "revoke", f"{subject} {pattern}")

    def contents(self) -> list[Any]:
        """All of it, as ``contents_of`` has it."""
        access = []
        for user in sorted(self.users):
            mine = {user} | {f"@{name}" for name in self.groups if user in self.groups[name]}
            rules = {(key[1], role) for key, role in self.grants.items() if key[0] in mine}
            access.append((user, sorted(rules)))
        keys = [(*value, _fingerprint(number)) for number, value in self.keys.items()]
        return [
            sorted(self.users),
            [(name, tuple(sorted(self.groups[name]))) for name in sorted(self.groups)],
            sorted((user, print, options) for user, options, print in keys),
            sorted(self.hosts.items()),
            sorted((*key, role) for key, role in self.grants.items()),
            self.changes,
            (len(self.changes), *self.revisions.values()),
            access,
        ]


def contents_of(store: Store) -> list[Any]:
    """What a store tells, without ids."""
    access = []
    for user in store.users():
        allowed = store.access(user.id)
        assert allowed is not None
        access.append((user.name, [(rule.pattern, rule.role) for rule in allowed.rules]))
    revisions = store.revisions()
    return [
        [user.name for user in store.users()],
        [(group.name, tuple(group.members)) for group in store.groups()],
        [(key.user, key.fingerprint, key.options) for key in store.keys()],
        [(host.name, host.uri) for host in store.hosts()],
        [(grant.subject, grant.pattern, grant.role) for grant in store.grants()],
        [(change.action, change.subject) for change in store.last_changes()],
        (revisions.all, revisions.keys, revisions.access, revisions.hosts),
        access,
    ]


class Comparison(RuleBasedStateMachine):
    """The same is asked of all of them."""

    stores: tuple[Store, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.model = Model()
        for store in self.stores:
            with store._database._transaction(write=True) as connection:
                for table in reversed(_TABLES):
                    connection.exec_driver_sql(f"DELETE FROM {table}")
                parts = ("all", "keys", "access", "hosts")
                zeros = ", ".join(f"{part}_revision = 0" for part in parts)
                connection.exec_driver_sql(f"UPDATE meta SET {zeros}")

    def ask(self, model: Callable[[], None], store: Callable[[Store], object]) -> None:
        """Each of them does it, or each refuses it, in the same words."""
        try:
            model()
            expected = False
        except Refused:
            expected = True
        texts = []
        for each in self.stores:
            try:
                store(each)
            except StoreError as error:
                texts.append(str(error))
                assert str(error).isprintable(), repr(error)
                assert "The database" not in str(error), error
        assert len(texts) == len(self.stores) * expected, (expected, texts)
        assert len(set(texts)) <= 1, texts

    @rule(name=NAMES)
    def add_user(self, name: str) -> None:
        """A user."""
        self.ask(lambda: self.model.add_user(name), lambda store: store.add_user(name))

    @precondition(lambda self: len(self.model.users) > 2)
    @rule(name=NAMES)
    def remove_user(self, name: str) -> None:
        """No user."""
        self.ask(lambda: self.model.remove_user(name), lambda store: store.remove_user(name))

    @rule(name=NAMES)
    def add_group(self, name: str) -> None:
        """A group."""
        self.ask(lambda: self.model.add_group(name), lambda store: store.add_group(name))

    @precondition(lambda self: len(self.model.groups) > 1)
    @rule(name=NAMES)
    def remove_group(self, name: str) -> None:
        """No group."""
        self.ask(lambda: self.model.remove_group(name), lambda store: store.remove_group(name))

    @rule(group=NAMES, user=NAMES)
    def add_member(self, group: str, user: str) -> None:
        """A member."""
        self.ask(
            lambda: self.model.add_member(group, user), lambda store: store.add_member(group, user)
        )

    @rule(group=NAMES, user=NAMES)
    def remove_member(self, group: str, user: str) -> None:
        """No member."""
        self.ask(
            lambda: self.model.remove_member(group, user),
            lambda store: store.remove_member(group, user),
        )

    @rule(user=NAMES, numbers=NUMBERS, options=OPTIONS)
    def add_keys(self, user: str, numbers: list[int], options: str) -> None:
        """Keys."""
        text = "\n".join(f"{options} {ed25519_line(number)}" for number in numbers)
        self.ask(
            lambda: self.model.add_keys(user, numbers, options),
            lambda store: store.add_keys(user, text),
        )

    @rule(number=some.integers(0, 3))
    def remove_key(self, number: int) -> None:
        """No key."""
        name = _fingerprint(number)
        self.ask(lambda: self.model.remove_key(number), lambda store: store.remove_key(name))

    @rule(name=NAMES, uri=URIS)
    def add_host(self, name: str, uri: str) -> None:
        """A host."""
        self.ask(lambda: self.model.add_host(name, uri), lambda store: store.add_host(name, uri))

    @rule(name=NAMES)
    def remove_host(self, name: str) -> None:
        """No host."""
        self.ask(lambda: self.model.remove_host(name), lambda store: store.remove_host(name))

    @rule(subject=SUBJECTS, pattern=PATTERNS, role=ROLES)
    def grant(self, subject: str, pattern: str, role: Role) -> None:
        """A grant."""
        self.ask(
            lambda: self.model.grant(subject, pattern, role),
            lambda store: store.grant(subject, pattern, role),
        )

    @rule(subject=SUBJECTS, pattern=PATTERNS)
    def revoke(self, subject: str, pattern: str) -> None:
        """No grant."""
        self.ask(
            lambda: self.model.revoke(subject, pattern),
            lambda store: store.revoke(subject, pattern),
        )

    @invariant()
    def counted(self) -> None:
        """Each change has bumped what it is about, and has its record."""
        expected = (len(self.model.changes), *self.model.revisions.values())
        for store in self.stores:
            found = store.revisions()
            assert (found.all, found.keys, found.access, found.hosts) == expected
            last = [(change.action, change.subject) for change in store.last_changes(1)]
            assert last == self.model.changes[-1:]

    def teardown(self) -> None:
        """All have the same in them."""
        expected = self.model.contents()
        for store in self.stores:
            assert contents_of(store) == expected, store


def _fingerprint(number: int) -> str:
    from vmconsole.engine.keyline import parse_key_line

    return fingerprint(parse_key_line(ed25519_line(number)).blob)


class ModelTests(SynchronousTestCase):
    """Whatever is asked."""

    def test_same(self) -> None:
        """Results, refusals and what is there in the end are the same for all of them."""
        directory = TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        urls = [f"sqlite:///{Path(directory.name) / 'engine.db'}"]
        if not postgres.missing():
            server = postgres.get()
            urls.append(server.database())
            self.addCleanup(server.drop, urls[1])

        class Machine(Comparison):
            stores = tuple(Store(url, lambda: SECONDS, step=lambda: 1) for url in urls)

        for store in Machine.stores:
            self.addCleanup(store.close)
            store.open()
        Machine.TestCase.settings = settings(
            max_examples=int(os.environ.get("VMCONSOLE_TEST_EXAMPLES") or 25),
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )
        Machine.TestCase("runTest").runTest()
