"""The ``vmconsole`` command, on a real database."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta

from click.testing import CliRunner
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from twisted.trial.unittest import SynchronousTestCase

from tests.cli_kit import PROCESS, ROOT, CliTestCase
from vmconsole import cli, pki
from vmconsole.cli import common
from vmconsole.config import Config, State
from vmconsole.engine.embedded.store import Store
from vmconsole.errors import StoreError


class UsageTests(CliTestCase):
    """How it is called."""

    def test_help(self) -> None:
        """Each command and group has --help; each command that works has --config."""
        for line in (
            "check",
            "user add",
            "user list",
            "user remove",
            "key add",
            "key generate",
            "key list",
            "key remove",
            "group add",
            "group list",
            "group remove",
            "group member add",
            "group member remove",
            "host add",
            "host list",
            "host remove",
            "grant",
            "revoke",
            "grants",
            "changes",
            "vm list",
            "pki init",
            "pki host",
            "pki proxy",
            "pki ticket",
        ):
            words = line.split()
            shown = self.good(*words, "--help")
            self.assertIn("--config FILE", shown)
            self.assertEqual("--json" in shown, words[-1] in ("list", "grants", "changes"), line)
            for count in range(len(words)):
                self.good(*words[:count], "--help")

    def test_bad_usage(self) -> None:
        """Exit status 2."""
        for line in (
            "frobnicate",
            "user frobnicate",
            "user add",
            "user list --frobnicate",
            "grant",
            "grant alice",
            "grant alice web1 --role owner",
            "group member add ops",
            "changes --last 0",
            "completion powershell",
            "pki host",
        ):
            self.bad(*line.split(), status=2)
        self.bad("key", "generate", "alice", "--type", "dsa", status=2)
        self.bad("key", "add", "alice", str(self.directory / "missing"), status=2)

    def test_config(self) -> None:
        """--config names the file; one that is missing or wrong is an error of one line."""
        other = self.directory / "other.toml"
        other.write_text(f'[state]\ndirectory = "{self.directory / "elsewhere"}"\n')
        self.good("user", "add", "alice", "--config", str(other))
        self.assertTrue((self.directory / "elsewhere" / "engine.db").exists())
        self.assertEqual(self.good("user", "list"), "")
        self.assertIn("missing.toml", self.bad("user", "list", "--config", "missing.toml"))
        self.configure("[engine]\nfrobnicate = 1")
        self.assertIn("frobnicate", self.bad("user", "list"))

    def test_remote_engine(self) -> None:
        """With engine.url set there is no store of ours, and it says so."""
        self.configure(
            '[engine]\nurl = "https://engine.example.com/"\ncertificate = "c"\nkey = "k"'
        )
        for line in (
            "user list",
            "user add alice",
            "key list",
            "host list",
            "grants",
            "vm list",
            "changes",
            "group list",
            "pki ticket",
        ):
            self.assertIn("https://engine.example.com/", self.bad(*line.split()))
        self.assertFalse(self.state.exists())

    def test_no_configuration(self) -> None:
        """Without any configuration the state directory of the environment is used."""
        environment = {"VMCONSOLE_CONFIG": None, "STATE_DIRECTORY": str(self.state)}
        result = CliRunner().invoke(cli.main, ["user", "add", "alice"], env=environment)
        self.assertEqual(result.exit_code, 0, result.output)
        self.assertTrue((self.state / "engine.db").exists())

    def test_process(self) -> None:
        """As a process of its own: the same, and no traceback when the reader goes away."""
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "VMCONSOLE_CONFIG": str(self.config)}
        start = [sys.executable, "-c", PROCESS]

        def run(*arguments: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [*start, *arguments], env=environment, capture_output=True, text=True, check=False
            )

        self.assertEqual(run("user", "add", "alice").returncode, 0)
        again = run("user", "add", "alice")
        self.assertEqual((again.returncode, again.stdout), (1, ""))
        self.assertEqual(again.stderr, "ERROR: There is a user 'alice' already.\n")
        generated = run("key", "generate", "alice")
        self.assertEqual(generated.stderr, "")
        load_ssh_private_key(generated.stdout.encode(), None)

        def run_into_full_disk(*arguments: str) -> subprocess.CompletedProcess[str]:
            with open("/dev/full", "wb") as full:
                return subprocess.run(
                    [*start, *arguments],
                    env=environment,
                    stdout=full,
                    stderr=subprocess.PIPE,
                    text=True,
                    check=False,
                )

        listing = run_into_full_disk("user", "list")
        self.assertEqual(listing.returncode, 1)
        self.assertIn("ERROR: The output cannot be written: No space left", listing.stderr)
        failed = run_into_full_disk("key", "generate", "alice")
        self.assertEqual(failed.returncode, 1)
        self.assertIn("No key was added", failed.stderr)
        self.assertEqual(len(json.loads(run("key", "list", "--json").stdout)), 1)
        run("host", "add", "gone", "qemu+unix:///system?socket=/nonexistent")
        # libvirt itself says nothing.
        self.assertEqual(run("vm", "list").stderr.count("\n"), 1)


class RecordsTests(CliTestCase):
    """Users and hosts."""

    def test_users(self) -> None:
        """Added, listed, removed."""
        self.assertIn("alice", self.good("user", "add", "alice"))
        self.assertIn("already", self.bad("user", "add", "alice"))
        self.good("user", "add", "bob")
        table = self.lines("user", "list")
        self.assertEqual(table[0], ["NAME", "ID", "CREATED"])
        self.assertEqual([line[0] for line in table[1:]], ["alice", "bob"])
        [alice, _] = json.loads(self.good("user", "list", "--json"))
        self.assertEqual((alice["name"], alice["id"]), ("alice", table[1][1]))
        created = datetime.strptime(alice["created"], "%Y-%m-%dT%H:%M:%S%z")
        self.assertLess(abs(datetime.now(UTC) - created), timedelta(minutes=1))
        self.good("user", "remove", "alice")
        self.assertIn("vmconsole user add alice", self.bad("user", "remove", "alice"))
        self.assertEqual(json.loads(self.good("user", "list", "--json"))[0]["name"], "bob")

    def test_empty(self) -> None:
        """Nothing to list is nothing, and an empty list in JSON."""
        for line in ("user list", "key list", "group list", "host list", "grants", "changes"):
            self.assertEqual(self.good(*line.split()), "")
            self.assertEqual(json.loads(self.good(*line.split(), "--json")), [])

    def test_hosts(self) -> None:
        """A host is added with its URI or the rule's; a URI that may not be used is refused."""
        self.assertIn("qemu+tls://node1/system", self.good("host", "add", "node1"))
        self.good("host", "add", "node2", "qemu:///system")
        self.assertEqual(
            json.loads(self.good("host", "list", "--json")),
            [{"name": "node1", "uri": ""}, {"name": "node2", "uri": "qemu:///system"}],
        )
        self.assertIn("already", self.bad("host", "add", "node1"))
        self.assertIn("cannot be used", self.bad("host", "add", "node3", "qemu+ssh://node3/system"))
        self.bad("host", "add", "a/b")
        self.good("host", "remove", "node1")
        self.assertIn("vmconsole host list", self.bad("host", "remove", "node1"))


