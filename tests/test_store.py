"""What the embedded engine's store offers, on both of its databases: users, hosts, changes.

Its keys are in test_keyfile.py, groups and grants in test_store_groups.py.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from sqlalchemy import make_url
from twisted.trial.unittest import SynchronousTestCase

from tests.engine_kit import public_line
from tests.store_kit import SECONDS, OnPostgres, StoreTestCase, at_once, contents, ed25519_line
from vmconsole.engine.embedded.keypair import generate_key_pair
from vmconsole.engine.embedded.records import ChangeRecord, Revisions
from vmconsole.errors import StoreError

# By code points: digits, capitals, the underscore, small letters. Other orders mix the letters.
SORTED = ["0x", "9", "A.b", "B", "Z-z", "_x", "a", "a-", "a.", "a0", "aA", "aa", "b", "z" * 64]
# What no user and no group can be called.
NO_NAMES = [
    *("", " ", "a b", "-a", ".a", "a@b", "@ops", "@", "a/b", "a\n", "\na", "a" * 65, "ä", "\uff41"),
    *("a\0", "\0", "\ud800", "a\udcff", "\x1b[2J", "'", "a'--", '"', "%", "a%s", "\\", "a\\", "(x"),
    *("a:b", "a=b", "{0}", "%(x)s", "\u202e", "a\u0301", "\u00a0"),
]


class UserTests(StoreTestCase):
    """Users."""

    def test_added_listed_removed(self) -> None:
        """Users are listed by name, each with an id of its own, also when it comes again."""
        bob, alice = self.store.add_user("bob"), self.store.add_user("alice")
        self.assertEqual(self.store.users(), [alice, bob])
        self.assertEqual((alice.name, alice.created), ("alice", SECONDS))
        self.store.remove_user("alice")
        self.assertEqual(self.store.users(), [bob])
        self.assertNotEqual(self.store.add_user("alice").id, alice.id)

    def test_order(self) -> None:
        """It is that of the code points, in every database."""
        for name in reversed(SORTED):
            self.store.add_user(name)
        self.assertEqual([user.name for user in self.store.users()], SORTED)

    def test_case(self) -> None:
        """Names that differ by case are two."""
        self.store.add_user("alice")
        self.store.add_user("Alice")
        self.store.remove_user("alice")
        self.assertEqual([user.name for user in self.store.users()], ["Alice"])

    def test_refused(self) -> None:
        """A name that is there already, and names that would hurt elsewhere, leave no trace."""
        self.store.add_user("alice")
        with self.unchanged():
            with self.refused("There is a user 'alice' already."):
                self.store.add_user("alice")
            for name in NO_NAMES:
                with self.refused("no name for a user"):
                    self.store.add_user(name)

    def test_unknown(self) -> None:
        """An unknown user is an error that says how to add one, if it can be."""
        self.store.add_group("staff")
        for call in (
            lambda name: self.store.remove_user(name),
            lambda name: self.store.keys(name),
            lambda name: self.store.add_keys(name, public_line("alice")),
            lambda name: self.store.grant(name, "*"),
            lambda name: self.store.revoke(name, "*"),
            lambda name: self.store.add_member("staff", name),
            lambda name: self.store.remove_member("staff", name),
        ):
            with self.unchanged():
                with self.refused("no user 'alice': add it with `vmconsole user add alice`"):
                    call("alice")
                for name in NO_NAMES:
                    # For grants, these are groups.
                    with self.refused("There is no "):
                        call(name)
        with self.refused("no user '\\x1b'") as _:
            self.store.keys("\x1b")
        with self.refused("no user '-x'."):
            self.store.keys("-x")

    def test_removed_with_all(self) -> None:
        """Keys, grants and memberships go with a user; those of others stay."""
        for number, name in enumerate(("alice", "bob")):
            self.store.add_user(name)
            self.store.add_keys(name, ed25519_line(number))
            self.store.grant(name, "web*")
        self.store.add_group("ops")
        self.store.grant("@ops", "*")
        self.store.add_member("ops", "alice")
        self.store.add_member("ops", "bob")
        with self.grows(all=1, access=1, keys=1):
            self.store.remove_user("alice")
        self.store.add_user("alice")
        self.assertEqual([key.user for key in self.store.keys()], ["bob"])
        self.assertEqual([grant.subject for grant in self.store.grants()], ["@ops", "bob"])
        self.assertEqual([group.members for group in self.store.groups()], [("bob",)])
        self.store.add_keys("alice", ed25519_line(0))


class HostTests(StoreTestCase):
    """Hosts."""

    def test_added_listed_removed(self) -> None:
        """Hosts are listed by name; the URI may be left to the configuration."""
        for name, uri in (("node2.example.com", ""), ("node1", "qemu:///system"), ("fe80::1", "")):
            with self.grows(all=1, hosts=1):
                host = self.store.add_host(name, uri)
            self.assertEqual((host.name, host.uri), (name, uri))
        self.store.add_host("Node3")
        self.assertEqual(
            [(host.name, host.uri) for host in self.store.hosts()],
            [
                ("Node3", ""),
                ("fe80::1", ""),
                ("node1", "qemu:///system"),
                ("node2.example.com", ""),
            ],
        )
        self.assertEqual(self.store.host_uris()["node1"], "qemu:///system")
        self.assertEqual(len(self.store.host_uris()), 4)
        with self.grows(all=1, hosts=1):
            self.store.remove_host("node1")
        with self.unchanged(), self.refused("no host 'node1'", "vmconsole host list"):
            self.store.remove_host("node1")

    def test_refused(self) -> None:
        """A host that is there, and names and URIs that are none."""
        self.store.add_host("node1")
        self.store.add_host("x" * 253, "x" * 1024)
        with self.unchanged():
            with self.refused("already", "vmconsole host remove node1"):
                self.store.add_host("node1", "qemu:///system")
            for name in ("", "-x", ".x", "a/b", "a b", "a\n", "a?b", "a@b", "x" * 254, "\0", "%"):
                with self.refused("no host name"):
                    self.store.add_host(name)
                with self.refused("There is no host"):
                    self.store.remove_host(name)
            for uri in ("a b", "a\n", "ä", "x" * 1025, "\0", "\ud800"):
                with self.refused("no URI"):
                    self.store.add_host("node2", uri)
            with self.refused("There is no host"):
                self.store.remove_host("\ud800")


class ChangeTests(StoreTestCase):
    """The record of changes, and the revisions."""

    def told(self) -> Sequence[tuple[str, str]]:
        """What happened to whom, in order."""
        return [(change.action, change.subject) for change in self.store.last_changes()]

    def test_each_leaves_one(self) -> None:
        """Every change leaves one record, with its time and actor, and its part's revision."""
        self.assertEqual(self.store.last_changes(), [])
        store, key = self.store, ed25519_line(1, "alice@home")
        steps = (
            (lambda: store.add_user("alice"), "access keys", "user.add", "alice"),
            (lambda: store.add_keys("alice", key), "keys", "key.add", "alice FINGERPRINT"),
            (lambda: store.add_group("ops"), "access", "group.add", "@ops"),
            (lambda: store.add_member("ops", "alice"), "access", "member.add", "@ops alice"),
            (lambda: store.grant("alice", "a b"), "access", "grant", "alice a b operator"),
            (lambda: store.grant("@ops", "*", "viewer"), "access", "grant", "@ops * viewer"),
            (lambda: store.grant("@ops", "*", "viewer"), "access", "grant", "@ops * viewer"),
            (lambda: store.add_host("n1"), "hosts", "host.add", "n1"),
            (lambda: store.add_host("n2", "test:///"), "hosts", "host.add", "n2 test:///"),
            (lambda: store.remove_host("n2"), "hosts", "host.remove", "n2"),
            (lambda: store.revoke("@ops", "*"), "access", "revoke", "@ops *"),
            (lambda: store.revoke("alice", "a b"), "access", "revoke", "alice a b"),
            (lambda: store.remove_member("ops", "alice"), "access", "member.remove", "@ops alice"),
            (lambda: store.remove_group("ops"), "access", "group.remove", "@ops"),
            (
                lambda: store.remove_key(store.keys()[0].fingerprint),
                *("keys", "key.remove", "alice FINGERPRINT"),
            ),
            (lambda: store.remove_user("alice"), "access keys", "user.remove", "alice"),
        )
        fingerprint = ""
        for at, (step, parts, action, subject) in enumerate(steps, 1):
            before = store.revisions()
            step()
            bumped = {part: getattr(before, part) + 1 for part in parts.split()}
            kept = {part: getattr(before, part) for part in ("keys", "access", "hosts")}
            self.assertEqual(store.revisions(), Revisions(before.all + 1, **{**kept, **bumped}))
            fingerprint = store.keys()[0].fingerprint if at == 2 else fingerprint
            changes = store.last_changes()
            self.assertEqual(len(changes), at)
            self.assertEqual(changes[-1].action, action)
            self.assertEqual(changes[-1].subject, subject.replace("FINGERPRINT", fingerprint))
            self.assertEqual((changes[-1].time, changes[-1].actor), (SECONDS, "vmconsole"))

    def test_order(self) -> None:
        """Changes come in their order, from a given one on, or the last ones."""
        for number in range(12):
            self.store.add_user(f"u{number}")
        changes = self.store.last_changes()
        self.assertEqual([change.subject for change in changes], [f"u{at}" for at in range(12)])
        self.assertEqual(len({change.id for change in changes}), 12)
        self.assertEqual(self.store.last_changes(3), changes[-3:])
        self.assertEqual(self.store.last_changes(0), [])
        self.assertEqual(self.store.last_changes(99), changes)
        self.assertEqual(self.store.changes_after(0, 2), changes[:2])
        self.assertEqual(self.store.changes_after(changes[4].id, 3), changes[5:8])
        self.assertEqual(self.store.changes_after(changes[4].id, 99), changes[5:])
        self.assertEqual(self.store.changes_after(changes[-1].id, 99), [])

    def test_actor(self) -> None:
        """Who did it is recorded, in a form that cannot forge a log line, and bounded."""
        for actor, shown in (
            ("alice", "alice"),
            ("", ""),
            ("jörg", "jörg"),
            ("a\nb\0\ud800", "a\\nb\\x00\\ud800"),
            ("x" * 255, "x" * 255),
            ("x" * 256, "x" * 255),
            ("\n" * 255, ("\\n" * 128)[:255]),
        ):
            store = self.another(actor=actor)
            before = store.last_changes()
            store.add_host(f"h{len(before)}")
            self.assertEqual(
                [change.actor for change in store.last_changes()[len(before) :]], [shown]
            )

    def test_refused_leaves_none(self) -> None:
        """What is refused, wherever in the transaction, is in no record, and bumps nothing."""
        self.store.add_user("alice")
        with self.unchanged():
            for call in (
                lambda: self.store.add_user("alice"),
                lambda: self.store.remove_user("bob"),
                lambda: self.store.add_keys("alice", f"{ed25519_line(1)}\n{ed25519_line(1)}"),
                lambda: self.store.revoke("alice", "*"),
                lambda: self.store.remove_group("ops"),
                lambda: self.store.remove_host("n1"),
            ):
                self.assertRaises(StoreError, call)

    def test_another_sees_it(self) -> None:
        """What one store wrote, another has at once: a process beside it."""
        other = self.another()
        self.store.add_user("alice")
        self.assertEqual(contents(other), contents(self.store))

    def test_kept(self) -> None:
        """What was written is there after closing and opening."""
        self.store.add_user("alice")
        before = contents(self.store)
        self.store.close()
        self.assertEqual(contents(self.another()), before)

    def test_ids_come_once(self) -> None:
        """The id of a change is never used again, also when the last ones were deleted."""
        self.store.add_user("alice")
        [change] = self.store.last_changes()
        self.query("DELETE FROM changes")
        self.store.add_user("bob")
        self.assertEqual(
            self.store.changes_after(change.id, 9),
            [ChangeRecord(change.id + 1, SECONDS, "vmconsole", "user.add", "bob")],
        )


