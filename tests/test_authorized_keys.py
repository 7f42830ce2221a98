"""Whose key a blob is, how often the engine is asked, and which lines count as keys."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as some
from twisted.internet.defer import Deferred
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import implementer
from zope.interface.verify import verifyObject

from tests.engine_kit import EngineTestCase, public_line, start
from vmconsole.engine.authorized_keys import AuthorizedKeys
from vmconsole.engine.keyline import parse_key_line
from vmconsole.errors import EngineError, EngineUnreachable
from vmconsole.interfaces import AuthorizedKey, ConsoleInfo, IEngine, User
from vmconsole.publickeys import KEY_TYPES, fingerprint

ALICE = AuthorizedKey("1", "alice@internal", b"alice's key")
BOB = AuthorizedKey("2", "bob@internal", b"bob's key")


@implementer(IEngine)
class AnsweringEngine:
    """Answers ``keys``, or fails with ``error``, or when told; counts the questions."""

    def __init__(self, *keys: AuthorizedKey) -> None:
        self.keys: Sequence[AuthorizedKey] = keys
        self.error: EngineError | None = None
        self.asked = 0
        self.later: Deferred[None] | None = None

    async def authorized_keys(self) -> Sequence[AuthorizedKey]:
        self.asked += 1
        if self.later is not None:
            await self.later
        if self.error is not None:
            raise self.error
        return self.keys

    async def consoles(self, user_id: str, fresh: bool = False) -> Sequence[ConsoleInfo]:
        return []


class AuthorizedKeysTests(EngineTestCase):
    """``AuthorizedKeys``."""

    def setUp(self) -> None:
        super().setUp()
        self.engine = AnsweringEngine(ALICE, BOB)
        verifyObject(IEngine, self.engine)
        self.keys = AuthorizedKeys(self.engine, self.clock, cache_ttl=5.0)

    def lookup(self, blob: bytes) -> User | None:
        return self.result(self.keys.lookup(blob))

    def test_found(self) -> None:
        """A known key gives its user; the second lookup asks nobody."""
        self.assertEqual(self.lookup(ALICE.blob), User("1", "alice@internal"))
        self.assertEqual(self.lookup(BOB.blob), User("2", "bob@internal"))
        self.assertEqual(self.engine.asked, 1)

    def test_refreshed(self) -> None:
        """After cache_ttl the engine is asked again, and a removed key is gone."""
        self.lookup(ALICE.blob)
        self.engine.keys = [BOB]
        self.clock.advance(4.9)
        self.assertIsNotNone(self.lookup(ALICE.blob))
        self.clock.advance(0.1)
        self.assertIsNone(self.lookup(ALICE.blob))
        self.assertEqual(self.engine.asked, 2)

    def test_clock_set_back(self) -> None:
        """An answer does not last longer because the clock went back."""
        self.lookup(ALICE.blob)
        self.clock.rightNow -= 3600
        self.lookup(ALICE.blob)
        self.assertEqual(self.engine.asked, 2)

    def test_strangers(self) -> None:
        """Unknown keys make us ask at most once a second; a new key is found after that."""
        self.lookup(ALICE.blob)
        for number in range(100):
            self.assertIsNone(self.lookup(b"stranger %d" % number))
        self.assertEqual(self.engine.asked, 1)
        carol = AuthorizedKey("3", "carol@internal", b"carol's key")
        self.engine.keys = [ALICE, BOB, carol]
        self.assertIsNone(self.lookup(carol.blob))
        self.clock.advance(1.0)
        self.assertEqual(self.lookup(carol.blob), User("3", "carol@internal"))
        self.assertEqual(self.engine.asked, 2)

    def test_ttl_of_zero(self) -> None:
        """Without a cache each known key is asked about, and strangers' still are not."""
        self.keys = AuthorizedKeys(self.engine, self.clock, cache_ttl=0)
        for _ in range(3):
            self.lookup(ALICE.blob)
        self.assertEqual(self.engine.asked, 3)
        self.lookup(b"stranger")
        self.assertEqual(self.engine.asked, 3)

    def test_ambiguous(self) -> None:
        """A key of two users is nobody's, others are not affected, and the log has it once."""
        twin = AuthorizedKey("3", "carol\n@internal", ALICE.blob)
        third = AuthorizedKey("4", "dave@internal", ALICE.blob)
        self.engine.keys = [ALICE, BOB, twin, third]
        for _ in range(3):
            self.assertIsNone(self.lookup(ALICE.blob))
            self.assertIsNotNone(self.lookup(BOB.blob))
            self.clock.advance(6)
            self.engine.keys = list(self.engine.keys)
        [line] = self.logged(fingerprint(ALICE.blob))
        self.assertIn("alice@internal, carol\\n@internal, dave@internal", line)

    def test_same_user_twice(self) -> None:
        """A key that a user has twice is the user's."""
        self.engine.keys = [ALICE, ALICE]
        self.assertEqual(self.lookup(ALICE.blob), User("1", "alice@internal"))

    def test_no_answer(self) -> None:
        """The engine's error comes through, and it is left alone for a second."""
        self.engine.error = EngineUnreachable("The engine does not answer.")
        for _ in range(10):
            text = self.failure(self.keys.lookup(ALICE.blob), EngineUnreachable)
            self.assertEqual(text, "The engine does not answer.")
        self.assertEqual(self.engine.asked, 1)
        self.engine.error = None
        self.clock.advance(1.0)
        self.assertIsNotNone(self.lookup(ALICE.blob))

    def test_indexed_once(self) -> None:
        """All who wait for one answer share the index made of it."""
        self.engine.later = Deferred()
        lookups = [start(self.keys.lookup(ALICE.blob)) for _ in range(3)]
        self.engine.later.callback(None)
        for lookup in lookups:
            self.assertIsNotNone(self.successResultOf(lookup))


