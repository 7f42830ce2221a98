"""The ``vmconsole`` command, on a real database."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

from click.testing import CliRunner, Result
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_ssh_private_key,
)
from twisted.trial.unittest import SynchronousTestCase

from tests.engine_kit import public_line, short_directory
from vmconsole import cli, pki
from vmconsole.config import Config, State
from vmconsole.engine.embedded.store import Store
from vmconsole.engine.keyline import parse_key_line
from vmconsole.errors import StoreError
from vmconsole.publickeys import fingerprint

ROOT = Path(__file__).parent.parent


class CliTestCase(SynchronousTestCase):
    """Runs the command with a configuration of its own."""

    def setUp(self) -> None:
        self.directory = short_directory(self)
        self.state = self.directory / "state"
        self.config = self.directory / "vmconsole.toml"
        self.configure()

    def configure(self, more: str = "") -> None:
        self.config.write_text(f'{more}\n[state]\ndirectory = "{self.state}"\n')

    def run_it(self, *arguments: str, input: str = "") -> Result:
        environment = {"VMCONSOLE_CONFIG": str(self.config)}
        return CliRunner().invoke(cli.main, arguments, input=input, env=environment)

    def good(self, *arguments: str, input: str = "") -> str:
        """What it wrote; it exited with 0."""
        result = self.run_it(*arguments, input=input)
        self.assertEqual((result.exit_code, result.stderr), (0, ""), arguments)
        return result.stdout

    def bad(self, *arguments: str, input: str = "", status: int = 1) -> str:
        """What it wrote on stderr; it exited with ``status``, and wrote nothing else."""
        result = self.run_it(*arguments, input=input)
        self.assertEqual((result.exit_code, result.stdout), (status, ""), arguments)
        if status == 1:
            self.assertTrue(result.stderr.startswith("ERROR: "), result.stderr)
            self.assertEqual(result.stderr.count("\n"), 1)
        return result.stderr

    def lines(self, *arguments: str) -> list[list[str]]:
        """The table's lines, as words."""
        return [line.split() for line in self.good(*arguments).splitlines()]


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
            "host add",
            "host list",
            "host remove",
            "grant",
            "revoke",
            "grants",
            "vm list",
        ):
            words = line.split()
            shown = self.good(*words, "--help")
            self.assertIn("--config FILE", shown)
            self.assertEqual("--json" in shown, words[-1] in ("list", "grants"), line)
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
        for line in ("user list", "user add alice", "key list", "host list", "grants", "vm list"):
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
        start = [sys.executable, "-c", "from vmconsole.cli import main; main()"]

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
    """Users, keys, hosts, grants."""

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
        for line in ("user list", "key list", "host list", "grants"):
            self.assertEqual(self.good(*line.split()), "")
            self.assertEqual(json.loads(self.good(*line.split(), "--json")), [])

    def test_keys(self) -> None:
        """From a file or standard input, listed for one or all, removed by fingerprint."""
        self.good("user", "add", "alice")
        self.good("user", "add", "bob")
        file = self.directory / "alice.pub"
        file.write_text(public_line("alice") + "\n")
        self.assertIn("SHA256:", self.good("key", "add", "alice", str(file)))
        self.assertIn("'alice' has the key", self.bad("key", "add", "bob", str(file)))
        self.good("key", "add", "bob", "-", input=public_line("bob"))
        [alice] = json.loads(self.good("key", "list", "alice", "--json"))
        self.assertEqual(
            (alice["user"], alice["type"], alice["comment"]),
            ("alice", "ssh-ed25519", "alice@home"),
        )
        self.assertEqual(
            [line[:3] for line in self.lines("key", "list")][:2],
            [["USER", "TYPE", "FINGERPRINT"], ["alice", "ssh-ed25519", alice["fingerprint"]]],
        )
        self.assertIn("alice", self.good("key", "remove", alice["fingerprint"]))
        self.assertIn("vmconsole key list", self.bad("key", "remove", alice["fingerprint"]))
        self.assertIn("no user 'carol'", self.bad("key", "list", "carol"))
        self.assertIn("no user 'carol'", self.bad("key", "add", "carol", str(file)))

    def test_bad_keys(self) -> None:
        """A private key, binary rubbish, a file without end."""
        self.good("user", "add", "alice")
        private = self.good("key", "generate", "alice")
        said = self.bad("key", "add", "alice", "-", input=private)
        self.assertIn("private key", said)
        self.assertNotIn(private.splitlines()[1][:16], said)
        for path, words in (
            ("/bin/true", "Line 1"),
            ("/dev/zero", "more than 1048576 bytes"),
            ("/dev/null", "no key"),
        ):
            self.assertIn(words, self.bad("key", "add", "alice", path))

    def test_comment_is_escaped(self) -> None:
        """What a comment holds cannot act on the terminal, in a table or in JSON."""
        self.good("user", "add", "alice")
        self.good("key", "add", "alice", "-", input=f"{public_line('alice')} \u00e4 \\x")
        self.assertIn("\u00e4 \\\\x", self.good("key", "list"))
        self.assertIn("\\u00e4 \\\\x", self.good("key", "list", "--json"))

    def test_key_generate(self) -> None:
        """The private key is all that is written; the public half is the user's."""
        self.good("user", "add", "alice")
        for options in ([], ["--type", "ed25519"], ["--type", "rsa"]):
            private = self.good("key", "generate", "alice", *options)
            key = load_ssh_private_key(private.encode(), None).public_key()
            public = key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
            self.assertIn(fingerprint(parse_key_line(public).blob), self.good("key", "list"))
        self.assertIn("no user 'bob'", self.bad("key", "generate", "bob"))
        types = sorted(line[1] for line in self.lines("key", "list")[1:])
        self.assertEqual(types, ["ssh-ed25519", "ssh-ed25519", "ssh-rsa"])

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

    def test_grants(self) -> None:
        """Granted, listed, revoked; groups and roles are not promised."""
        self.good("user", "add", "alice")
        self.good("grant", "alice", "web*")
        self.good("grant", "alice", "*")
        self.assertEqual(
            [line[:3] for line in self.lines("grants")],
            [
                ["USER", "PATTERN", "ROLE"],
                ["alice", "*", "operator"],
                ["alice", "web*", "operator"],
            ],
        )
        self.good("revoke", "alice", "*")
        self.assertEqual(len(json.loads(self.good("grants", "--json"))), 1)
        self.assertIn("no grant", self.bad("revoke", "alice", "*"))
        self.assertIn("no user 'bob'", self.bad("grant", "bob", "*"))
        self.assertIn("Groups", self.bad("grant", "@ops", "*"))
        self.assertNotIn("--role", self.good("grant", "--help"))


