"""Certificates: a CA of our own, libvirt's TLS certificates, the ticket certificate."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Literal

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier

# What an oVirt Engine looks for in the certificate that signs a ticket.
TICKET_OID = ObjectIdentifier("1.3.6.1.4.1.2312.13.1.2.1.1")

Usage = Literal["server", "client", "ticket"]
_EXTENDED_KEY_USAGES = {
    "server": ExtendedKeyUsageOID.SERVER_AUTH,
    "client": ExtendedKeyUsageOID.CLIENT_AUTH,
    "ticket": TICKET_OID,
}
# Clocks of hosts differ a little: a certificate that was just made counts there too.
_BACKDATED = timedelta(hours=1)


@dataclass(frozen=True)
class Identity:
    """A certificate with its private key."""

    certificate: x509.Certificate
    key: rsa.RSAPrivateKey

    def certificate_pem(self) -> bytes:
        """The certificate in PEM."""
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    def key_pem(self) -> bytes:
        """The private key in PEM (PKCS #8), not encrypted."""
        return self.key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )

    def is_pair(self) -> bool:
        """Whether the key is the certificate's."""
        return self.certificate.public_key() == self.key.public_key()

    def save(self, certificate: Path, key: Path) -> None:
        """Write both files, the key with mode 0600. Raises OSError."""
        write_private(key, self.key_pem())
        write_public(certificate, self.certificate_pem())

    @classmethod
    def load(cls, certificate: Path, key: Path) -> Identity:
        """Read both files. Raises OSError, and ValueError when one is no such PEM."""
        loaded = serialization.load_pem_private_key(key.read_bytes(), None)
        if not isinstance(loaded, rsa.RSAPrivateKey):
            raise ValueError(f"{key}: an RSA key is needed here")
        return cls(x509.load_pem_x509_certificate(certificate.read_bytes()), loaded)


def write_private(path: Path, content: bytes) -> None:
    """Write a file that only its owner may read; it appears whole or not at all. Raises OSError."""
    _write(path, content, 0o600)


def write_public(path: Path, content: bytes) -> None:
    """Write a file that everybody may read; it appears whole or not at all. Raises OSError."""
    _write(path, content, 0o644)


def make_private_directory(path: Path) -> None:
    """Make the directory, and those above it, for their owner only. Raises OSError."""
    if path.is_dir():
        return
    make_private_directory(path.parent)
    with suppress(FileExistsError):
        path.mkdir(mode=0o700)
        # Not by its name, which may lead elsewhere by now.
        made = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            give_to_owner_of(path.parent, made)
        finally:
            os.close(made)


def give_to_owner_of(directory: Path, descriptor: int) -> None:
    """What root made in ``directory`` is its owner's: the service's. Raises OSError."""
    # The command may run as root, and the service as the directory's owner.
    if os.geteuid() == 0:
        owner = directory.stat()
        os.fchown(descriptor, owner.st_uid, owner.st_gid)


def _write(path: Path, content: bytes, mode: int) -> None:
    temporary = path.with_name(path.name + ".new")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        with open(descriptor, "wb") as file:
            # Whatever the umask is.
            os.fchmod(descriptor, mode)
            give_to_owner_of(path.parent, descriptor)
            file.write(content)
            file.flush()
            os.fsync(descriptor)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def make_authority(common_name: str, now: datetime, days: int = 3650) -> Identity:
    """A new self-signed CA, RSA 3072, valid for ``days`` from ``now`` (UTC)."""
    key = rsa.generate_private_key(65537, 3072)
    builder = (
        _builder(common_name, key.public_key(), now, days)
        .issuer_name(_name(common_name))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(ca=True), critical=True)
    )
    return Identity(builder.sign(key, hashes.SHA256()), key)


def issue(
    authority: Identity,
    common_name: str,
    usage: Usage,
    now: datetime,
    names: Sequence[str] = (),
    days: int = 825,
    key_size: int = 3072,
) -> Identity:
    """A certificate signed by ``authority``, with an RSA key of ``key_size`` bits.

    ``names`` are DNS names and IP addresses for the subjectAltName. libvirt 9 wants both
    digitalSignature and keyEncipherment; an oVirt Engine wants TICKET_OID in the EKU.
    """
    key = rsa.generate_private_key(65537, key_size)
    builder = (
        _builder(common_name, key.public_key(), now, days)
        .issuer_name(authority.certificate.subject)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(ca=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([_EXTENDED_KEY_USAGES[usage]]), critical=False)
        .add_extension(_authority_key_identifier(authority), critical=False)
    )
    if names:
        alternatives = x509.SubjectAlternativeName([_alternative(name) for name in names])
        builder = builder.add_extension(alternatives, critical=False)
    return Identity(builder.sign(authority.key, hashes.SHA256()), key)


def issued_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    """Whether ``authority`` signed ``certificate``. A self-signed one is issued by itself."""
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True


def is_authority(certificate: x509.Certificate) -> bool:
    """Whether its BasicConstraints say that it may issue others."""
    try:
        found = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    except (
        ValueError,
        TypeError,
        UnsupportedAlgorithm,
        x509.ExtensionNotFound,
        x509.DuplicateExtension,
        x509.InvalidVersion,
        x509.UnsupportedGeneralNameType,
    ):
        # What cannot be read says nothing.
        return False
    return found.value.ca


def is_valid(certificate: x509.Certificate, now: datetime) -> bool:
    """Whether ``now`` is between its dates."""
    return certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc


def extended_key_usages(certificate: x509.Certificate) -> frozenset[ObjectIdentifier] | None:
    """What the certificate is for; None: it has no such extension. Raises ValueError."""
    try:
        extension = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage)
    except x509.ExtensionNotFound:
        return None
    return frozenset(extension.value)


def alternative_names(certificate: x509.Certificate) -> list[str]:
    """The DNS names and IP addresses that it is for, in order. Raises ValueError."""
    try:
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return []
    return [
        str(each.value)
        for each in extension.value
        if isinstance(each, x509.DNSName | x509.IPAddress)
    ]


def _builder(
    common_name: str, public_key: rsa.RSAPublicKey, now: datetime, days: int
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(_name(common_name))
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(now + timedelta(days=days))
        # OpenSSL's strict mode wants it of every certificate, and the issuer's, too.
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def _authority_key_identifier(authority: Identity) -> x509.AuthorityKeyIdentifier:
    try:
        found = authority.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
    except x509.ExtensionNotFound:
        return x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key())
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(found.value)


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _alternative(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _key_usage(ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=not ca,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=ca,
        crl_sign=ca,
        encipher_only=False,
        decipher_only=False,
    )