class ConcurrentTests(StoreTestCase):
    """Several who write and read at the same time."""

    writers = 8
    each = 6

    def test_writers(self) -> None:
        """Many writers, each a store of its own: all succeed, and nothing is lost."""

        def write(number: int) -> None:
            store = self.another()
            for count in range(self.each):
                name = f"u{number}-{count}"
                store.add_user(name)
                store.add_keys(name, ed25519_line(number * 100 + count))
                store.grant(name, "*")

        with self.grows(all=144, access=96, keys=96):
            calls = [lambda number=number: write(number) for number in range(self.writers)]
            self.assertEqual(at_once(*calls), [])
        names = {f"u{number}-{count}" for number in range(8) for count in range(self.each)}
        self.assertEqual({user.name for user in self.store.users()}, names)
        self.assertEqual({key.user for key in self.store.keys()}, names)
        self.assertEqual({grant.subject for grant in self.store.grants()}, names)
        changes = self.store.last_changes()
        self.assertEqual(len(changes), 144)
        # Each writer's own are in the order in which they were made.
        for number in range(self.writers):
            mine = [each.subject for each in changes if each.subject.startswith(f"u{number}-")]
            self.assertEqual(
                [subject.split()[0] for subject in mine],
                [f"u{number}-{count}" for count in range(self.each) for _ in range(3)],
            )

    def test_one_store_in_threads(self) -> None:
        """One store that is used by several threads, as the service does."""
        calls = [lambda at=at: self.store.add_user(f"u{at}") for at in range(8)]
        self.assertEqual(at_once(*calls), [])
        self.assertEqual(len(self.store.users()), 8)

    def test_only_one_adds(self) -> None:
        """Of several who add the same, one succeeds, and the others are told that it is there."""
        stores = [self.another() for _ in range(6)]
        with self.grows(all=1, access=1, keys=1):
            errors = at_once(*[lambda store=store: store.add_user("alice") for store in stores])
        self.assertEqual({str(error) for error in errors}, {"There is a user 'alice' already."})
        self.assertEqual(len(errors), 5)

    def test_readers_see_one_moment(self) -> None:
        """A transaction does not see what is written while it reads, wherever it began."""
        other = self.another()
        self.store.add_user("alice")
        database = self.store._database
        with database.reading() as connection:
            before = database.revision(connection)
            other.add_user("bob")
            other.add_host("node1")
            self.assertEqual(database.revision(connection), before)
            self.assertEqual(database.revision(connection, "hosts"), 0)
            names = connection.exec_driver_sql("SELECT name FROM users").scalars().all()
            self.assertEqual(names, ["alice"])
        self.assertEqual(self.store.revisions().all, before + 2)
        self.assertEqual(self.store.revisions().hosts, 1)

    def test_reading_while_writing(self) -> None:
        """Who reads while others write never sees half of it: keys come with their revision."""
        self.store.add_user("alice")
        reader = self.another()
        seen: list[tuple[int, int]] = []

        def write() -> None:
            for number in range(20):
                self.store.add_keys("alice", f"{ed25519_line(number)}\n{ed25519_line(number + 50)}")

        def read() -> None:
            while not seen or seen[-1][0] < 20:
                taken: list[object] = []
                # The user took the first one.
                revision = reader.read_keys(None, taken.extend) - 1
                seen.append((revision, len(taken)))

        self.assertEqual(at_once(write, read), [])
        self.assertEqual([count for _, count in seen], [2 * revision for revision, _ in seen])


