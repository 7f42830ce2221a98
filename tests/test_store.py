"""The embedded engine's database."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import threading
from base64 import b64encode
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import dsa, rsa
from cryptography.hazmat.primitives.asymmetric.ec import SECP256K1, SECP521R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from hypothesis import given
from hypothesis import strategies as some
from sqlalchemy import create_engine, text
from twisted.trial.unittest import SynchronousTestCase

from tests.engine_kit import NOW, public_line
from vmconsole import config
from vmconsole.engine.embedded.database import database_url
from vmconsole.engine.embedded.keypair import generate_key_pair
from vmconsole.engine.embedded.store import Store, parse_public_keys
from vmconsole.engine.keyline import parse_key_line
from vmconsole.errors import ConfigError, StoreError
from vmconsole.publickeys import fingerprint


class StoreTestCase(SynchronousTestCase):
    """A new store in a directory of its own."""

    def setUp(self) -> None:
        self.file = Path(self.mktemp()) / "state" / "engine.db"
        self.store = self.another()

    def another(self) -> Store:
        """One more store on the same file, as the command beside the service."""
        store = Store(f"sqlite:///{self.file}", NOW.timestamp)
        store.open()
        self.addCleanup(store.close)
        return store

    def refused(self, *words: str) -> _Refused:
        """Within it, a StoreError is raised that has these words."""
        return _Refused(self, words)


class _Refused:
    def __init__(self, test: SynchronousTestCase, words: tuple[str, ...]) -> None:
        self.test = test
        self.words = words

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        self.test.assertIsInstance(error, StoreError)
        for word in self.words:
            self.test.assertIn(word, str(error))
        self.test.assertTrue(str(error).isprintable())
        return True


class UserTests(StoreTestCase):
    """Users."""

    def test_added_listed_removed(self) -> None:
        """Users are listed by name, each with an id of its own, also when it comes again."""
        bob, alice = self.store.add_user("bob"), self.store.add_user("alice")
        self.assertEqual(self.store.users(), [alice, bob])
        self.assertEqual(alice.created, int(NOW.timestamp()))
        self.store.remove_user("alice")
        self.assertEqual(self.store.users(), [bob])
        self.assertNotEqual(self.store.add_user("alice").id, alice.id)

    def test_refused(self) -> None:
        """A name that is there already, and names that would hurt elsewhere."""
        self.store.add_user("alice")
        with self.refused("'alice'", "already"):
            self.store.add_user("alice")
        for name in ("", "a b", "-a", ".a", "a@b", "@ops", "a/b", "a\n", "ä", "a" * 65, "\x1b[2J"):
            with self.refused("no name for a user"):
                self.store.add_user(name)
        self.assertEqual(len(self.store.users()), 1)

    def test_unknown(self) -> None:
        """An unknown user is an error that says how to add one."""
        for call in (
            lambda: self.store.remove_user("alice"),
            lambda: self.store.keys("alice"),
            lambda: self.store.add_keys("alice", public_line("alice")),
            lambda: self.store.grant("alice", "*"),
            lambda: self.store.revoke("alice", "*"),
        ):
            with self.refused("no user 'alice'", "vmconsole user add alice"):
                call()
        with self.refused("Groups"):
            self.store.grant("@ops", "*")
        with self.refused("no user '\\x1b'"):
            self.store.keys("\x1b")


class KeyTests(StoreTestCase):
    """Keys."""

    def setUp(self) -> None:
        super().setUp()
        self.store.add_user("alice")
        self.store.add_user("bob")

    def test_added_listed_removed(self) -> None:
        """A key is found by user; it is removed by fingerprint, with or without its prefix."""
        [key] = self.store.add_keys("alice", f"\n# mine\n{public_line('alice')}\r\n\n")
        self.assertEqual(self.store.keys(), [key])
        self.assertEqual(self.store.keys("alice"), [key])
        self.assertEqual(self.store.keys("bob"), [])
        self.assertEqual((key.user, key.type, key.comment), ("alice", "ssh-ed25519", "alice@home"))
        self.assertEqual(key.fingerprint, fingerprint(key.blob))
        self.store.add_keys("bob", public_line("bob"))
        self.assertEqual(self.store.remove_key(key.fingerprint.removeprefix("SHA256:")), key)
        self.assertEqual([each.user for each in self.store.keys()], ["bob"])
        with self.refused(key.fingerprint, "vmconsole key list"):
            self.store.remove_key(key.fingerprint)

    def test_fingerprint(self) -> None:
        """It is the one that ssh-keygen shows."""
        [key] = self.store.add_keys("alice", public_line("alice"))
        shown = subprocess.run(
            ["ssh-keygen", "-l", "-f", "-"],
            input=public_line("alice").encode(),
            capture_output=True,
            check=True,
        ).stdout.decode()
        self.assertIn(f" {key.fingerprint} ", shown)

    def test_removed_with_user(self) -> None:
        """A user's keys go with the user, and may come back with another."""
        self.store.add_keys("alice", public_line("alice"))
        self.store.remove_user("alice")
        self.assertEqual(self.store.keys(), [])
        self.store.add_keys("bob", public_line("alice"))

    def test_twice(self) -> None:
        """A key is one user's: who has it already is said. All of a file are added, or none."""
        self.store.add_keys("alice", public_line("alice"))
        for user in ("alice", "bob"):
            with self.refused("'alice' has the key SHA256:"):
                self.store.add_keys(user, public_line("bob") + "\n" + public_line("alice"))
        self.assertEqual(len(self.store.keys()), 1)

    def test_types(self) -> None:
        """Every type that the ssh server takes, as ssh-keygen and others write it."""
        for key in (
            Ed25519PrivateKey.generate(),
            rsa.generate_private_key(65537, 2048),
            generate_private_key(SECP521R1()),
        ):
            public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
            [line] = parse_public_keys(public.decode())
            self.assertEqual(str(line), public.decode())

        def string(value: bytes) -> bytes:
            return len(value).to_bytes(4, "big") + value

        kind = b"sk-ssh-ed25519@openssh.com"
        blob = string(kind) + string(b"\x01" * 32) + string(b"ssh:")
        [line] = parse_public_keys(f"{kind.decode()} {b64encode(blob).decode()} token")
        self.assertEqual(line.type, kind.decode())

    def test_refused(self) -> None:
        """Short RSA, DSA, broken blobs, unknown options, control characters in the comment."""
        short = rsa.generate_private_key(65537, 1024).public_key()
        weak = short.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
        good = public_line("alice")
        kind, blob, _ = good.split()
        for line, words in (
            (weak, "1024"),
            (f"{kind} {blob[:-4]}", "Line 1"),
            (f"{kind} {blob[:24]}", "Line 1"),
            (f'command="x" {good}', "option command"),
            (f"{good}\x1b[2J", "control characters"),
            (f"{good}\x85x", "control characters"),
            ("x" * 20000, "too long"),
            ("hello", "no public key"),
            ("", "no key"),
            ("# only a comment", "no key"),
            (f"{good}\n\nhello", "Line 3"),
        ):
            with self.refused(words):
                self.store.add_keys("alice", line)
        self.assertEqual(self.store.keys(), [])

    def test_private_key(self) -> None:
        """A private key is refused in whatever format, and nothing of it is said or stored."""
        key = Ed25519PrivateKey.generate()
        for encoding, format in (
            (Encoding.PEM, PrivateFormat.OpenSSH),
            (Encoding.PEM, PrivateFormat.PKCS8),
        ):
            private = key.private_bytes(encoding, format, NoEncryption()).decode()
            for pasted in (
                private,
                private.replace("\n", " "),
                f"{public_line('alice')}\n{private}",
                "\n".join(private.split("\n")[1:-2]),
                f"ssh-ed25519 {private.split()[4]}",
            ):
                with self.refused() as _:
                    self.store.add_keys("alice", pasted)
                try:
                    self.store.add_keys("alice", pasted)
                except StoreError as error:
                    for line in private.split("\n")[1:-2]:
                        self.assertNotIn(line[:16], str(error))
        with self.refused("private key"):
            self.store.add_keys("alice", "PuTTY-User-Key-File-3: ssh-ed25519\n")
        self.assertEqual(self.store.keys(), [])
        secret = key.private_bytes_raw()
        self.assertNotIn(b64encode(secret)[:16], self.file.read_bytes())

    def test_options_are_not_stored(self) -> None:
        """What holds anyway is taken and left out: the stored line is a bare key."""
        self.store.add_keys("alice", f"restrict,no-user-rc {public_line('alice')}")
        [key] = self.store.keys()
        self.assertEqual(key.blob, parse_key_line(public_line("alice")).blob)

    def test_options_that_restrict(self) -> None:
        """What cannot be kept is not dropped: the key is refused, and why, and the cure."""
        kind = "sk-ssh-ed25519@openssh.com"
        blob = len(kind).to_bytes(4, "big") + kind.encode() + b"\0\0\0\x20" + b"\1" * 32
        token = f"{kind} {b64encode(blob + bytes([0, 0, 0, 4]) + b'ssh:').decode()}"
        self.assertEqual(len(parse_public_keys(f"restrict {token}")), 1)
        for options, names in (
            ('from="10.0.0.1"', "from"),
            ('expiry-time="20300101"', "expiry-time"),
            ("verify-required", "verify-required"),
            ('restrict,verify-required,from="*"', "from, verify-required"),
        ):
            with self.refused(
                f"Line 2: the embedded engine cannot keep the option {names} yet",
                "not added",
                "leave the option out",
            ):
                self.store.add_keys("alice", f"{public_line('alice')}\n{options} {token}")
        with self.refused("Line 1", "sk- keys only"):
            self.store.add_keys("alice", f"verify-required {public_line('alice')}")
        self.assertEqual(self.store.keys(), [])

    @given(some.text())
    def test_anything(self, pasted: str) -> None:
        """Whatever is pasted, it is keys or a StoreError."""
        for candidate in (pasted, f"ssh-rsa {b64encode(pasted.encode()).decode()}"):
            try:
                parse_public_keys(candidate)
            except StoreError:
                pass

    @given(some.sampled_from(["ssh-rsa", "ssh-ed25519", "ecdsa-sha2-nistp256"]), some.binary())
    def test_any_blob(self, kind: str, rest: bytes) -> None:
        """Whatever the blob holds after its type, it is a key or a StoreError."""
        blob = len(kind).to_bytes(4, "big") + kind.encode() + rest
        try:
            parse_public_keys(f"{kind} {b64encode(blob).decode()}")
        except StoreError:
            pass

    def test_foreign_types(self) -> None:
        """Keys that OpenSSH has no more, or never had."""
        key = dsa.generate_private_key(1024).public_key()
        with self.refused("ssh-dss"):
            self.store.add_keys(
                "alice", key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
            )
        curve = generate_private_key(SECP256K1()).public_key()
        pem = curve.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
        with self.refused("Line 1"):
            self.store.add_keys("alice", pem)


