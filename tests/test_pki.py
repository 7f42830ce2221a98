"""Certificates that we make: what openssl and the engine say about them."""

from __future__ import annotations

import errno
import os
import subprocess
from datetime import timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256
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

    def test_alternative_names(self) -> None:
        """What was asked for is told, in order; a certificate may be for no name."""
        names = ["node1.example.com", "10.0.0.1", "2001:db8::1"]
        certificate = pki.issue(authority(), "node1", "server", NOW, names, key_size=2048)
        self.assertEqual(pki.alternative_names(certificate.certificate), names)
        self.assertEqual(pki.alternative_names(signer().certificate), [])

    def test_modes(self) -> None:
        """A certificate is for everybody and a key for its owner only, whatever the umask."""
        certificate, key = self.directory / "a.cer", self.directory / "a.key"
        for mask in (0o000, 0o777):
            old = os.umask(mask)
            try:
                signer().save(certificate, key)
            finally:
                os.umask(old)
            self.assertEqual(certificate.stat().st_mode & 0o777, 0o644)
            self.assertEqual(key.stat().st_mode & 0o777, 0o600)

    def test_failed_write(self) -> None:
        """What could not be written whole is not there, and what was there before stays."""
        path = self.directory / "a.key"
        pki.write_private(path, b"before")

        def no_room(_: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        self.patch(os, "fsync", no_room)
        self.assertRaises(OSError, pki.write_private, path, b"after")
        self.assertEqual(path.read_bytes(), b"before")
        self.assertEqual(list(self.directory.iterdir()), [path])

    def test_is_authority(self) -> None:
        """Only what says so itself."""
        self.assertTrue(pki.is_authority(authority().certificate))
        self.assertFalse(pki.is_authority(signer().certificate))
        name = authority().certificate.subject
        builder = (
            x509.CertificateBuilder(name, name, authority().key.public_key())
            .serial_number(1)
            .not_valid_before(NOW)
            .not_valid_after(NOW)
        )
        self.assertFalse(pki.is_authority(builder.sign(authority().key, SHA256())))
        unread = x509.UnrecognizedExtension(x509.BasicConstraints.oid, b"garbage")
        builder = builder.add_extension(unread, critical=True)
        self.assertFalse(pki.is_authority(builder.sign(authority().key, SHA256())))

    def test_directory_is_swapped(self) -> None:
        """A link that took the place of a directory which root made is not followed."""
        if os.geteuid() != 0:
            return
        os.chown(self.directory, 1234, 1234)
        target = self.directory.with_name("target")
        target.mkdir()
        mkdir = os.mkdir

        def swapped(path: Path, mode: int) -> None:
            mkdir(path, mode)
            os.rmdir(path)
            os.symlink(target.absolute(), path)

        self.patch(os, "mkdir", swapped)
        self.assertRaises(OSError, pki.make_private_directory, self.directory / "state")
        self.assertEqual(target.stat().st_uid, 0)

    def test_private_directory(self) -> None:
        """It is made with what is above it, for its owner only; one that is there is left alone."""
        self.directory.chmod(0o755)
        path = self.directory / "a" / "b"
        pki.make_private_directory(path)
        pki.make_private_directory(path)
        pki.make_private_directory(self.directory)
        modes = [each.stat().st_mode & 0o777 for each in (path, path.parent, self.directory)]
        self.assertEqual(modes, [0o700, 0o700, 0o755])