class KeyLineTests(SynchronousTestCase):
    """``parse_key_line``."""

    def test_plain(self) -> None:
        """Type, blob, and a comment that may hold anything."""
        line = public_line("alice").split()
        key = parse_key_line(f"  {line[0]}\t{line[1]}  alice of AAAA, at home \n")
        self.assertEqual((key.type, key.comment), ("ssh-ed25519", "alice of AAAA, at home"))
        self.assertEqual(b64encode(key.blob).decode(), line[1])
        self.assertEqual(str(key), f"{line[0]} {line[1]} alice of AAAA, at home")

    def test_no_comment(self) -> None:
        """A comment is not needed."""
        line = " ".join(public_line("alice").split()[:2])
        self.assertEqual(str(parse_key_line(line)), line)

    def test_harmless_options(self) -> None:
        """What asks for less than holds here anyway is taken, in any case."""
        options = "restrict,no-port-forwarding,no-X11-forwarding,no-agent-forwarding,NO-USER-RC"
        key = parse_key_line(f"{options} {public_line('alice')}")
        self.assertEqual(str(key), public_line("alice"))

    def test_other_options(self) -> None:
        """Any other option disables the key, and is named."""
        for options, name in (
            ('from="10.0.0.1"', "from"),
            ("no-pty", "no-pty"),
            ('restrict,command="echo \\"a, b\\" c"', "command"),
            ('environment="A=ssh-ed25519 AAAA"', "environment"),
            ("cert-authority", "cert-authority"),
            ("no-touch-required,restrict", "no-touch-required"),
            ("permitopen", "permitopen"),
            ("\x1b[2J", "\\x1b[2J"),
        ):
            error = self.assertRaises(
                ValueError, parse_key_line, f"{options} {public_line('alice')}"
            )
            self.assertIn(f"option {name} ", str(error))

    def test_types(self) -> None:
        """The types that the ssh server verifies, sk- too; DSA and certificates are refused."""
        for kind in sorted(KEY_TYPES):
            blob = len(kind).to_bytes(4, "big") + kind.encode() + b"rest"
            self.assertEqual(parse_key_line(f"{kind} {b64encode(blob).decode()}").blob, blob)
        for kind in ("ssh-dss", "ssh-ed25519-cert-v01@openssh.com"):
            blob = len(kind).to_bytes(4, "big") + kind.encode() + b"rest"
            line = f"{kind} {b64encode(blob).decode()} comment"
            self.assertIn(kind, str(self.assertRaises(ValueError, parse_key_line, line)))

    def test_no_key(self) -> None:
        """Other lines are refused, in words that hold nothing of the line."""
        _, blob, _ = public_line("alice").split()
        for line in (
            "",
            "secret",
            "ssh-ed25519",
            "ssh-ed25519 secret",
            f"ssh-rsa {blob}",
            f"ssh-ed25519 {blob[:-1]}",
            f"ssh-ed25519 {blob[:20]}!{blob[20:]}",
            "ssh-ed25519 AAAA",
            'command="secret',
            f'x="{"a" * 100000}',
            "\\" * 100000,
            "-----BEGIN OPENSSH PRIVATE KEY-----",
        ):
            error = self.assertRaises(ValueError, parse_key_line, line)
            self.assertNotIn("secret", str(error))

    @given(some.text())
    def test_anything(self, line: str) -> None:
        """Any text is a key, or a ValueError."""
        for text in (line, f"{line} {public_line('alice')}", f"{public_line('alice')} {line}"):
            try:
                parse_key_line(text)
            except ValueError:
                pass