class HostTests(StoreTestCase):
    """Hosts."""

    def test_added_listed_removed(self) -> None:
        """Hosts are listed by name; the URI may be left to the configuration."""
        self.store.add_host("node2.example.com")
        self.store.add_host("node1", "qemu:///system")
        self.store.add_host("fe80::1")
        self.assertEqual(
            [(host.name, host.uri) for host in self.store.hosts()],
            [("fe80::1", ""), ("node1", "qemu:///system"), ("node2.example.com", "")],
        )
        self.store.remove_host("node1")
        with self.refused("no host 'node1'", "vmconsole host list"):
            self.store.remove_host("node1")

    def test_refused(self) -> None:
        """A host that is there, and names and URIs that are none."""
        self.store.add_host("node1")
        with self.refused("already", "vmconsole host remove node1"):
            self.store.add_host("node1", "qemu:///system")
        for name in ("", "-x", "a/b", "a b", "a\n", "a?b", "a@b", "x" * 254):
            with self.refused("no host name"):
                self.store.add_host(name)
        for uri in ("a b", "a\n", "ä", "x" * 1025):
            with self.refused("no URI"):
                self.store.add_host("node2", uri)


class GrantTests(StoreTestCase):
    """Grants."""

    def setUp(self) -> None:
        super().setUp()
        self.store.add_user("alice")

    def test_granted_listed_revoked(self) -> None:
        """A grant is there once, however often it is given, and revoked as it was given."""
        for pattern in ("web*", "*", "web*"):
            self.store.grant("alice", pattern)
        self.assertEqual(
            [(grant.user, grant.pattern, grant.role) for grant in self.store.grants()],
            [("alice", "*", "operator"), ("alice", "web*", "operator")],
        )
        self.store.revoke("alice", "*")
        with self.refused("'alice' has no grant '*'"):
            self.store.revoke("alice", "*")
        self.store.grant("alice", "web*", "viewer")
        [grant] = self.store.grants()
        self.assertEqual(grant.role, "viewer")

    def test_refused(self) -> None:
        """Patterns that are none."""
        for pattern in ("", "a\n", "\x1b", "x" * 256):
            with self.refused("no VM"):
                self.store.grant("alice", pattern)

    def test_removed_with_user(self) -> None:
        """Who comes back under an old name has none of the old grants."""
        self.store.grant("alice", "*")
        self.store.remove_user("alice")
        self.store.add_user("alice")
        self.assertEqual(self.store.grants(), [])


