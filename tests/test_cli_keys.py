"""``vmconsole key``, with the real ssh-keygen."""

from __future__ import annotations

import errno
import json
import os
import pty
import select
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager

from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_private_key,
)

from tests.cli_kit import PROCESS, ROOT, CliTestCase
from tests.engine_kit import public_line
from vmconsole.cli import keys
from vmconsole.engine.embedded.database import Database, Part
from vmconsole.engine.keyline import parse_key_line
from vmconsole.errors import StoreError
from vmconsole.publickeys import fingerprint

PUTTY = """PuTTY-User-Key-File-3: ssh-ed25519
Encryption: none
Comment: alice
Public-Lines: 2
AAAAC3NzaC1lZDI1NTE5AAAAIHsecretsecretsecretsecretsecretsecret
secret
Private-Lines: 1
AAAAIHsecretsecretsecretsecretsecretsecretsecret
Private-MAC: secret
"""


class KeyTestCase(CliTestCase):
    """There is a user."""

    def setUp(self) -> None:
        super().setUp()
        self.good("user", "add", "alice")

    def count(self) -> int:
        """How many keys there are."""
        return len(json.loads(self.good("key", "list", "--json")))


class KeyTests(KeyTestCase):
    """``key add``, ``list``, ``remove``."""

    def test_keys(self) -> None:
        """From a file or standard input, listed for one or all, removed by fingerprint."""
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

    def test_no_blobs(self) -> None:
        """A list of keys names them; it does not have them."""
        self.good("key", "add", "alice", "-", input=public_line("alice"))
        [listed] = json.loads(self.good("key", "list", "--json"))
        self.assertEqual(
            sorted(listed), ["comment", "created", "fingerprint", "options", "type", "user"]
        )

    def test_options(self) -> None:
        """What restricts a key is kept, and listed; what is not known is refused."""
        restricted = f'from="10.0.0.0/8",restrict {public_line("alice")}'
        self.good("key", "add", "alice", "-", input=restricted)
        self.assertIn('from="10.0.0.0/8"', self.good("key", "list"))
        [listed] = json.loads(self.good("key", "list", "--json"))
        self.assertEqual(listed["options"], 'from="10.0.0.0/8"')
        unknown = f'command="/bin/true" {public_line("bob")}'
        self.assertIn("command", self.bad("key", "add", "alice", "-", input=unknown))
        self.assertEqual(self.count(), 1)

    def test_all_or_none(self) -> None:
        """One bad line among good ones: none is added, and the line is told."""
        lines = f"{public_line('alice')}\n# a comment\nrubbish\n"
        self.assertIn("Line 3", self.bad("key", "add", "alice", "-", input=lines))
        self.assertEqual(self.count(), 0)

    def test_bad_keys(self) -> None:
        """Binary rubbish, a file without end, an empty one."""
        for path, words in (
            ("/bin/true", "Line 1"),
            ("/dev/zero", "more than 1048576 bytes"),
            ("/dev/null", "no key"),
            ("/proc/self/mem", "/proc/self/mem cannot be read: Input/output error"),
        ):
            self.assertIn(words, self.bad("key", "add", "alice", path))

    def test_private_keys(self) -> None:
        """A private key, whatever its format, is refused; it is neither kept nor told."""
        formats = [PUTTY]
        key = Ed25519PrivateKey.generate()
        for format in (PrivateFormat.OpenSSH, PrivateFormat.PKCS8):
            formats.append(key.private_bytes(Encoding.PEM, format, NoEncryption()).decode())
        rsa_key = rsa.generate_private_key(65537, 2048)
        formats.append(
            rsa_key.private_bytes(
                Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption()
            ).decode()
        )
        public = public_line("alice")
        for private in formats:
            for content in (private, f"{public}\n{private}\n{public_line('bob')}\n"):
                file = self.directory / "key"
                file.write_text(content)
                for said in (
                    self.bad("key", "add", "alice", "-", input=content),
                    self.bad("key", "add", "alice", str(file)),
                ):
                    self.assertIn("private key", said)
                    for line in private.splitlines():
                        self.assertNotIn(line, said)
        self.assertEqual(self.count(), 0)
        kept = b"".join(path.read_bytes() for path in self.state.iterdir())
        for private in formats:
            self.assertNotIn(private.splitlines()[-2].encode(), kept)

    def test_comment_is_escaped(self) -> None:
        """What a comment holds cannot act on the terminal, in a table or in JSON."""
        self.good("key", "add", "alice", "-", input=f"{public_line('alice')} \u00e4 \\x")
        self.assertIn("\u00e4 \\\\x", self.good("key", "list"))
        self.assertIn("\\u00e4 \\\\x", self.good("key", "list", "--json"))


