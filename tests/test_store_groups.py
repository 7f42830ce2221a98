"""Groups, grants, and what comes of both: what a user may open. On both databases."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import make_url

from tests.store_kit import SECONDS, OnPostgres, StoreTestCase
from tests.test_store import NO_NAMES, SORTED
from vmconsole.engine.embedded.records import Access, GrantRecord

# Each is a pattern of its own: to no database and to no message do they mean anything else.
PATTERNS = [
    *(
        "%",
        "_",
        "*",
        "?",
        "[a-z]",
        "web%",
        "web_",
        "web*",
        "WEB*",
        "'",
        '"',
        "\\",
        "\\%",
        "a'b",
        "--",
    ),
    *(
        "%s",
        "%(x)s",
        "{}",
        "{0}",
        ":x",
        "a:b",
        "a b",
        " ",
        "-x",
        "@x",
        "ä",
        "a\u0301",
        "日本",
        "\U0001f600",
    ),
    *("x" * 255, "ü" * 255),
]
NO_PATTERNS = ["", "a\n", "\x1b", "\0", "a\0", "\ud800", "\u202e", "\u2028", "x" * 256]


class GroupTests(StoreTestCase):
    """Groups and their members."""

    def setUp(self) -> None:
        super().setUp()
        for name in ("bob", "Carol", "alice"):
            self.store.add_user(name)

    def members(self) -> dict[str, Sequence[str]]:
        """Who is in which group."""
        return {group.name: group.members for group in self.store.groups()}

    def test_added_listed_removed(self) -> None:
        """Groups are listed by name with their members' names, sorted by code points."""
        ops = self.store.add_group("ops")
        self.assertEqual((ops.name, ops.members, ops.created), ("ops", (), SECONDS))
        self.store.add_group("Dev")
        for group, user in (("ops", "bob"), ("ops", "alice"), ("ops", "Carol"), ("Dev", "bob")):
            with self.grows(all=1, access=1):
                self.store.add_member(group, user)
        self.assertEqual(self.members(), {"Dev": ("bob",), "ops": ("Carol", "alice", "bob")})
        self.assertEqual([group.name for group in self.store.groups()], ["Dev", "ops"])
        self.assertEqual(self.store.groups()[1].id, ops.id)
        self.store.remove_member("ops", "alice")
        self.assertEqual(self.members(), {"Dev": ("bob",), "ops": ("Carol", "bob")})
        self.store.remove_group("ops")
        self.assertEqual(self.members(), {"Dev": ("bob",)})
        self.assertEqual(len(self.store.users()), 3)
        self.assertNotEqual(self.store.add_group("ops").id, ops.id)
        self.assertEqual(self.members(), {"Dev": ("bob",), "ops": ()})

    def test_order(self) -> None:
        """It is that of the code points, in every database."""
        for name in reversed(SORTED):
            self.store.add_group(name)
        self.assertEqual([group.name for group in self.store.groups()], SORTED)

    def test_refused(self) -> None:
        """A group that is there already, and names that would hurt elsewhere."""
        self.store.add_group("ops")
        with self.unchanged():
            with self.refused("There is a group 'ops' already."):
                self.store.add_group("ops")
            for name in NO_NAMES:
                with self.refused("no name for a group"):
                    self.store.add_group(name)

    def test_unknown(self) -> None:
        """An unknown group is an error that says how to add one."""
        with self.unchanged():
            for call in (
                lambda name: self.store.remove_group(name),
                lambda name: self.store.add_member(name, "alice"),
                lambda name: self.store.remove_member(name, "alice"),
                lambda name: self.store.grant(f"@{name}", "*"),
                lambda name: self.store.revoke(f"@{name}", "*"),
            ):
                with self.refused("no group 'ops': add it with `vmconsole group add ops`"):
                    call("ops")
                for name in (*NO_NAMES, "alice"):
                    with self.refused("There is no group "):
                        call(name)

    def test_members_refused(self) -> None:
        """Who is a member already, or is none, or is no user, or a group."""
        self.store.add_group("ops")
        self.store.add_group("bob")
        self.store.add_member("ops", "alice")
        with self.unchanged():
            with self.refused("User 'alice' is in group 'ops' already."):
                self.store.add_member("ops", "alice")
            with self.refused("User 'bob' is not in group 'ops'", "vmconsole group list"):
                self.store.remove_member("ops", "bob")
            with self.refused("User 'alice' is not in group 'bob'"):
                self.store.remove_member("bob", "alice")
            for user in ("ops", "@ops", "@bob"):
                with self.refused("no user"):
                    self.store.add_member("ops", user)

    def test_removed_with_grants(self) -> None:
        """A group's grants and memberships go with it; who comes after it has none of them."""
        for name in ("ops", "dev"):
            self.store.add_group(name)
            self.store.add_member(name, "alice")
            self.store.grant(f"@{name}", "*")
        self.store.grant("alice", "*")
        with self.grows(all=1, access=1):
            self.store.remove_group("ops")
        self.store.add_group("ops")
        self.assertEqual([grant.subject for grant in self.store.grants()], ["@dev", "alice"])
        self.assertEqual(self.members(), {"dev": ("alice",), "ops": ()})


