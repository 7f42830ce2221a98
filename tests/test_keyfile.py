"""Users' keys, from what they paste to what the proxy reads. On both databases."""

from __future__ import annotations

import subprocess
from base64 import b64encode
from collections.abc import Sequence
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import dsa, rsa
from cryptography.hazmat.primitives.asymmetric.ec import (
    SECP256K1,
    SECP256R1,
    SECP384R1,
    SECP521R1,
    generate_private_key,
)
from cryptography.hazmat.primitives.asymmetric.ed448 import Ed448PrivateKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from hypothesis import given
from hypothesis import strategies as some
from twisted.trial.unittest import SynchronousTestCase

from tests.engine_kit import public_line
from tests.store_kit import SECONDS, OnPostgres, StoreTestCase, ed25519_line, sk_line, string
from vmconsole.engine.embedded.keyfile import parse_public_keys
from vmconsole.engine.embedded.records import KeyRecord
from vmconsole.engine.keyline import parse_key_line
from vmconsole.errors import StoreError
from vmconsole.keyoptions import parse_key_options
from vmconsole.publickeys import KEY_TYPES, fingerprint


def lines_of_all_types(directory: Path) -> dict[str, str]:
    """A key of each type: by ssh-keygen, and those in hardware put together by hand."""
    found = {"sk-ssh-ed25519@openssh.com": sk_line()}
    kind = b"sk-ecdsa-sha2-nistp256@openssh.com"
    point = (
        generate_private_key(SECP256R1())
        .public_key()
        .public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
    )
    blob = string(kind) + string(b"nistp256") + string(point) + string(b"ssh:")
    found[kind.decode()] = f"{kind.decode()} {b64encode(blob).decode()} token"
    for number, options in enumerate(
        ("-t ed25519", "-t rsa -b 2048", "-t ecdsa -b 256", "-t ecdsa -b 384", "-t ecdsa -b 521")
    ):
        path = directory / f"key{number}"
        command = ["ssh-keygen", "-q", "-N", "", "-C", "some one@home", "-f", str(path)]
        subprocess.run([*command, *options.split()], check=True)
        line = path.with_name(f"{path.name}.pub").read_text()
        found[line.split()[0]] = line
    return found