class SnapshotTests(StoreTestCase):
    """What readers see."""

    def test_contents(self) -> None:
        """All of it, grants by user id."""
        alice = self.store.add_user("alice")
        self.store.add_keys("alice", public_line("alice"))
        self.store.add_host("node1")
        self.store.grant("alice", "*")
        snapshot = self.store.snapshot()
        self.assertEqual(snapshot.user_ids, {alice.id})
        self.assertEqual([key.user for key in snapshot.keys], ["alice"])
        self.assertEqual(dict(snapshot.hosts), {"node1": ""})
        self.assertEqual([grant.pattern for grant in snapshot.grants[alice.id]], ["*"])

    def test_revision(self) -> None:
        """The same snapshot comes back until somebody wrote, also another process."""
        snapshot = self.store.snapshot()
        self.assertIs(self.store.snapshot(snapshot), snapshot)
        self.another().add_user("alice")
        changed = self.store.snapshot(snapshot)
        self.assertIsNot(changed, snapshot)
        self.assertEqual(len(changed.user_ids), 1)
        self.assertIs(self.another().snapshot(changed), changed)

    def test_refusal_changes_nothing(self) -> None:
        """What was refused bumps no revision."""
        self.store.add_user("alice")
        snapshot = self.store.snapshot()
        with self.refused():
            self.store.add_user("alice")
        self.assertIs(self.store.snapshot(snapshot), snapshot)


