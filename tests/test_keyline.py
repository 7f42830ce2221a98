"""Which lines count as keys, and under which options."""

from __future__ import annotations

from base64 import b64encode

from hypothesis import given
from hypothesis import strategies as some
from twisted.trial.unittest import SynchronousTestCase

from tests.engine_kit import public_line
from vmconsole.engine.keyline import parse_key_line
from vmconsole.keyoptions import NO_OPTIONS, KeyOptions
from vmconsole.publickeys import KEY_TYPES


def key_line(kind: str) -> str:
    """A line with a key of type ``kind``, which is not sound."""
    blob = len(kind).to_bytes(4, "big") + kind.encode() + b"rest"
    return f"{kind} {b64encode(blob).decode()}"


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
        self.assertEqual(key.options, NO_OPTIONS)

    def test_no_options(self) -> None:
        """Without options none are set."""
        self.assertEqual(parse_key_line(public_line("alice")).options, NO_OPTIONS)

    def test_options(self) -> None:
        """What is honoured is read, blanks and quotes in the values included."""
        key = parse_key_line(
            f'restrict,from="10.*,!10.0.0.1",Expiry-Time="20300102030405Z"\t {public_line("alice")}'
        )
        self.assertEqual(key.options, KeyOptions(("10.*", "!10.0.0.1"), 1893553445.0))
        self.assertEqual(str(key), public_line("alice"))

    def test_bad_options(self) -> None:
        """Malformed values disable the key, and are not shown."""
        for options, words in (
            ('from="secret/8"', "its option from has a malformed network"),
            ('from="!secret,*"', "its option from excludes"),
            ('from="secret, x"', "its option from has"),
            ("from=secret", "its option from needs"),
            ('from="*",from="*"', "its option from is there twice"),
            ('expiry-time="secret"', "its option expiry-time is no time"),
            ('from="secret', "no public key"),
            ('restrict, from="*"', "no public key"),
            ('\\"restrict', "no public key"),
        ):
            error = self.assertRaises(
                ValueError, parse_key_line, f"{options} {public_line('alice')}"
            )
            self.assertIn(words, str(error))
            self.assertNotIn("secret", str(error))

    def test_verify_required(self) -> None:
        """Of a token it is demanded; no other key can do it, so that it disables such a key."""
        for kind in sorted(KEY_TYPES):
            line = f"verify-required {key_line(kind)}"
            if kind.startswith("sk-"):
                self.assertEqual(parse_key_line(line).options, KeyOptions(verify_required=True))
            else:
                error = self.assertRaises(ValueError, parse_key_line, line)
                self.assertEqual(str(error), "its option verify-required is for sk- keys only")

    def test_long(self) -> None:
        """16 KiB are the most that a line may have; the largest RSA key takes a fifth of that."""
        line = f"{key_line('ssh-rsa')} ".ljust(16384, "x")
        parse_key_line(line)
        error = self.assertRaises(ValueError, parse_key_line, line + "x")
        self.assertEqual(str(error), "it is too long")
        self.assertRaises(ValueError, parse_key_line, line.replace("xx", "  ") + " ")
        number = b"\1" * 2049
        blob = b"\0\0\0\x07ssh-rsa\0\0\0\3\1\0\1" + len(number).to_bytes(4, "big") + number
        self.assertEqual(parse_key_line(f"ssh-rsa {b64encode(blob).decode()}").blob, blob)

    def test_other_options(self) -> None:
        """Any other option disables the key, and is named."""
        for options, name in (
            ("pty", "pty"),
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
            self.assertEqual(parse_key_line(key_line(kind)).blob, blob)
        for kind in ("ssh-dss", "ssh-ed25519-cert-v01@openssh.com"):
            error = self.assertRaises(ValueError, parse_key_line, f"{key_line(kind)} comment")
            self.assertIn(kind, str(error))

    def test_no_key(self) -> None:
        """Other lines are refused, in words that hold nothing of the line."""
        _, blob, _ = public_line("alice").split()
        for line in (
            "",
            "secret",
            "ssh-ed25519",
            "ssh-ed25519 secret",
            f"ssh-rsa {blob}",
            f"secret\udc80 {blob}",
            f"ssh-ed25519 {blob[:-1]}",
            f"ssh-ed25519 {blob[:20]}!{blob[20:]}",
            "ssh-ed25519 AAAA",
            'command="secret',
            f'x="{"a" * 16000}',
            "\\" * 16000,
            '\\"' * 8000,
            '"' * 16001,
            "a" * 100000,
            "-----BEGIN OPENSSH PRIVATE KEY-----",
        ):
            error = self.assertRaises(ValueError, parse_key_line, line)
            self.assertIn(
                str(error), ("this is no public key in the format of OpenSSH", "it is too long")
            )

    @given(some.text())
    def test_anything(self, line: str) -> None:
        """Any text is a key, or a ValueError."""
        for text in (line, f"{line} {public_line('alice')}", f"{public_line('alice')} {line}"):
            try:
                parse_key_line(text)
            except ValueError:
                pass