class CheckTests(CliTestCase):
    """``check``."""

    def remote(self, more: str = "") -> None:
        self.configure(
            '[engine]\nurl = "https://engine.example.com/"\nca = "ca.pem"\n'
            f'certificate = "proxy.cer"\nkey = "proxy.key"\n{more}'
        )

    def files(self, usage: pki.Usage = "ticket", issued: timedelta = timedelta(0)) -> None:
        """What a remote engine needs, in the state directory."""
        self.state.mkdir(mode=0o700, exist_ok=True)
        now = datetime.now(UTC)
        ca = pki.make_authority("CA", now)
        (self.state / "ca.pem").write_bytes(ca.certificate_pem())
        identity = pki.issue(ca, "proxy", usage, now - issued, key_size=2048)
        identity.save(self.state / "proxy.cer", self.state / "proxy.key")

    def test_good(self) -> None:
        """Nothing is wrong with no configuration, before and after the first use."""
        self.assertIn("good", self.good("check"))
        self.assertFalse(self.state.exists())
        self.good("user", "add", "alice")
        self.assertIn("good", self.good("check"))

    def test_remote(self) -> None:
        """All files for a remote engine are there and fit."""
        self.remote()
        self.files()
        self.assertIn("good", self.good("check"))

    def test_remote_problems(self) -> None:
        """What is missing or does not fit is named."""
        self.remote()
        self.assertIn("engine.ca", self.bad("check"))
        for name, words in (("proxy.cer", "engine.certificate"), ("proxy.key", "engine.key")):
            self.files()
            (self.state / name).unlink()
            self.assertIn(words, self.bad("check"))
        self.files()
        other = pki.make_authority("other", datetime.now(UTC))
        (self.state / "proxy.key").write_bytes(other.key_pem())
        self.assertIn("is not the key of", self.bad("check"))
        self.files("client")
        self.assertIn("1.3.6.1.4.1.2312.13.1.2.1.1", self.bad("check"))
        self.files(issued=timedelta(days=1000))
        self.assertIn("expired", self.bad("check"))

    def test_warnings(self) -> None:
        """What may be right, and often is not, is a warning: exit status 0."""
        self.remote()
        self.files()
        other = pki.make_authority("other", datetime.now(UTC))
        (self.state / "ca.pem").write_bytes(other.certificate_pem())
        self.state.chmod(0o777)
        result = self.run_it("check")
        self.assertEqual(result.exit_code, 0)
        self.assertIn("WARNING: engine.certificate was not issued by engine.ca", result.stderr)
        self.assertIn("WARNING: state.directory", result.stderr)
        self.remote()
        self.config.write_text(self.config.read_text().replace("https:", "http:"))
        self.assertIn("without TLS", self.run_it("check").stderr)

    def test_embedded_problems(self) -> None:
        """Settings and files of the embedded engine."""
        for more, words in (
            ('[engine.embedded]\nlisten = "tcp:443"', "engine.embedded.listen"),
            ('[engine.embedded]\ndatabase = "engine.db"', "engine.embedded.database"),
            ('[engine.embedded]\nticket_ca = "missing.pem"', "engine.embedded.ticket_ca"),
            ('[hosts]\nuri = "qemu+ssh://{host}/system"', "hosts: "),
            ('[hosts.overrides]\nnode1 = "qemu+ext:///system"', "node1"),
        ):
            self.configure(more)
            self.assertIn(words, self.bad("check"))
        self.configure()
        self.state.mkdir()
        (self.state / "engine.db").write_bytes(b"garbage" * 1000)
        self.assertIn("engine.db", self.bad("check"))

    def test_tls_files_of_hosts(self) -> None:
        """Each file that libvirt will want in hosts.pki is looked for."""
        self.configure('[hosts]\npki = "pki"')
        result = self.run_it("check")
        self.assertEqual(result.exit_code, 1)
        for name in ("cacert.pem", "clientcert.pem", "clientkey.pem"):
            self.assertIn(str(self.state / "pki" / name), result.stderr)

    def test_state_is_no_directory(self) -> None:
        """A file where the state directory should be."""
        self.state.write_bytes(b"")
        self.assertIn("no directory", self.run_it("check").stderr)