class DatabaseTests(StoreTestCase):
    """The file, and what can go wrong with it."""

    def test_private(self) -> None:
        """Only its owner can read the file, its side files and its directory."""
        self.store.add_user("alice")
        files = sorted(path.name for path in self.file.parent.iterdir())
        self.assertEqual(files, ["engine.db", "engine.db-shm", "engine.db-wal"])
        for name in files:
            self.assertEqual((self.file.parent / name).stat().st_mode & 0o777, 0o600, name)
        self.assertEqual(self.file.parent.stat().st_mode & 0o777, 0o700)

    def test_owner(self) -> None:
        """Made by root in somebody's directory, the file is that owner's."""
        if os.geteuid() != 0:
            return
        directory = Path(self.mktemp())
        directory.mkdir()
        os.chown(directory, 1234, 1234)
        store = Store(f"sqlite:///{directory / 'engine.db'}")
        store.open()
        store.add_user("alice")
        for path in directory.iterdir():
            self.assertEqual(path.stat().st_uid, 1234, path)
        store.close()

    def test_kept(self) -> None:
        """What was written is there after closing and opening."""
        self.store.add_user("alice")
        self.store.close()
        self.assertEqual(len(self.another().users()), 1)

    def test_settings(self) -> None:
        """WAL; a confirmed write reaches the disk; references are held."""
        with self.store._database.reading() as connection:
            for pragma, value in (("journal_mode", "wal"), ("synchronous", 2), ("foreign_keys", 1)):
                self.assertEqual(connection.execute(text(f"PRAGMA {pragma}")).scalar(), value)

    def test_readers_see_one_moment(self) -> None:
        """A transaction does not see what is written while it reads."""
        other = self.another()
        with self.store._database.reading() as connection:
            before = self.store._database.revision(connection)
            other.add_user("alice")
            self.assertEqual(self.store._database.revision(connection), before)
        self.assertEqual(self.store.snapshot().revision, before + 1)

    def test_writers_wait(self) -> None:
        """Many writers at once, in threads and stores of their own: all is written."""
        errors: list[BaseException] = []

        def write(number: int) -> None:
            store = Store(f"sqlite:///{self.file}")
            try:
                store.open()
                for count in range(10):
                    store.add_user(f"user-{number}-{count}")
            except BaseException as error:
                errors.append(error)
            finally:
                store.close()

        threads = [threading.Thread(target=write, args=[number]) for number in range(8)]
        before = self.store.snapshot().revision
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(errors, [])
        self.assertEqual(len(self.store.users()), 80)
        self.assertEqual(self.store.snapshot().revision, before + 80)

    def test_first_openers(self) -> None:
        """Several processes that open a new database at once all succeed."""
        file = self.file.with_name("new.db")
        errors: list[BaseException] = []

        def open_it() -> None:
            store = Store(f"sqlite:///{file}")
            try:
                store.open()
                store.users()
            except BaseException as error:
                errors.append(error)
            finally:
                store.close()

        threads = [threading.Thread(target=open_it) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(errors, [])

    def test_newer_schema(self) -> None:
        """A database of another version is left alone, with a clear word."""
        self.store.close()
        with sqlite3.connect(self.file) as connection:
            connection.execute("UPDATE meta SET schema_version = 99")
        connection.close()
        store = Store(f"sqlite:///{self.file}")
        with self.refused("schema version 99", "another version of vmconsole"):
            store.open()
        store.close()

    def test_no_database(self) -> None:
        """A file that is something else, or a directory, is a StoreError that names it."""
        garbage = self.file.with_name("garbage.db")
        garbage.write_bytes(b"garbage" * 1000)
        directory = self.file.with_name("directory.db")
        directory.mkdir()
        for path in (garbage, directory):
            store = Store(f"sqlite:///{path}")
            with self.refused(path.name):
                store.open()
            store.close()
        self.assertEqual(garbage.read_bytes(), b"garbage" * 1000)
        below = Store(f"sqlite:///{garbage / 'engine.db'}")
        with self.refused("cannot be made"):
            below.open()

    def test_url(self) -> None:
        """A relative file is in the state directory; no file at all is refused."""

        def url(database: str) -> str:
            return database_url(
                config.Config(
                    engine=config.Engine(embedded=config.EmbeddedEngine(database=database)),
                    state=config.State(directory="/state"),
                )
            )

        self.assertEqual(url("sqlite:///engine.db"), "sqlite:////state/engine.db")
        self.assertEqual(url("sqlite:////var/x.db"), "sqlite:////var/x.db")
        self.assertEqual(
            url("postgresql+psycopg://u:secret@db/x"), "postgresql+psycopg://u:secret@db/x"
        )
        for wrong in ("sqlite://", "sqlite:///:memory:", "engine.db"):
            error = self.assertRaises(ConfigError, url, wrong)
            self.assertIn("engine.embedded.database", str(error))

    def test_missing_driver(self) -> None:
        """A driver that is not installed is named, and the password is not."""
        try:
            create_engine("postgresql+psycopg://u:secret@db/x")
        except ImportError:
            url = "postgresql+psycopg://u:secret@db/x"
            said = str(self.assertRaises(ConfigError, Store, url))
            self.assertIn("psycopg", said)
            self.assertIn("u:***@db", said)


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