class PostgresUserTests(OnPostgres, UserTests):
    """On PostgreSQL."""


class PostgresHostTests(OnPostgres, HostTests):
    """On PostgreSQL."""


class PostgresChangeTests(OnPostgres, ChangeTests):
    """On PostgreSQL."""


class PostgresConcurrentTests(OnPostgres, ConcurrentTests):
    """On PostgreSQL."""

    def test_strict_server(self) -> None:
        """So it is also where an administrator made stricter transactions the default."""
        name = make_url(self.url).database
        for level in ("repeatable read", "serializable"):
            self.server.sql(f"ALTER DATABASE {name} SET default_transaction_isolation = '{level}'")
            stores = [self.another() for _ in range(6)]
            before = len(self.store.users())
            names = [f"u{before}-{at}" for at in range(6)]
            calls = [
                lambda store=store, name=name: store.add_user(name)
                for store, name in zip(stores, names, strict=True)
            ]
            self.assertEqual(at_once(*calls), [])
            self.assertEqual(len(self.store.users()), before + 6)
            for store in stores:
                store.close()


class KeyPairTests(SynchronousTestCase):
    """``generate_key_pair``."""

    def test_openssh_reads_it(self) -> None:
        """The private key is a file that ssh-keygen takes, and its public key is the other half."""
        for kind, bits in (("ed25519", "256"), ("rsa", "3072")):
            pair = generate_key_pair(kind)  # type: ignore[arg-type]
            path = Path(self.mktemp())
            path.touch(0o600)
            path.write_bytes(pair.private)
            for options, expected in (("-yf", pair.public), ("-lf", f"{bits} SHA256:")):
                shown = subprocess.run(
                    ["ssh-keygen", options, str(path)], capture_output=True, check=True, text=True
                ).stdout
                self.assertTrue(shown.startswith(expected), shown)
