"""Certificates of ssh-keygen's, with OpenSSH's own client; and how that learns of new host keys."""

from __future__ import annotations

import os
import subprocess
from base64 import b64decode
from pathlib import Path
from shutil import copy

from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
from twisted.conch.ssh.keys import Key
from twisted.internet import reactor
from twisted.internet.threads import deferToThread

from tests.functional.clients import Command, make_key
from tests.functional.interop import InteropCase
from tests.functional.process import Child
from tests.functional.server import Server
from vmconsole.config import SSH, Config
from vmconsole.ssh.certificates import parse_certificate
from vmconsole.ssh.hostkeys import HostKeys


class CertificateCase(InteropCase):
    """A server that trusts a CA of ssh-keygen's, and knows the user's name."""

    async def setUp(self) -> None:  # type: ignore[override]
        await super().setUp()
        self.ca = await deferToThread(make_key, self.folder, "ecdsa")
        self.revoked = self.folder / "revoked"
        self.revoked.write_text("serial: 9\n")
        self.keys = [
            Key(ed25519.Ed25519PrivateKey.generate()),
            Key(rsa.generate_private_key(65537, 2048)),
            Key(ed25519.Ed25519PrivateKey.generate()),
        ]

    def serve(self, *certificates: Path) -> None:
        """With these host certificates."""
        parsed = [
            parse_certificate(b64decode(path.read_text().split()[1])) for path in certificates
        ]
        config = Config(ssh=SSH(user_ca=f"{self.ca}.pub", revoked_keys=str(self.revoked)))
        own = self.key.with_name(f"{self.key.name}.pub").read_text()
        self.server = Server(reactor, config, own, host_keys=HostKeys(self.keys, parsed))
        self.server.listen(self.folder / "known_hosts")
        self.addCleanup(self.server.close)

    async def issue(self, public: Path, *options: str) -> Path:
        """Have the CA sign a public key."""
        words = ["ssh-keygen", "-q", "-s", str(self.ca), "-I", "it", *options, str(public)]
        await deferToThread(subprocess.run, words, check=True)
        return public.with_name(f"{public.stem}-cert.pub")

    def ssh(self, key: Path, *words: str, options: tuple[str, ...] = ()) -> Command:
        """OpenSSH's client, with the certificate that lies beside the key."""
        known_hosts = self.folder / "known_hosts"
        line = ["ssh", "-F", "none", "-p", str(self.server.port), "-i", str(key)]
        for option in (
            *("IdentitiesOnly=yes", "IdentityAgent=none", "BatchMode=yes"),
            *(f"UserKnownHostsFile={known_hosts}", "GlobalKnownHostsFile=/dev/null"),
            *("StrictHostKeyChecking=yes", *options),
        ):
            line += ["-o", option]
        return Command([*line, "vmproxy@127.0.0.1", *words], dict(os.environ))

    async def status(self, key: Path, *options: str) -> tuple[int, str]:
        """The exit status of a command, and what was written to standard error."""
        told = await self.run_to_end(self.ssh(key, "exit", "7", options=options))
        return told.status or 0, told.errors.decode()


class UserTests(CertificateCase):
    """User certificates."""

    async def test_login(self) -> None:
        """Keys of each type, which the engine does not know, let in with a certificate, and what
        the client is told of those that do not."""
        self.serve()
        for kind in ("ed25519", "rsa", "ecdsa"):
            folder = self.folder / kind
            folder.mkdir()
            key = await deferToThread(make_key, folder, kind)
            public = key.with_name(f"{key.name}.pub")
            self.assertEqual((await self.status(key))[0], 255)
            await self.issue(public, "-n", "alice", "-z", "8")
            self.assertEqual(await self.status(key), (7, ""))
            event = self.server.events.named("login_accepted")[-1]
            self.assertTrue(event["certificate"].startswith("serial=8 ca=SHA256:"))
            for options, words in (
                (("-n", "alice@internal", "-z", "9"), "the certificate has been revoked"),
                (("-n", "alice@internal", "-V", "20200101:20200102"), "the certificate expired"),
                (("-n", "al"), "the engine knows no user by the certificate's principals"),
                (
                    ("-n", "alice@internal", "-O", "source-address=192.0.2.0/24"),
                    "the certificate may not be used from 127.0.0.1",
                ),
                (("-h", "-n", "alice@internal"), "Permission denied"),
            ):
                await self.issue(public, *options)
                status, errors = await self.status(key)
                self.assertEqual(status, 255)
                self.assertIn(words, errors)

    async def test_force_command(self) -> None:
        """The certificate's command runs in the place of the client's."""
        self.serve()
        folder = self.folder / "forced"
        folder.mkdir()
        key = await deferToThread(make_key, folder, "ed25519")
        public = key.with_name(f"{key.name}.pub")
        await self.issue(public, "-n", "alice@internal", "-O", "force-command=exit 5")
        self.assertEqual((await self.status(key))[0], 5)


class HostTests(CertificateCase):
    """Host certificates, and new host keys."""

    async def certify(self, number: int) -> Path:
        """A certificate for a host key."""
        public = self.folder / f"host{number}.pub"
        public.write_bytes(self.keys[number].public().toString("OPENSSH") + b"\n")
        return await self.issue(public, "-h", "-n", "127.0.0.1")

    async def test_trusted_by_the_ca(self) -> None:
        """A client that knows the CA alone trusts the host, by each algorithm."""
        self.serve(await self.certify(0), await self.certify(1))
        line = Path(f"{self.ca}.pub").read_text()
        (self.folder / "known_hosts").write_text(f"@cert-authority [127.0.0.1]:* {line}")
        for kind in ("ssh-ed25519", "rsa-sha2-512", "rsa-sha2-256"):
            name = f"{kind}-cert-v01@openssh.com"
            options = (f"HostKeyAlgorithms={name}", "LogLevel=DEBUG1")
            status, errors = await self.status(self.key, *options)
            self.assertEqual(status, 7, errors)
            self.assertIn(f"kex: host key algorithm: {name}", errors)

    async def test_update_host_keys(self) -> None:
        """A client that knows the first key learns the others, and forgets what is gone."""
        self.serve()
        known_hosts = self.folder / "known_hosts"
        lines = known_hosts.read_text().splitlines()
        old = Key(ed25519.Ed25519PrivateKey.generate()).public().toString("OPENSSH").decode()
        place = lines[0].split()[0]
        known_hosts.write_text(f"{lines[0]}\n{place} {old}\n")
        copy(known_hosts, self.folder / "before")
        echo: Child = self.start(self.ssh(self.key, "echo", options=("UpdateHostKeys=yes",)))
        await echo.expect(b"ready;")
        # The answer to the client's question comes before what it says from now on.
        echo.type(b"hello")
        await echo.expect(b"hello")
        echo.end_input()
        await echo.ended()
        found = {tuple(line.split()[1:3]) for line in known_hosts.read_text().splitlines()}
        expected = {
            tuple(key.public().toString("OPENSSH").decode().split()[:2]) for key in self.keys
        }
        self.assertEqual(found, expected, echo.errors)