class GrantTests(StoreTestCase):
    """Grants to users and groups."""

    def setUp(self) -> None:
        super().setUp()
        self.alice = self.store.add_user("alice")
        self.store.add_user("ops")
        self.store.add_group("ops")

    def told(self) -> list[tuple[str, str, str]]:
        """The grants, without their times."""
        return [(each.subject, each.pattern, each.role) for each in self.store.grants()]

    def test_granted_listed_revoked(self) -> None:
        """A grant is there once, however often it is given, and revoked as it was given."""
        for pattern in ("web*", "*", "web*"):
            with self.grows(all=1, access=1):
                given = self.store.grant("alice", pattern)
            self.assertEqual(given, GrantRecord("alice", pattern, "operator", SECONDS))
        self.assertEqual(self.told(), [("alice", "*", "operator"), ("alice", "web*", "operator")])
        with self.grows(all=1, access=1):
            self.store.revoke("alice", "*")
        with self.unchanged(), self.refused("'alice' has no grant '*'", "vmconsole grants"):
            self.store.revoke("alice", "*")
        self.assertEqual(self.told(), [("alice", "web*", "operator")])

    def test_role(self) -> None:
        """To grant again changes the role, and that of nobody else."""
        self.store.grant("ops", "web*", "viewer")
        self.store.grant("@ops", "web*", "viewer")
        self.store.grant("alice", "web*", "viewer")
        self.store.grant("alice", "web*", "operator")
        self.assertEqual(
            self.told(),
            [("@ops", "web*", "viewer"), ("alice", "web*", "operator"), ("ops", "web*", "viewer")],
        )
        self.store.grant("@ops", "web*")
        self.store.grant("alice", "web*", "viewer")
        self.assertEqual(
            self.told(),
            [("@ops", "web*", "operator"), ("alice", "web*", "viewer"), ("ops", "web*", "viewer")],
        )

    def test_user_and_group_of_one_name(self) -> None:
        """They are two: what one has is not the other's, nor is it revoked with it."""
        user = next(each.id for each in self.store.users() if each.name == "ops")
        self.store.grant("@ops", "a")
        self.store.grant("ops", "b")
        self.assertEqual([rule.pattern for rule in self.rules(user)], ["b"])
        with self.refused("'@ops' has no grant 'b'"):
            self.store.revoke("@ops", "b")
        with self.refused("'ops' has no grant 'a'"):
            self.store.revoke("ops", "a")
        self.store.remove_user("ops")
        self.assertEqual(self.told(), [("@ops", "a", "operator")])
        self.store.remove_group("ops")
        self.assertEqual(self.told(), [])

    def rules(self, user: str) -> Sequence[object]:
        """What the user with this id may open."""
        access = self.store.access(user)
        assert access is not None
        return access.rules

    def test_patterns(self) -> None:
        """Every pattern is kept and revoked as it was given, and stands for itself alone."""
        for pattern in PATTERNS:
            for subject in ("alice", "@ops"):
                self.store.grant(subject, pattern)
        expected = [(name, each) for name in ("@ops", "alice") for each in sorted(PATTERNS)]
        self.assertEqual([told[:2] for told in self.told()], expected)
        self.assertEqual([rule.pattern for rule in self.rules(self.alice.id)], sorted(PATTERNS))
        for pattern in PATTERNS:
            self.store.revoke("alice", pattern)
            expected.remove(("alice", pattern))
            self.assertEqual([told[:2] for told in self.told()], expected)

    def test_refused(self) -> None:
        """Patterns that are none, which nobody can have either."""
        self.store.grant("alice", "*")
        with self.unchanged():
            for subject in ("alice", "@ops"):
                for pattern in NO_PATTERNS:
                    with self.refused("no VM"):
                        self.store.grant(subject, pattern)
                    with self.refused("has no grant"):
                        self.store.revoke(subject, pattern)