class KeyTests(StoreTestCase):
    """Keys in the store."""

    def setUp(self) -> None:
        super().setUp()
        self.alice = self.store.add_user("alice")
        self.store.add_user("bob")

    def test_added_listed_removed(self) -> None:
        """A key is found by user; it is removed by fingerprint, with or without its prefix."""
        with self.grows(all=1, keys=1):
            [key] = self.store.add_keys("alice", f"\n# mine\n{public_line('alice')}\r\n\n")
        line = parse_key_line(public_line("alice"))
        expected = KeyRecord(
            fingerprint(line.blob),
            *(self.alice.id, "alice", "ssh-ed25519", line.blob, "alice@home", SECONDS, ""),
        )
        self.assertEqual(key, expected)
        self.assertEqual(self.store.keys(), [key])
        self.assertEqual(self.store.keys("alice"), [key])
        self.assertEqual(self.store.keys("bob"), [])
        [other] = self.store.add_keys("bob", public_line("bob"))
        with self.grows(all=1, keys=1):
            removed = self.store.remove_key(key.fingerprint.removeprefix("SHA256:"))
        self.assertEqual(removed, key)
        self.assertEqual([each.user for each in self.store.keys()], ["bob"])
        with self.unchanged(), self.refused(key.fingerprint, "vmconsole key list"):
            self.store.remove_key(key.fingerprint)
        self.assertEqual(self.store.remove_key(other.fingerprint), other)

    def test_no_fingerprint(self) -> None:
        """What is no fingerprint is that of no key, whatever it is."""
        self.store.add_keys("alice", public_line("alice"))
        with self.unchanged():
            for name in ("", "SHA256:", "%", "x" * 300, "\0", "\ud800", "a\n", "SHA256:SHA256:"):
                with self.refused("There is no key 'SHA256:"):
                    self.store.remove_key(name)

    def test_twice(self) -> None:
        """A key is one user's: who has it already is said. All of a file are added, or none."""
        self.store.add_keys("alice", public_line("alice"))
        with self.unchanged():
            for user in ("alice", "bob"):
                with self.refused("'alice' has the key SHA256:"):
                    self.store.add_keys(user, public_line("bob") + "\n" + public_line("alice"))
            with self.refused("'bob' has the key SHA256:"):
                self.store.add_keys("bob", public_line("bob") + "\n\n" + public_line("bob"))
            # Other options or another comment make no other key of it.
            with self.refused("'alice' has the key SHA256:"):
                self.store.add_keys("bob", f'from="::1" {public_line("alice")} mine')
        self.store.remove_user("alice")
        self.store.add_keys("bob", public_line("alice"))

    def test_types(self) -> None:
        """Every type that the ssh server takes, as ssh-keygen and others write it."""
        directory = Path(self.mktemp())
        directory.mkdir()
        lines = lines_of_all_types(directory)
        self.assertEqual(set(lines), KEY_TYPES)
        records = self.store.add_keys("alice", "\n".join(lines.values()))
        for record, (kind, line) in zip(records, lines.items(), strict=True):
            self.assertEqual(record.type, kind)
            parsed = parse_key_line(line)
            self.assertEqual((record.blob, record.comment), (parsed.blob, parsed.comment))
            shown = subprocess.run(
                ["ssh-keygen", "-l", "-f", "-"], input=line, capture_output=True, text=True
            ).stdout
            self.assertIn(f" {record.fingerprint} ", shown)
        by_fingerprint = sorted(records, key=lambda record: record.fingerprint)
        self.assertEqual(self.store.keys(), by_fingerprint)

    def test_order(self) -> None:
        """By user, then by time, then by fingerprint, all by code points; as reading has them."""
        self.store.add_user("Zoe")
        for number in range(30):
            self.store.add_keys(("alice", "Zoe", "bob")[number % 3], ed25519_line(number))
        self.query(
            f"UPDATE keys SET created = {SECONDS - 9} WHERE comment = '' AND user_id = "
            f"'{self.alice.id}' AND fingerprint > 'SHA256:W'"
        )
        keys = self.store.keys()
        ordered = sorted(keys, key=lambda key: (key.user, key.created, key.fingerprint))
        self.assertEqual(keys, ordered)
        self.assertEqual([key.user for key in keys], ["Zoe"] * 10 + ["alice"] * 10 + ["bob"] * 10)
        self.assertEqual(self.store.keys("bob"), keys[20:])
        taken: list[KeyRecord] = []
        self.store.read_keys(None, taken.extend)
        self.assertEqual(taken, keys)

    def test_comments(self) -> None:
        """Comments are kept as they are, in whatever language."""
        comments = ["", "a b", "ü 日本 \U0001f600", "%s '\"\\ {0} :x", "x" * 10000]
        lines = [f"{ed25519_line(at)} {comment}" for at, comment in enumerate(comments)]
        records = self.store.add_keys("alice", "\n".join(lines))
        self.assertEqual([record.comment for record in records], comments)
        self.assertEqual({record.comment for record in self.store.keys()}, set(comments))

    def test_options(self) -> None:
        """What restricts a key is kept with it, in one form; what holds anyway is left out."""
        for at, (given_options, kept) in enumerate(
            (
                ("restrict", ""),
                ("no-user-rc,RESTRICT,no-port-forwarding", ""),
                ('from="10.0.0.0/8,!10.1.*,::1"', 'from="10.0.0.0/8,!10.1.*,::1"'),
                ('FROM="a\\"b,c\\d"', 'from="a\\"b,c\\d"'),
                ('expiry-time="20300101Z"', 'expiry-time="20300101000000Z"'),
                ('expiry-time="203001020304z"', 'expiry-time="20300102030400Z"'),
                ('expiry-time="2031010203Z",expiry-time="20300101Z"', None),
                (
                    'expiry-time="20310101Z",expiry-time="20300101Z"',
                    'expiry-time="20300101000000Z"',
                ),
                ("verify-required,restrict", "verify-required"),
                (
                    'verify-required,restrict,expiry-time="20300101Z",from="%s"',
                    'from="%s",expiry-time="20300101000000Z",verify-required',
                ),
            )
        ):
            line = f"{given_options} {sk_line(at)}"
            if kept is None:
                with self.unchanged(), self.refused("Line 1: its option expiry-time is no time"):
                    self.store.add_keys("alice", line)
                continue
            [record] = self.store.add_keys("alice", line)
            self.assertEqual(record.options, kept)
            self.assertIn(record, self.store.keys())
            served = parse_key_line(f"{record.options} {record.type} {line.split()[-2]}")
            self.assertEqual(served.options, parse_key_options(given_options))

    def test_options_refused(self) -> None:
        """What we cannot hold to is not dropped: the key is refused, with all of its file."""
        good = ed25519_line(1)
        with self.unchanged():
            for options, words in (
                ('command="x"', "its option command is not supported"),
                ('environment="A=b"', "its option environment is not supported"),
                ("cert-authority", "its option cert-authority is not supported"),
                ("pty", "its option pty is not supported"),
                ('from="!host"', "its option from excludes"),
                ("from=x", "its option from needs a value in quotes"),
                ('expiry-time="soon"', "its option expiry-time is no time"),
                ("verify-required", "its option verify-required is for sk- keys only"),
                (f'from="{"x" * 4095}"', "its options have more than 4096 characters"),
            ):
                with self.refused(f"Line 2: {words}"):
                    self.store.add_keys("alice", f"{ed25519_line(2)}\n{options} {good}")

    def test_options_that_grow(self) -> None:
        """Options that would be too long to be read again, in the form that is kept."""
        time = ',expiry-time="20300101"'
        sources = 'from="{}"'.format("x" * (4096 - len(time) - 7))
        with self.unchanged(), self.refused("Line 1: its options have more than 4096 characters"):
            self.store.add_keys("alice", f"{sources}{time} {ed25519_line(1)}")
        self.store.add_keys("alice", f"{sources} {ed25519_line(1)}")

    def test_read(self) -> None:
        """Keys are read in parts of bounded size, with the revision that they are of."""
        for user, numbers in (("alice", range(600)), ("bob", range(600, 777))):
            self.store.add_keys(user, "\n".join(ed25519_line(number) for number in numbers))
        parts: list[Sequence[KeyRecord]] = []
        revision = self.store.read_keys(None, parts.append)
        self.assertEqual(revision, self.store.revisions().keys)
        self.assertEqual([key for part in parts for key in part], self.store.keys())
        self.assertEqual([len(part) for part in parts], [250, 250, 250, 27])
        self.assertEqual(self.store.read_keys(revision - 1, lambda part: None), revision)

    def test_read_known(self) -> None:
        """Those that are known are not read; what is no change of keys makes none unknown."""
        self.assertEqual(self.store.read_keys(None, self.fail), self.store.revisions().keys)
        self.store.add_keys("alice", public_line("alice"))
        revision = self.store.read_keys(None, lambda part: None)
        self.store.grant("alice", "*")
        self.store.add_host("node1")
        self.assertEqual(self.store.read_keys(revision, self.fail), revision)
        self.store.add_keys("bob", public_line("bob"))
        parts: list[Sequence[KeyRecord]] = []
        self.assertEqual(self.store.read_keys(revision, parts.append), revision + 1)
        self.assertEqual(len(parts[0]), 2)

    def test_reader_that_fails(self) -> None:
        """Whoever takes the keys may raise: it is told, and the next one is served."""
        self.store.add_keys("alice", "\n".join(ed25519_line(number) for number in range(300)))

        def take(part: Sequence[KeyRecord]) -> None:
            raise KeyError("taken")

        for _ in range(20):
            self.assertRaises(KeyError, self.store.read_keys, None, take)
        self.store.read_keys(None, lambda part: None)
        self.store.add_user("carol")

    def test_hand_out(self) -> None:
        """Within the transaction, last: when the private key cannot be handed out, none is kept."""
        seen: list[int] = []
        other = self.another()
        self.store.add_keys("alice", ed25519_line(1), lambda: seen.append(len(other.keys())))
        self.assertEqual(seen, [0])

        def fail() -> None:
            raise OSError("no room")

        with self.unchanged():
            self.assertRaises(OSError, self.store.add_keys, "alice", ed25519_line(2), fail)
            # What is refused is not handed out.
            with self.refused("already"):
                self.store.add_keys("bob", ed25519_line(1), lambda: self.fail("handed out"))
            with self.refused("no user"):
                self.store.add_keys("eve", ed25519_line(3), lambda: self.fail("handed out"))
        self.store.add_keys("alice", ed25519_line(2))

    def test_private_key(self) -> None:
        """A private key is refused in whatever format, and nothing of it is said or stored."""
        key = Ed25519PrivateKey.generate()
        with self.unchanged():
            for format in (PrivateFormat.OpenSSH, PrivateFormat.PKCS8):
                private = key.private_bytes(Encoding.PEM, format, NoEncryption()).decode()
                for pasted in (
                    private,
                    private.replace("\n", " "),
                    f"{public_line('alice')}\n{private}",
                    "\n".join(private.split("\n")[1:-2]),
                    f"ssh-ed25519 {private.split()[4]}",
                ):
                    error = self.assertRaises(StoreError, self.store.add_keys, "alice", pasted)
                    for line in private.split("\n")[1:-2]:
                        self.assertNotIn(line[:16], str(error))
            with self.refused("private key"):
                self.store.add_keys("alice", "PuTTY-User-Key-File-3: ssh-ed25519\n")


