"""Host keys: made when missing, refused when they are no good."""

from __future__ import annotations

import os
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from twisted.conch.ssh.keys import Key
from twisted.trial.unittest import SynchronousTestCase

from tests.sshpair import SSHPair
from vmconsole import pki
from vmconsole.config import SSH, Config, State
from vmconsole.errors import ConfigError
from vmconsole.ssh.algorithms import choose_all_algorithms
from vmconsole.ssh.hostkeys import load_host_keys


class HostKeyTests(SynchronousTestCase):
    """In a state directory of their own."""

    def setUp(self) -> None:
        self.state = Path(self.mktemp()).absolute()

    def config(self, *names: str) -> Config:
        """A configuration with these host keys."""
        ssh = SSH(host_keys=names) if names else SSH()
        return Config(ssh=ssh, state=State(directory=str(self.state)))

    def put(self, name: str, key: object, mode: int = 0o600) -> None:
        """A private key file."""
        self.state.mkdir(exist_ok=True)
        pki.write_private(self.state / name, Key(key).toString("OPENSSH", subtype="v1"))
        (self.state / name).chmod(mode)

    def refused(self, *names: str) -> str:
        """The text of the refusal; it names the file."""
        with self.assertRaises(ConfigError) as caught:
            load_host_keys(self.config(*names))
        self.assertIn(str(self.state / names[-1]), str(caught.exception))
        return str(caught.exception)

    def test_made(self) -> None:
        """At the first start both keys are made, ed25519 and RSA 3072, mode 0600, with their
        public halves; the second start has the same ones."""
        keys = load_host_keys(self.config())
        by_type = {key.sshType(): key for key in keys}
        self.assertEqual(by_type[b"ssh-rsa"].size(), 3072)
        for name in self.config().ssh.host_keys:
            self.assertEqual((self.state / name).stat().st_mode & 0o777, 0o600)
            public = Key.fromFile(str(self.state / f"{name}.pub"))
            self.assertEqual(public, by_type[public.sshType()].public())
        self.assertEqual(load_host_keys(self.config()), keys)
        self.assertEqual(self.state.stat().st_mode & 0o777, 0o700)

    def test_others_may_read(self) -> None:
        """A private key that others may read is refused."""
        self.put("k", ed25519.Ed25519PrivateKey.generate(), mode=0o644)
        self.assertIn("chmod 600", self.refused("k"))

    def test_wrong_kinds(self) -> None:
        """ECDSA, a small RSA key, one that is named twice, a passphrase, garbage: all refused."""
        self.put("ecdsa", ec.generate_private_key(ec.SECP256R1()))
        self.assertIn("ed25519 or RSA", self.refused("ecdsa"))
        self.put("small", rsa.generate_private_key(65537, 1024))
        self.assertIn("2048 bits or more", self.refused("small"))
        self.put("one", ed25519.Ed25519PrivateKey.generate())
        self.assertIn("names this key twice", self.refused("one", "one"))
        locked = Key(ed25519.Ed25519PrivateKey.generate())
        pki.write_private(
            self.state / "locked", locked.toString("OPENSSH", subtype="v1", passphrase="x")
        )
        self.assertIn("passphrase", self.refused("locked"))
        pki.write_private(self.state / "garbage", b"no key at all")
        self.assertIn("no private key", self.refused("garbage"))

    def test_public_half(self) -> None:
        """A public key in the place of a private one is refused: no handshake would succeed."""
        self.state.mkdir()
        for raw in (ed25519.Ed25519PrivateKey.generate(), rsa.generate_private_key(65537, 2048)):
            public = Key(raw).public().toString("OPENSSH")
            pki.write_private(self.state / "public", public)
            self.assertIn("public half", self.refused("public"))

    def test_cut_short(self) -> None:
        """A file that ends too early, as after a full disk, is refused, wherever it was cut."""
        self.state.mkdir()
        whole = Key(ed25519.Ed25519PrivateKey.generate()).toString("OPENSSH", subtype="v1")
        for size in range(len(whole) // 2):
            pki.write_private(self.state / "cut", whole[:size])
            self.assertIn("no private key", self.refused("cut"))

    def test_missing_with_an_odd_name(self) -> None:
        """A missing key whose kind its name does not tell is not made, and a check that makes
        nothing tells of it, too."""
        self.assertIn("ed25519 or rsa", self.refused("hostkey"))
        with self.assertRaises(ConfigError):
            load_host_keys(self.config("hostkey"), make_missing=False)
        self.assertEqual(load_host_keys(self.config("ed25519"), make_missing=False), [])

    def test_cannot_be_made(self) -> None:
        """A state directory that cannot be written to is told."""
        self.state.write_text("a file")
        self.assertIn("cannot be read: Not a directory", self.refused("ed25519"))
        self.state = Path("/proc/nowhere")
        self.assertIn("cannot be made", self.refused("ed25519"))

    def test_a_killed_start(self) -> None:
        """What a start that was killed left half-written does not disturb the next."""
        self.state.mkdir()
        (self.state / "ed25519.new").write_text("half")
        load_host_keys(self.config("ed25519"))
        self.assertEqual(sorted(os.listdir(self.state)), ["ed25519", "ed25519.pub"])

    def test_nothing_to_offer(self) -> None:
        """Host key algorithms that go with none of the keys are refused at the start."""
        ssh = SSH(host_key_algorithms=("rsa-sha2-512",))
        self.assertRaises(ConfigError, SSHPair, Config(ssh=ssh))
        self.assertRaises(ConfigError, choose_all_algorithms, ssh, {b"ssh-ed25519"})