class VmListTests(CliTestCase):
    """``vm list``, against libvirt's own test driver."""

    def test_listed(self) -> None:
        """Each VM with its host and state, in a table and in JSON."""
        self.good("host", "add", "node1", "test:///default")
        self.good("host", "add", "node2", "test:///default")
        table = self.lines("vm", "list")
        self.assertEqual(table[0], ["NAME", "ID", "HOST", "STATE", "PROBLEM"])
        self.assertEqual([line[:4:2] for line in table[1:]], [["test", "node1"], ["test", "node2"]])
        [vm, _] = json.loads(self.good("vm", "list", "--json"))
        self.assertEqual(vm["state"], "running")
        self.assertIn("no console device", vm["problem"])

    def test_silent_host(self) -> None:
        """A host that does not answer is told on stderr, and the others are listed."""
        self.patch(cli, "_HOST_SECONDS", 1.0)
        listener = socket.socket(socket.AF_UNIX)
        self.addCleanup(listener.close)
        path = self.directory / "silent.sock"
        listener.bind(str(path))
        listener.listen()
        self.good("host", "add", "node1", "test:///default")
        self.good("host", "add", "silent", f"qemu+unix:///system?socket={path}")
        self.good("host", "add", "gone", "qemu+unix:///system?socket=/nonexistent")
        started = time.monotonic()
        result = self.run_it("vm", "list")
        self.assertLess(time.monotonic() - started, 6)
        self.assertEqual(result.exit_code, 1)
        self.assertIn("test", result.stdout)
        self.assertIn("ERROR: Cannot connect to gone", result.stderr)
        self.assertIn("ERROR: silent gave no answer within 1 seconds", result.stderr)
        self.assertEqual(result.stderr.count("\n"), 2)

    def test_refused_uri(self) -> None:
        """So is one whose URI the configuration no longer allows."""
        self.good("host", "add", "node1", "test:///default")
        self.good("host", "add", "node2")
        self.configure('[hosts.overrides]\nnode2 = "qemu+ssh://node2/system"')
        result = self.run_it("vm", "list")
        self.assertEqual(result.exit_code, 1)
        self.assertIn("node1", result.stdout)
        self.assertIn("node2 cannot be used", result.stderr)

    def test_local(self) -> None:
        """Without any host, this machine is asked."""
        self.configure('[hosts.overrides]\nlocalhost = "test:///default"')
        self.assertEqual(self.lines("vm", "list")[1][2], "localhost")


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

    def test_config_is_not_needed(self) -> None:
        """The database is where the service has it."""
        self.good("user", "add", "alice")
        path = Config(state=State(directory=str(self.state))).path("engine.db")
        store = Store(f"sqlite:///{path}")
        store.open()
        self.addCleanup(store.close)
        with self.assertRaises(StoreError):
            store.add_user("alice")
