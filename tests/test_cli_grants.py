"""``vmconsole group``, ``grant``, ``revoke``, ``grants``, ``changes``."""

from __future__ import annotations

import json
import os
import pwd
from datetime import UTC, datetime, timedelta
from unittest.mock import patch

from tests.cli_kit import CliTestCase
from vmconsole.cli import common
from vmconsole.engine.embedded.store import Store


class GroupTests(CliTestCase):
    """Groups, and who is in them."""

    def test_groups(self) -> None:
        """Added, listed with their members, removed; their members stay users."""
        self.assertIn("vmconsole group member add ops USER", self.good("group", "add", "ops"))
        self.assertIn("already", self.bad("group", "add", "ops"))
        self.assertIn("no name for a group", self.bad("group", "add", "@ops"))
        for name in ("alice", "bob"):
            self.good("user", "add", name)
            self.good("group", "member", "add", "ops", name)
        self.assertIn("already", self.bad("group", "member", "add", "ops", "bob"))
        table = self.lines("group", "list")
        self.assertEqual(table[0], ["NAME", "MEMBERS", "CREATED"])
        self.assertEqual(table[1][:3], ["ops", "alice,", "bob"])
        [group] = json.loads(self.good("group", "list", "--json"))
        self.assertEqual((group["name"], group["members"]), ("ops", ["alice", "bob"]))
        self.good("group", "member", "remove", "ops", "alice")
        self.assertIn("not in group", self.bad("group", "member", "remove", "ops", "alice"))
        [group] = json.loads(self.good("group", "list", "--json"))
        self.assertEqual(group["members"], ["bob"])
        self.good("group", "remove", "ops")
        self.assertIn("no group 'ops'", self.bad("group", "remove", "ops"))
        self.assertEqual(self.good("group", "list"), "")
        self.assertEqual(len(json.loads(self.good("user", "list", "--json"))), 2)

    def test_missing(self) -> None:
        """A user or a group who is not there is told, with the command that adds it."""
        self.good("group", "add", "ops")
        self.assertIn("vmconsole user add bob", self.bad("group", "member", "add", "ops", "bob"))
        self.assertIn("vmconsole group add qa", self.bad("group", "member", "add", "qa", "bob"))


class GrantTests(CliTestCase):
    """Who may open what."""

    def setUp(self) -> None:
        super().setUp()
        for name in ("alice", "bob"):
            self.good("user", "add", name)
        self.good("group", "add", "ops")
        self.good("group", "member", "add", "ops", "alice")

    def listed(self, *arguments: str) -> list[tuple[str, str, str]]:
        """The grants as ``grants --json`` has them."""
        return [
            (grant["subject"], grant["pattern"], grant["role"])
            for grant in json.loads(self.good("grants", "--json", *arguments))
        ]

    def test_grants(self) -> None:
        """Granted to users and groups, listed, revoked."""
        self.assertIn("web* to alice as operator", self.good("grant", "alice", "web*"))
        self.assertIn("* to @ops as viewer", self.good("grant", "@ops", "*", "--role", "viewer"))
        self.assertEqual(
            [line[:3] for line in self.lines("grants")],
            [
                ["SUBJECT", "PATTERN", "ROLE"],
                ["@ops", "*", "viewer"],
                ["alice", "web*", "operator"],
            ],
        )
        self.good("revoke", "@ops", "*")
        self.assertEqual(self.listed(), [("alice", "web*", "operator")])
        self.assertIn("no grant", self.bad("revoke", "@ops", "*"))
        self.assertIn("no user 'carol'", self.bad("grant", "carol", "*"))
        self.assertIn("vmconsole group add qa", self.bad("grant", "@qa", "*"))
        self.assertIn("no user 'ops'", self.bad("grant", "ops", "*"))

    def test_role_changes(self) -> None:
        """The same granted again has the new role; without --role that is operator."""
        self.good("grant", "alice", "web1", "--role", "viewer")
        self.assertEqual(self.listed(), [("alice", "web1", "viewer")])
        self.good("grant", "alice", "web1")
        self.assertEqual(self.listed(), [("alice", "web1", "operator")])

    def test_of_one(self) -> None:
        """Of a user it also lists what the user's groups have; of a group only its own."""
        self.good("grant", "alice", "web1")
        self.good("grant", "bob", "db1")
        self.good("grant", "@ops", "*", "--role", "viewer")
        everything, own = ("@ops", "*", "viewer"), ("alice", "web1", "operator")
        self.assertEqual(self.listed("alice"), [everything, own])
        self.assertEqual(self.listed("bob"), [("bob", "db1", "operator")])
        self.assertEqual(self.listed("@ops"), [everything])
        self.assertIn("no user 'carol'", self.bad("grants", "carol"))
        self.assertIn("no group 'qa'", self.bad("grants", "@qa"))
        self.assertIn("'\\x1b'", self.bad("grants", "\x1b"))


class ChangesTests(CliTestCase):
    """Who changed what."""

    def listed(self, *arguments: str) -> list[dict[str, str]]:
        return list(json.loads(self.good("changes", "--json", *arguments)))

    def test_changes(self) -> None:
        """Each change with its time, who made it, and what it was; what failed is none."""
        self.patch(common, "actor", lambda: "root (sudo by alice)")
        self.good("user", "add", "alice")
        self.bad("user", "add", "alice")
        self.good("grant", "alice", "web*", "--role", "viewer")
        added, granted = self.listed()
        self.assertEqual(
            (added["actor"], added["action"], added["subject"]),
            ("root (sudo by alice)", "user.add", "alice"),
        )
        self.assertEqual((granted["action"], granted["subject"]), ("grant", "alice web* viewer"))
        at = datetime.strptime(granted["time"], "%Y-%m-%dT%H:%M:%S%z")
        self.assertLess(abs(datetime.now(UTC) - at), timedelta(minutes=1))
        self.assertEqual(self.lines("changes")[0], ["TIME", "ACTOR", "ACTION", "SUBJECT"])

    def test_actor(self) -> None:
        """Who runs the command is who made the change, escaped."""
        with patch.dict(os.environ, {"SUDO_USER": "alice\n"}):
            self.good("user", "add", "alice")
        [change] = self.listed()
        login = pwd.getpwuid(os.getuid()).pw_name
        self.assertEqual(change["actor"], f"{login} (sudo by alice\\n)")

    def test_last(self) -> None:
        """The last ones, in their order: 50 unless said otherwise."""
        self.state.mkdir(mode=0o700)
        store = Store(f"sqlite:///{self.state / 'engine.db'}", actor="somebody")
        store.open()
        for number in range(60):
            store.add_user(f"user{number}")
        store.close()
        subjects = [change["subject"] for change in self.listed("--last", "2")]
        self.assertEqual(subjects, ["user58", "user59"])
        self.assertEqual(len(self.listed()), 50)
        self.assertEqual(len(self.listed("--last", "1000")), 60)
        self.assertEqual(len(self.listed("--last", str(2**31 - 1))), 60)
        for many in (str(2**31), "9" * 20):
            self.assertIn("--last", self.bad("changes", "--last", many, status=2))

    def test_escaped(self) -> None:
        """What a change is about cannot act on the terminal."""
        self.good("user", "add", "alice")
        self.good("grant", "alice", "web\u00e4\\*")
        self.assertIn("alice web\u00e4\\\\* operator", self.good("changes"))