class GenerateTests(KeyTestCase):
    """``key generate``."""

    def fingerprints(self) -> list[str]:
        """As `key list` has them."""
        return [each["fingerprint"] for each in json.loads(self.good("key", "list", "--json"))]

    def keygen(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["ssh-keygen", *arguments],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            check=False,
        )

    def test_stdout(self) -> None:
        """The private key is all that is written; the public half is the user's."""
        for options in ([], ["--type", "ed25519"], ["--type", "rsa"]):
            private = self.good("key", "generate", "alice", *options)
            key = load_ssh_private_key(private.encode(), None).public_key()
            public = key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
            self.assertIn(fingerprint(parse_key_line(public).blob), self.fingerprints())
        self.assertIn("no user 'bob'", self.bad("key", "generate", "bob"))
        types = sorted(line[1] for line in self.lines("key", "list")[1:])
        self.assertEqual(types, ["ssh-ed25519", "ssh-ed25519", "ssh-rsa"])

    def test_output(self) -> None:
        """With --output a new file has it, for its owner only; the fingerprint goes to stderr."""
        file = self.directory / "alice.key"
        old = os.umask(0)
        try:
            result = self.run_it("key", "generate", "alice", "--output", str(file))
        finally:
            os.umask(old)
        self.assertEqual((result.exit_code, result.stdout), (0, ""))
        [added] = self.fingerprints()
        self.assertEqual(result.stderr, f"Added key {added} of alice.\n")
        self.assertEqual(file.stat().st_mode & 0o777, 0o600)
        self.assertIn(added, self.keygen("-l", "-f", str(file)).stdout)
        self.assertEqual([path.name for path in self.directory.glob("alice*")], ["alice.key"])

    def test_output_exists(self) -> None:
        """Nothing is overwritten, not even through a link that leads nowhere."""
        file, link = self.directory / "alice.key", self.directory / "link"
        file.write_text("precious")
        link.symlink_to(self.directory / "nowhere")
        for path in (file, link):
            said = self.bad("key", "generate", "alice", "--output", str(path))
            self.assertIn(f"{path} exists already", said)
        self.assertEqual(file.read_text(), "precious")
        self.assertTrue(link.is_symlink())
        self.assertEqual(self.count(), 0)

    def test_output_fails(self) -> None:
        """What cannot be written leaves no file, and no key."""
        missing = self.directory / "missing" / "alice.key"
        said = self.bad("key", "generate", "alice", "--output", str(missing))
        self.assertIn(f"{missing} could not be written: No such file", said)
        self.assertIn("No key was added", said)

        def no_room(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        self.patch(os, "fsync", no_room)
        file = self.directory / "alice.key"
        said = self.bad("key", "generate", "alice", "--output", str(file))
        self.assertIn("No space left on device. No key was added", said)
        self.assertFalse(file.exists())
        self.assertEqual(self.count(), 0)

    def test_written_before_the_commit(self) -> None:
        """When the key is added, the file is whole on the disk; if it is not, the file is gone."""
        file = self.directory / "alice.key"
        synced: list[int] = []
        seen = []
        fsync, writing = os.fsync, Database.writing

        def remember(descriptor: int) -> None:
            synced.append(os.fstat(descriptor).st_size)
            fsync(descriptor)

        @contextmanager
        def failing(database: Database, *parts: Part) -> Iterator[object]:
            with writing(database, *parts) as connection:
                yield connection
                seen.append(file.read_bytes())
                raise StoreError("The disk is full.")

        self.patch(os, "fsync", remember)
        self.patch(Database, "writing", failing)
        said = self.bad("key", "generate", "alice", "--output", str(file))
        self.assertEqual(said, "ERROR: The disk is full.\n")
        [private] = seen
        self.assertEqual(synced, [len(private)])
        load_ssh_private_key(private, None)
        self.assertFalse(file.exists())

    def test_passphrase_file(self) -> None:
        """The first line encrypts the key, as the real ssh-keygen reads it."""
        secret = self.directory / "secret"
        secret.write_bytes("p\u00e4ss word \r\nsecond\n".encode())
        for kind in ("ed25519", "rsa"):
            file = self.directory / f"{kind}.key"
            arguments = ("--passphrase-file", str(secret), "--output", str(file))
            result = self.run_it("key", "generate", "alice", "--type", kind, *arguments)
            self.assertEqual(result.exit_code, 0, result.stderr)
            read = self.keygen("-y", "-P", "p\u00e4ss word ", "-f", str(file))
            self.assertEqual(read.returncode, 0, read.stderr)
            self.assertIn(fingerprint(parse_key_line(read.stdout).blob), self.fingerprints())
            self.assertNotEqual(self.keygen("-y", "-P", "", "-f", str(file)).returncode, 0)
            self.assertNotEqual(self.keygen("-y", "-P", "wrong", "-f", str(file)).returncode, 0)
            [listed] = [name for name in self.fingerprints() if name in result.stderr]
            self.assertIn(listed, self.keygen("-l", "-f", str(file)).stdout)

    def test_passphrase_from_stdin(self) -> None:
        """The file may be standard input; the key still goes to standard output."""
        private = self.good("key", "generate", "alice", "--passphrase-file", "-", input="secret\n")
        load_ssh_private_key(private.encode(), b"secret")

    def test_bad_passphrases(self) -> None:
        """An empty one, one that no ssh-keygen reads, two ways to give it; no key is added."""
        secret = self.directory / "secret"
        file = self.directory / "alice.key"
        for content, words in (
            ("", "leave --passphrase-file out"),
            ("\nsecond\n", "leave --passphrase-file out"),
            ("x" * 1024, "more than 1023 bytes"),
        ):
            secret.write_text(content)
            arguments = ("--passphrase-file", str(secret), "--output", str(file))
            self.assertIn(words, self.bad("key", "generate", "alice", *arguments))
            self.assertFalse(file.exists())
        both = ("--passphrase", "--passphrase-file", str(secret))
        self.assertIn("not both", self.bad("key", "generate", "alice", *both, status=2))
        self.assertEqual(self.count(), 0)

    def test_passphrase_is_asked_for(self) -> None:
        """--passphrase asks twice, on stderr; an empty answer says to leave the option out."""
        self.patch(keys, "_has_terminal", lambda: True)
        result = self.run_it("key", "generate", "alice", "--passphrase", input="one\none\n")
        self.assertEqual(result.exit_code, 0, result.stderr)
        load_ssh_private_key(result.stdout.encode(), b"one")
        self.assertNotIn("one", result.stderr)
        result = self.run_it("key", "generate", "alice", "--passphrase", input="\n\n")
        self.assertEqual((result.exit_code, result.stdout), (1, ""))
        self.assertIn("leave --passphrase out", result.stderr)
        result = self.run_it("key", "generate", "alice", "--passphrase", input="one\ntwo\nx\nx\n")
        self.assertIn("do not match", result.stderr)
        load_ssh_private_key(result.stdout.encode(), b"x")

    def test_unknown_user_is_not_asked(self) -> None:
        """Nobody types a passphrase for a user who is not there."""
        self.patch(keys, "_has_terminal", lambda: self.fail("it wanted to ask"))
        self.assertIn("no user 'bob'", self.bad("key", "generate", "bob", "--passphrase"))


class ProcessTests(KeyTestCase):
    """``key generate`` as a process of its own."""

    def setUp(self) -> None:
        super().setUp()
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "VMCONSOLE_CONFIG": str(self.config),
        }
        self.command = [sys.executable, "-c", PROCESS, "key", "generate", "alice"]

    def test_no_terminal(self) -> None:
        """Without a terminal nobody can be asked, and standard input is not taken instead."""
        done = subprocess.run(
            [*self.command, "--passphrase"],
            env=self.environment,
            input="secret\nsecret\n",
            capture_output=True,
            text=True,
            start_new_session=True,
            check=False,
        )
        self.assertEqual((done.returncode, done.stdout), (1, ""))
        self.assertIn("--passphrase-file", done.stderr)
        self.assertEqual(done.stderr.count("\n"), 1)
        self.assertEqual(self.count(), 0)

    def test_terminal(self) -> None:
        """On a terminal it asks there, shows nothing, and stdout may be a file."""
        file = self.directory / "alice.key"
        process, terminal = pty.fork()
        if process == 0:
            try:
                os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT, 0o600), 1)
                os.execve(sys.executable, [*self.command, "--passphrase"], self.environment)
            finally:
                os._exit(99)
        self.addCleanup(os.close, terminal)
        shown = b""
        for question in (b"Passphrase:", b"confirmation:"):
            while question not in shown:
                ready, _, _ = select.select([terminal], [], [], 20)
                self.assertTrue(ready, shown)
                shown += os.read(terminal, 1024)
            # Echo is turned off between the two halves of the prompt.
            while not shown.endswith(b": "):
                shown += os.read(terminal, 1024)
            self.wait_for_no_echo(terminal)
            os.write(terminal, b"secret\n")
        _, status = os.waitpid(process, 0)
        self.assertEqual(os.waitstatus_to_exitcode(status), 0, shown)
        load_ssh_private_key(file.read_bytes(), b"secret")
        self.assertNotIn(b"secret", shown)

    def wait_for_no_echo(self, terminal: int) -> None:

        until = time.monotonic() + 20
        while termios.tcgetattr(terminal)[3] & termios.ECHO:
            self.assertLess(time.monotonic(), until)
            time.sleep(0.01)

    def test_closed_stdout(self) -> None:
        """With stdout closed nobody would have the key: none is added."""
        done = subprocess.run(
            ["sh", "-c", 'exec "$@" >&-', "sh", *self.command],
            env=self.environment,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        self.assertEqual(done.returncode, 1)
        self.assertIn("Standard output is closed", done.stderr)
        self.assertEqual(self.count(), 0)

    def test_closed_stdin(self) -> None:
        """What should be read from a closed stdin is an error; all else does not need it."""
        add = [*self.command[:-2], "add", "alice", "-"]
        for command in (add, [*self.command, "--passphrase-file", "-"]):
            done = self.without_stdin(command)
            self.assertEqual((done.returncode, done.stdout), (1, ""))
            self.assertEqual(
                done.stderr, "ERROR: Standard input is closed: there is nothing to read from '-'.\n"
            )
        self.assertEqual(self.count(), 0)
        done = self.without_stdin(self.command)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertEqual(self.count(), 1)

    def without_stdin(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["sh", "-c", 'exec "$@" <&-', "sh", *command],
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )

    def test_full_stdout(self) -> None:
        """With stdout on a full disk, or a reader who is gone, no key is added, nor told of."""
        read, write = os.pipe()
        os.close(read)
        full = os.open("/dev/full", os.O_WRONLY)
        for descriptor, words in ((full, "No space left"), (write, "Broken pipe")):
            self.addCleanup(os.close, descriptor)
            done = subprocess.run(
                self.command,
                env=self.environment,
                stdout=descriptor,
                stderr=subprocess.PIPE,
                text=True,
                check=False,
            )
            self.assertEqual(done.returncode, 1)
            self.assertIn(words, done.stderr)
            self.assertIn("No key was added", done.stderr)
        self.assertEqual(self.count(), 0)
        actions = {each["action"] for each in json.loads(self.good("changes", "--json"))}
        self.assertEqual(actions, {"user.add"})