class PostgresKeyTests(OnPostgres, KeyTests):
    """On PostgreSQL."""


class ParseTests(SynchronousTestCase):
    """``parse_public_keys``."""

    def test_refused(self) -> None:
        """Short RSA, broken blobs, control characters in the comment: each with its line."""
        short = rsa.generate_private_key(65537, 1024).public_key()
        weak = short.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
        good = public_line("alice")
        kind, blob, _ = good.split()
        for line, words in (
            (weak, "Line 1: an RSA key needs 2048 to 16384 bits, and this one has 1024."),
            (f"{kind} {blob[:-4]}", "Line 1"),
            (f"{kind} {blob[:24]}", "Line 1"),
            (f"{good}\x1b[2J", "control characters"),
            (f"{good}\x85x", "control characters"),
            (f"{good}\0x", "control characters"),
            (f"{good}\ud800x", "control characters"),
            ("x" * 20000, "too long"),
            ("hello", "no public key"),
            ("", "no key"),
            ("# only a comment", "no key"),
            (f"{good}\n\nhello", "Line 3"),
            (f"{good}\r\rhello", "Line 3"),
            (f"{good}\r\nhello", "Line 2"),
        ):
            error = str(self.assertRaises(StoreError, parse_public_keys, line))
            self.assertIn(words, error)
            self.assertTrue(error.isprintable())

    def test_private_body(self) -> None:
        """A private key without its first line, however it stands in a line, is refused."""
        keys: list[PrivateKeyTypes] = [
            Ed25519PrivateKey.generate(),
            Ed448PrivateKey.generate(),
            rsa.generate_private_key(65537, 2048),
            rsa.generate_private_key(65537, 4096),
            *(generate_private_key(curve()) for curve in (SECP256R1, SECP384R1, SECP521R1)),
        ]
        good = public_line("alice")
        for key in keys:
            for format in (
                PrivateFormat.OpenSSH,
                PrivateFormat.PKCS8,
                PrivateFormat.TraditionalOpenSSL,
            ):
                for secret in (NoEncryption(), BestAvailableEncryption(b"secret")):
                    try:
                        private = key.private_bytes(Encoding.PEM, format, secret).decode()
                    except (TypeError, ValueError):
                        continue
                    if "Proc-Type" in private:
                        # Encrypted as a whole: it begins with anything.
                        continue
                    body = "".join(private.split("\n")[1:-2])
                    first = private.split("\n")[1]
                    for line in (
                        f"{good} {body}",
                        f"{good} {first}",
                        f"{good} key={first}",
                        f'{good} my key: "{body}"',
                        f"{good}\n# {first}\n",
                        body,
                    ):
                        error = self.assertRaises(StoreError, parse_public_keys, line)
                        self.assertIn("This is a private key", str(error), private[:64])

    def test_harmless_comments(self) -> None:
        """What only looks a little like one is taken."""
        good = public_line("alice")
        for comment in (
            "MII",
            "MIIKKA",
            "MIIKKA.VIRTANEN@example.com, the laptop",
            "MIGRATIONSERVERPRODUCTION",
            "MC4 MC4CAQ",
            "MECHANICALENGINEERINGDEPARTMENT",
            "b3Blbn",
            "admiin@MII-SERVER-FINLAND-0001-RACK-2",
            "privatekey",
            "SHA256:jG0MIIabcdefghijklmnopqrstuvwxyzABCDEFGHIJKL",
        ):
            [key] = parse_public_keys(f"{good} {comment}")
            self.assertEqual(key.comment, f"alice@home {comment}")

    def test_harmless_blobs(self) -> None:
        """So is a public key whose own base64 has such letters in it."""
        public = Ed25519PrivateKey.generate().public_key()
        kind, text = public.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode().split()
        for inside in ("MIIEpAIBAAKCAQEA7bq3Zl8v", "MC8CAQAwBQYDK2VwBCIEIJ3v"):
            changed = f"{text[:30]}{inside}{text[30 + len(inside) :]}"
            self.assertEqual(len(changed), len(text))
            [key] = parse_public_keys(f"{kind} {changed}")
            self.assertIn(inside, str(key))

    def test_foreign_types(self) -> None:
        """Keys that OpenSSH has no more, or never had."""
        key = dsa.generate_private_key(1024).public_key()
        old = key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
        self.assertIn("ssh-dss", str(self.assertRaises(StoreError, parse_public_keys, old)))
        curve = generate_private_key(SECP256K1()).public_key()
        pem = curve.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
        self.assertIn("Line 1", str(self.assertRaises(StoreError, parse_public_keys, pem)))

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
        blob = string(kind.encode()) + rest
        try:
            parse_public_keys(f"{kind} {b64encode(blob).decode()}")
        except StoreError:
            pass