class AccessTests(StoreTestCase):
    """What a user may open."""

    def setUp(self) -> None:
        super().setUp()
        self.alice = self.store.add_user("alice").id
        self.bob = self.store.add_user("bob").id
        self.store.add_group("ops")
        self.store.add_group("dev")

    def rules(self, user: str) -> list[tuple[str, str]]:
        """Their rules; the revision is the present one."""
        access = self.store.access(user)
        assert access is not None
        self.assertEqual(access.revision, self.store.revisions().access)
        return [(rule.pattern, rule.role) for rule in access.rules]

    def test_own_and_of_groups(self) -> None:
        """It is one's own grants, and those of one's groups: each once, in a stable order."""
        self.assertEqual(self.rules(self.alice), [])
        self.store.grant("alice", "web*")
        self.store.grant("@ops", "web*")
        self.store.grant("@ops", "db1", "viewer")
        self.store.grant("@dev", "db1")
        self.store.grant("@dev", "B")
        self.assertEqual(self.rules(self.alice), [("web*", "operator")])
        self.store.add_member("ops", "alice")
        self.assertEqual(self.rules(self.alice), [("db1", "viewer"), ("web*", "operator")])
        self.store.add_member("dev", "alice")
        both = [("B", "operator"), ("db1", "operator"), ("db1", "viewer"), ("web*", "operator")]
        self.assertEqual(self.rules(self.alice), both)
        self.assertEqual(self.rules(self.bob), [])
        self.store.remove_member("ops", "alice")
        self.assertEqual(
            self.rules(self.alice), [("B", "operator"), ("db1", "operator"), ("web*", "operator")]
        )
        self.store.remove_group("dev")
        self.store.revoke("alice", "web*")
        self.assertEqual(self.rules(self.alice), [])

    def test_nobody(self) -> None:
        """Who is no user has no access, which is not the same as an empty one."""
        for id in ("", "alice", "x" * 300, "\0", "a\0", "\ud800", "' OR 1=1 --", "%"):
            self.assertIsNone(self.store.access(id))
        self.store.remove_user("alice")
        self.assertIsNone(self.store.access(self.alice))

    def test_known(self) -> None:
        """What is known comes back as it is until somebody's access changes, and only then."""
        self.store.grant("alice", "*")
        known = self.store.access(self.alice)
        self.assertIs(self.store.access(self.alice, known), known)
        other = self.another()
        other.add_host("node1")
        self.assertIs(self.store.access(self.alice, known), known)
        other.grant("bob", "*")
        again = self.store.access(self.alice, known)
        assert known is not None and again is not None
        self.assertEqual(again, Access(known.revision + 1, known.rules))
        other.remove_user("alice")
        self.assertIsNone(self.store.access(self.alice, again))


class PostgresGroupTests(OnPostgres, GroupTests):
    """On PostgreSQL."""


class PostgresGrantTests(OnPostgres, GrantTests):
    """On PostgreSQL."""


class PostgresAccessTests(OnPostgres, AccessTests):
    """On PostgreSQL."""

    def test_order(self) -> None:
        """The order is ours, and not a gift of how the server puts both kinds together."""
        name = make_url(self.url).database
        self.server.sql(f"ALTER DATABASE {name} SET enable_sort = off")
        store = self.another()
        for number in range(40):
            store.grant("alice", f"vm{number}")
        access = store.access(self.alice)
        assert access is not None
        patterns = [rule.pattern for rule in access.rules]
        self.assertEqual(patterns, sorted(f"vm{number}" for number in range(40)))