class BesideTheServiceTests(CliTestCase):
    """While somebody else has the database open."""

    def test_busy(self) -> None:
        """A reader in the middle of its transaction does not hold up the command."""
        store = Store(f"sqlite:///{self.state / 'engine.db'}")
        store.open()
        self.addCleanup(store.close)
        with store._database.reading() as connection:
            before = store._database.revision(connection)
            self.good("user", "add", "alice")
            self.assertEqual(store._database.revision(connection), before)
        self.assertEqual([user.name for user in store.users()], ["alice"])

    def test_upgraded(self) -> None:
        """That the database was upgraded is said on stderr; that it was made is not."""
        self.patch(Store, "open", lambda _: "Upgraded the database x from version 1 to 2")
        self.patch(Store, "users", lambda _: [])
        result = self.run_it("user", "list")
        self.assertEqual((result.exit_code, result.stdout), (0, ""))
        self.assertEqual(result.stderr, "NOTE: Upgraded the database x from version 1 to 2.\n")
        self.patch(Store, "open", lambda _: "Made the database x")
        self.good("user", "list")

    def test_config_is_not_needed(self) -> None:
        """The database is where the service has it."""
        self.good("user", "add", "alice")
        path = Config(state=State(directory=str(self.state))).path("engine.db")
        store = Store(f"sqlite:///{path}")
        store.open()
        self.addCleanup(store.close)
        with self.assertRaises(StoreError):
            store.add_user("alice")


class ActorTests(SynchronousTestCase):
    """Who is said to make a change."""

    def setUp(self) -> None:
        self.patch(os, "environ", {})

    def test_login_name(self) -> None:
        """The login name of the real user id, whatever the environment says."""
        os.environ["USER"] = os.environ["LOGNAME"] = "mallory"
        self.patch(os, "getuid", lambda: 0)
        self.assertEqual(common.actor(), "root")

    def test_unknown(self) -> None:
        """A user id without a name is told as a number."""
        self.patch(os, "getuid", lambda: 2**31 - 5)
        self.assertEqual(common.actor(), "uid 2147483643")

    def test_sudo(self) -> None:
        """With sudo it is told who used that, not at any length."""
        self.patch(os, "getuid", lambda: 0)
        os.environ["SUDO_USER"] = "alice"
        self.assertEqual(common.actor(), "root (sudo by alice)")
        os.environ["SUDO_USER"] = "x" * 300
        self.assertLess(len(common.actor()), 100)
