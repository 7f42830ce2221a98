"""Certificates that we make: what openssl and the engine say about them."""

from __future__ import annotations

import subprocess
from datetime import timedelta
from pathlib import Path

from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID
from twisted.trial.unittest import SynchronousTestCase

from tests.engine_kit import NOW, authority, signer
from vmconsole import pki


class PkiTests(SynchronousTestCase):
    """A CA, and what it issues."""

    def setUp(self) -> None:
        self.directory = Path(self.mktemp())
        self.directory.mkdir()

    def test_openssl_verifies(self) -> None:
        """The real openssl accepts a server certificate for its names, and for no other."""
        (self.directory / "ca.pem").write_bytes(authority().certificate_pem())
        server = pki.issue(authority(), "node1", "server", NOW, ["node1.example.com", "10.0.0.1"])
        (self.directory / "server.pem").write_bytes(server.certificate_pem())

        def verify(*options: str) -> int:
            return subprocess.run(
                [
                    "openssl",
                    "verify",
                    *("-attime", str(int(NOW.timestamp()))),
                    *("-CAfile", "ca.pem", "-purpose", "sslserver", *options, "server.pem"),
                ],
                cwd=self.directory,
                capture_output=True,
                check=False,
            ).returncode

        self.assertEqual(verify("-verify_hostname", "node1.example.com"), 0)
        self.assertEqual(verify("-verify_ip", "10.0.0.1"), 0)
        self.assertNotEqual(verify("-verify_hostname", "node2.example.com"), 0)

    def test_issued_by(self) -> None:
        """Only who signed it issued it, whatever the names say."""
        impostor = pki.make_authority("test CA", NOW)
        self.assertTrue(pki.issued_by(signer().certificate, authority().certificate))
        self.assertFalse(pki.issued_by(signer().certificate, impostor.certificate))
        self.assertFalse(pki.issued_by(signer().certificate, signer().certificate))

    def test_extended_key_usages(self) -> None:
        """A ticket certificate has the OID that an oVirt Engine looks for; a CA has none."""
        self.assertEqual(pki.extended_key_usages(signer().certificate), {pki.TICKET_OID})
        self.assertEqual(
            pki.extended_key_usages(signer("client").certificate),
            {ExtendedKeyUsageOID.CLIENT_AUTH},
        )
        self.assertIsNone(pki.extended_key_usages(authority().certificate))

    def test_backdated(self) -> None:
        """It is valid at once for a host whose clock is late."""
        certificate = signer().certificate
        self.assertLessEqual(certificate.not_valid_before_utc, NOW - timedelta(minutes=59))

    def test_key_usage(self) -> None:
        """Of what a CA issues, libvirt 9 wants digitalSignature and keyEncipherment."""
        usage = signer().certificate.extensions.get_extension_for_class(x509.KeyUsage).value
        self.assertTrue(usage.digital_signature and usage.key_encipherment)
        self.assertFalse(usage.key_cert_sign)

    def test_save_and_load(self) -> None:
        """What was saved is loaded; the key is for its owner only, and replaced whole."""
        certificate, key = self.directory / "a.cer", self.directory / "a.key"
        for identity in (signer("client"), signer()):
            identity.save(certificate, key)
        self.assertEqual(key.stat().st_mode & 0o777, 0o600)
        loaded = pki.Identity.load(certificate, key)
        self.assertEqual(loaded.certificate, signer().certificate)
        self.assertTrue(loaded.is_pair())
        self.assertEqual(sorted(path.name for path in self.directory.iterdir()), ["a.cer", "a.key"])

    def test_is_pair(self) -> None:
        """A key that belongs to another certificate is no pair with this one."""
        self.assertFalse(pki.Identity(signer().certificate, signer("client").key).is_pair())
