"""``vmconsole pki``, with the real openssl."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from tests.cli_kit import PROCESS, ROOT, CliTestCase
from vmconsole import pki
from vmconsole.engine.credentials import ticket_certificate_problems
from vmconsole.engine.embedded.identity import ticket_identities


class PkiTestCase(CliTestCase):
    """Certificates in the state directory."""

    def setUp(self) -> None:
        super().setUp()
        self.pki = self.state / "pki"

    def openssl(self, *arguments: str | Path) -> int:
        """The exit status."""
        command = ["openssl", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, check=False).returncode

    def is_for(self, certificate: Path, purpose: str, *options: str) -> bool:
        """Whether openssl takes it for that purpose, by our CA."""
        ca = ("-CAfile", self.pki / "cacert.pem", "-x509_strict")
        return not self.openssl("verify", *ca, "-purpose", purpose, *options, certificate)

    def files(self) -> dict[str, bytes]:
        """All files in the directory."""
        return {
            str(path.relative_to(self.pki)): path.read_bytes()
            for path in self.pki.rglob("*")
            if path.is_file()
        }

    def authority(self, days: int, issued: timedelta = timedelta(0)) -> None:
        """A CA that ends in ``days``."""
        self.pki.mkdir(mode=0o700, parents=True, exist_ok=True)
        ca = pki.make_authority("CA", datetime.now(UTC) - issued, days + issued.days)
        ca.save(self.pki / "cacert.pem", self.pki / "cakey.pem")


class InitTests(PkiTestCase):
    """``pki init``."""

    def test_init(self) -> None:
        """A CA, its key for its owner only, whatever the umask; it says what is next."""
        old = os.umask(0o027)
        try:
            said = self.good("pki", "init")
        finally:
            os.umask(old)
        self.assertIn("vmconsole pki host NAME", said)
        self.assertIn("vmconsole pki proxy", said)
        self.assertEqual(sorted(self.files()), ["cacert.pem", "cakey.pem"])
        for path, mode in (("", 0o700), ("cacert.pem", 0o644), ("cakey.pem", 0o600)):
            self.assertEqual((self.pki / path).stat().st_mode & 0o777, mode, path)
        self.assertTrue(self.is_for(self.pki / "cacert.pem", "any"))
        subject = pki.Identity.load(self.pki / "cacert.pem", self.pki / "cakey.pem").certificate
        self.assertEqual(subject.subject.rfc4514_string(), "CN=vmconsole hosts CA")

    def test_never_overwritten(self) -> None:
        """A CA that is there stays, even half of one, and --renew is not for it."""
        self.good("pki", "init")
        before = self.files()
        self.assertIn("never overwritten", self.bad("pki", "init"))
        self.bad("pki", "init", "--renew", status=2)
        self.assertEqual(self.files(), before)
        (self.pki / "cacert.pem").unlink()
        for command in (("init",), ("host", "node1"), ("proxy",)):
            said = self.bad("pki", *command)
            self.assertIn("cakey.pem without cacert.pem", said)
            self.assertIn("it may be removed", said)
        self.assertEqual(list(self.files()), ["cakey.pem"])

    def test_directory(self) -> None:
        """The directory is hosts.pki, when that is set."""
        self.configure('[hosts]\npki = "tls"')
        self.good("pki", "init")
        self.good("pki", "host", "node1")
        self.assertNotIn("Set in vmconsole.toml", self.good("pki", "proxy"))
        self.assertTrue((self.state / "tls" / "clientcert.pem").exists())
        self.assertFalse(self.pki.exists())
        self.assertIn("good", self.good("check"))

    def test_unwritable(self) -> None:
        """What cannot be written is one line, and leaves nothing that is half there."""
        self.state.write_bytes(b"")
        self.assertIn("cannot be written: Not a directory", self.bad("pki", "init"))
        self.state.unlink()
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "VMCONSOLE_CONFIG": str(self.config)}
        done = subprocess.run(
            [sys.executable, "-c", PROCESS, "pki", "init"],
            env=environment,
            capture_output=True,
            text=True,
            # As on a full disk, files stay empty.
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)),
            check=False,
        )
        self.assertEqual((done.returncode, done.stdout), (1, ""))
        self.assertEqual(
            done.stderr, f"ERROR: The files in {self.pki} cannot be written: File too large.\n"
        )
        self.assertEqual(self.files(), {})

    def test_owner(self) -> None:
        """Made by root, all belongs to whom the state directory belongs to: the service."""
        if os.geteuid():
            self.skipTest("only root can give files away")
        self.state.mkdir(mode=0o700)
        os.chown(self.state, 12345, 23456)
        for line in ("init", "host node1", "proxy", "ticket"):
            self.good("pki", *line.split())
        for path in self.state.rglob("*"):
            self.assertEqual((path.stat().st_uid, path.stat().st_gid), (12345, 23456), path)


class HostTests(PkiTestCase):
    """``pki host``."""

    def setUp(self) -> None:
        super().setUp()
        self.authority(3650)

    def test_host(self) -> None:
        """A server certificate for all names, with its CA; it says where to copy that to."""
        names = ["node1.example.com", "node1", "10.0.0.1", "2001:DB8::1"]
        said = self.good("pki", "host", *names)
        for words in (
            "/etc/pki/CA/cacert.pem",
            "/etc/pki/libvirt/servercert.pem",
            "/etc/pki/libvirt/private/serverkey.pem",
            "libvirtd-tls.socket",
            "virtproxyd-tls.socket",
        ):
            self.assertIn(words, said)
        folder = self.pki / "hosts" / names[0]
        modes = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}
        self.assertEqual(
            modes, {"cacert.pem": 0o644, "servercert.pem": 0o644, "serverkey.pem": 0o600}
        )
        self.assertEqual(folder.stat().st_mode & 0o777, 0o700)
        ca = (self.pki / "cacert.pem").read_bytes()
        self.assertEqual((folder / "cacert.pem").read_bytes(), ca)
        certificate = folder / "servercert.pem"
        for name in names[:2]:
            self.assertTrue(self.is_for(certificate, "sslserver", "-verify_hostname", name))
        for name in names[2:]:
            self.assertTrue(self.is_for(certificate, "sslserver", "-verify_ip", name))
        self.assertFalse(self.is_for(certificate, "sslserver", "-verify_hostname", "node2"))
        self.assertFalse(self.is_for(certificate, "sslclient"))
        self.assertTrue(pki.Identity.load(certificate, folder / "serverkey.pem").is_pair())

    def test_names(self) -> None:
        """What is no name of a host, or would lead elsewhere, is refused."""
        long = ".".join(["x" * 63] * 4)
        for name in (
            "",
            ".",
            "..",
            "../node1",
            "a/b",
            "*.example.com",
            "*",
            "node1.",
            "no de1",
            "-node1",
            "node1\n",
            "n\u00f6de1",
            "10.0.0.300",
            "fe80::1%eth0",
            "[::1]",
            "x" * 64,
            long,
        ):
            for names in ([name], ["node1", name]):
                said = self.bad("pki", "host", "--", *names)
                self.assertIn("no name for a host", said, repr(name))
        self.assertFalse((self.pki / "hosts").exists())
        self.good("pki", "host", long[:253].rsplit("x", 2)[0] + "x", "a_b.example.com", "::1")
        self.good("pki", "host", "::2")
        self.assertTrue((self.pki / "hosts" / "::2" / "servercert.pem").exists())

    def test_existing(self) -> None:
        """What is there stays, and is told until when it is valid; --renew replaces it."""
        self.good("pki", "host", "node1", "10.0.0.1")
        before = self.files()
        end = f"{datetime.now(UTC) + timedelta(days=825):%F}"
        self.assertIn(f"exists, valid until {end}: use --renew", self.bad("pki", "host", "node1"))
        self.assertEqual(self.files(), before)
        self.good("pki", "host", "node1", "node1.example.com", "--renew")
        certificate = self.pki / "hosts" / "node1" / "servercert.pem"
        self.assertNotEqual(certificate.read_bytes(), before["hosts/node1/servercert.pem"])
        self.assertFalse(self.is_for(certificate, "sslserver", "-verify_ip", "10.0.0.1"))
        self.assertTrue(
            self.is_for(certificate, "sslserver", "-verify_hostname", "node1.example.com")
        )
        loaded = pki.Identity.load(certificate, certificate.with_name("serverkey.pem"))
        self.assertTrue(loaded.is_pair())

    def test_renewed_names(self) -> None:
        """To renew, the first name is enough: the others stay."""
        self.good("pki", "host", "node1", "node1.example.com", "10.0.0.1")
        said = self.good("pki", "host", "node1", "--renew")
        self.assertIn("for node1, node1.example.com, 10.0.0.1", said)
        certificate = self.pki / "hosts" / "node1" / "servercert.pem"
        self.assertTrue(self.is_for(certificate, "sslserver", "-verify_ip", "10.0.0.1"))

    def test_renew_what_is_not_there(self) -> None:
        """--renew makes what is missing, or damaged."""
        self.good("pki", "host", "node1", "--renew")
        certificate = self.pki / "hosts" / "node1" / "servercert.pem"
        certificate.write_bytes(b"garbage")
        self.assertIn("exists: use --renew", self.bad("pki", "host", "node1"))
        self.good("pki", "host", "node1", "--renew")
        certificate.unlink()
        self.assertIn("serverkey.pem exists", self.bad("pki", "host", "node1"))

    def test_no_authority(self) -> None:
        """Without a CA, with half of one, with one that is no use, it is told what to do."""
        key = self.pki / "cakey.pem"
        other = pki.make_authority("other", datetime.now(UTC)).key_pem()
        edwards = Ed25519PrivateKey.generate().private_bytes(
            Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
        )
        for content, words in (
            (other, "is not the key of"),
            (b"garbage", "no PEM file"),
            (edwards, "RSA private key"),
        ):
            key.write_bytes(content)
            self.assertIn(words, self.bad("pki", "host", "node1"))
        key.unlink()
        self.assertIn("cakey.pem cannot be read: No such file", self.bad("pki", "host", "node1"))
        (self.pki / "cacert.pem").unlink()
        for command in (("host", "node1"), ("proxy",)):
            self.assertIn("vmconsole pki init", self.bad("pki", *command))

    def test_authority_ends(self) -> None:
        """No certificate outlives its CA, and a CA that has ended issues none."""
        self.authority(100)
        self.good("pki", "host", "node1")
        loaded = x509.load_pem_x509_certificate(
            (self.pki / "hosts" / "node1" / "servercert.pem").read_bytes()
        )
        left = loaded.not_valid_after_utc - datetime.now(UTC)
        self.assertTrue(timedelta(days=98) < left <= timedelta(days=100), left)
        self.authority(-1, timedelta(days=10))
        self.assertIn("vmconsole pki init", self.bad("pki", "host", "node2"))


class ProxyTests(PkiTestCase):
    """``pki proxy``."""

    def test_proxy(self) -> None:
        """A client certificate of the CA, and the setting that is still missing."""
        self.good("pki", "init")
        said = self.good("pki", "proxy")
        self.assertIn('[hosts]\npki = "pki"', said)
        certificate, key = self.pki / "clientcert.pem", self.pki / "clientkey.pem"
        self.assertTrue(self.is_for(certificate, "sslclient"))
        self.assertFalse(self.is_for(certificate, "sslserver"))
        self.assertEqual(
            (certificate.stat().st_mode & 0o777, key.stat().st_mode & 0o777), (0o644, 0o600)
        )
        before = self.files()
        self.assertIn("use --renew", self.bad("pki", "proxy"))
        self.assertEqual(self.files(), before)
        self.good("pki", "proxy", "--renew")
        self.assertNotEqual(self.files(), before)
        self.assertTrue(pki.Identity.load(certificate, key).is_pair())

    def test_setting(self) -> None:
        """With the setting as it is said, the configuration is good."""
        self.good("pki", "init")
        said = self.good("pki", "proxy")
        self.configure(said[said.index("[hosts]") :])
        self.assertIn("good", self.good("check"))

    def test_expired(self) -> None:
        """One that has ended is told as such."""
        self.good("pki", "init")
        ca = pki.Identity.load(self.pki / "cacert.pem", self.pki / "cakey.pem")
        old = pki.issue(ca, "x", "client", datetime.now(UTC) - timedelta(days=900), key_size=2048)
        old.save(self.pki / "clientcert.pem", self.pki / "clientkey.pem")
        end = f"{datetime.now(UTC) - timedelta(days=75):%F}"
        self.assertIn(f"exists, expired on {end}: use --renew", self.bad("pki", "proxy"))


class TicketTests(PkiTestCase):
    """``pki ticket``."""

    def test_ticket(self) -> None:
        """A certificate that the embedded engine takes, and the settings for the other proxy."""
        said = self.good("pki", "ticket")
        folder = self.state / "tickets"
        certificate, key = folder / "proxy.cer", folder / "proxy.key"
        self.assertEqual(sorted(folder.iterdir()), [certificate, key])
        self.assertEqual(key.stat().st_mode & 0o777, 0o600)
        now = datetime.now(UTC)
        authority = ticket_identities(self.state, now).authority
        loaded = pki.Identity.load(certificate, key)
        self.assertTrue(loaded.is_pair())
        self.assertTrue(pki.issued_by(loaded.certificate, authority.certificate))
        self.assertEqual(ticket_certificate_problems(loaded.certificate, now), [])
        self.assertIn('url = "https://THIS-HOST:PORT/"', said)
        self.assertIn("engine.embedded.listen", said)
        self.assertNotIn("ticket_ca", said)

    def test_settings(self) -> None:
        """What is said is a configuration that the other proxy finds good."""
        (self.state).mkdir(mode=0o700)
        ca = pki.make_authority("CA", datetime.now(UTC))
        ca.save(self.state / "engine-ca.pem", self.state / "s.key")
        said = self.good("pki", "ticket", "west")
        for path in (self.state / "tickets").iterdir():
            path.rename(self.state / path.name)
        self.configure(said[said.index("[engine]") :].replace("PORT", "8443"))
        result = self.run_it("check")
        self.assertEqual(result.exit_code, 0, result.stderr)

    def test_listens(self) -> None:
        """When the engine listens already, the port is that one."""
        self.configure(
            '[engine.embedded]\nlisten = "tcp:8443"\ncertificate = "s.pem"\nkey = "s.key"\n'
            'ticket_ca = "other-ca.pem"'
        )
        said = self.good("pki", "ticket")
        self.assertIn('url = "https://THIS-HOST:8443/"', said)
        self.assertNotIn("First", said)
        self.assertIn(f"ticket_ca ({self.state / 'other-ca.pem'})", said)

    def test_names(self) -> None:
        """Several proxies have one each; a name leads nowhere else."""
        self.good("pki", "ticket", "east")
        self.good("pki", "ticket", "west")
        names = {path.name for path in (self.state / "tickets").iterdir()}
        self.assertEqual(names, {"east.cer", "east.key", "west.cer", "west.key"})
        for name in ("../x", "a/b", "", ".x", "x" * 49, "\u00e4", "x\n"):
            self.assertIn("no name for a proxy", self.bad("pki", "ticket", "--", name))
        self.good("pki", "ticket", "x" * 48)

    def test_existing(self) -> None:
        """It is not overwritten without --renew; the CA stays the same."""
        self.good("pki", "ticket")
        ca = (self.state / "ticket-ca.cer").read_bytes()
        before = (self.state / "tickets" / "proxy.cer").read_bytes()
        self.assertIn("use --renew", self.bad("pki", "ticket"))
        self.assertEqual((self.state / "tickets" / "proxy.cer").read_bytes(), before)
        self.good("pki", "ticket", "--renew")
        self.assertNotEqual((self.state / "tickets" / "proxy.cer").read_bytes(), before)
        self.assertEqual((self.state / "ticket-ca.cer").read_bytes(), ca)

    def test_authority_stays(self) -> None:
        """The service's CA is taken as it is, even if it ends soon; an ended one is told."""
        self.state.mkdir(mode=0o700)
        ca = self.state / "ticket-ca.cer"
        now = datetime.now(UTC)
        for days, said in ((10, ""), (-1, "Restart the service")):
            start = now - timedelta(days=20)
            old = pki.make_authority("vmconsole tickets", start, 20 + days)
            old.save(ca, self.state / "ticket-ca.key")
            if said:
                self.assertIn(said, self.bad("pki", "ticket", "--renew"))
            else:
                self.good("pki", "ticket", "--renew")
            self.assertEqual(ca.read_bytes(), old.certificate_pem())
            self.assertFalse((self.state / "ticket-ca.former.cer").exists())

    def test_check(self) -> None:
        """What is no CA's in ticket_ca, or not yet valid, is told by the check; a CA is good."""
        now = datetime.now(UTC)
        self.state.mkdir(mode=0o700)
        ca = pki.make_authority("one CA", now)
        leaf = pki.issue(ca, "a leaf", "ticket", now, key_size=2048)
        early = pki.make_authority("early CA", now + timedelta(days=2))
        self.configure('[engine.embedded]\nticket_ca = "chain.pem"')
        pems = [each.certificate_pem() for each in (ca, leaf, early)]
        (self.state / "chain.pem").write_bytes(b"".join(pems))
        result = self.run_it("check")
        said = result.stdout + result.stderr
        self.assertEqual(result.exit_code, 0, said)
        self.assertIn("CN=a leaf is no CA's", said)
        self.assertIn("CN=early CA is valid only from", said)
        self.assertNotIn("CN=one CA", said)

    def test_damaged_authority(self) -> None:
        """One without its key is told, and stays."""
        self.good("pki", "ticket")
        (self.state / "ticket-ca.key").unlink()
        self.assertIn("restore it", self.bad("pki", "ticket", "--renew"))
        self.assertFalse((self.state / "ticket-ca.key").exists())

    def test_unwritable(self) -> None:
        """A state directory that is none is one clear line."""
        self.state.write_bytes(b"")
        self.assertIn(str(self.state), self.bad("pki", "ticket"))

    def test_wrong_configuration(self) -> None:
        """HTTPS without a certificate is told before anything is made."""
        self.configure('[engine.embedded]\nlisten = "tcp:8443"')
        self.assertIn("engine.embedded.certificate", self.bad("pki", "ticket"))
        self.assertFalse(self.state.exists())
