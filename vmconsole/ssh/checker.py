"""The credentials checker: who somebody is, by a key or a certificate, and whether they have it."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import msgspec
from twisted.conch.error import ValidPublicKey
from twisted.conch.ssh.common import NS, getNS
from twisted.conch.ssh.keys import Key
from twisted.cred.checkers import ICredentialsChecker
from twisted.cred.credentials import ISSHPrivateKey, SSHPrivateKey
from twisted.cred.error import UnauthorizedLogin
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from zope.interface import implementer

from vmconsole.clocks import posix_now
from vmconsole.errors import KeyRefused
from vmconsole.interfaces import IPermissions, KeyOwner
from vmconsole.publickeys import KEY_TYPES, RSA_BITS
from vmconsole.ssh.certificates import (
    CERTIFICATE_ALGORITHMS,
    SUFFIX,
    UNPARSABLE,
    Certificate,
    CertificateError,
    CertificateRefused,
    check_user_certificate,
    parse_certificate,
)
from vmconsole.ssh.trust import Trust
from vmconsole.text import printable, printable_bytes

# Flags in a security key's signature (OpenSSH's PROTOCOL.u2f).
_USER_PRESENT = 0x01
_USER_VERIFIED = 0x04
# Bytes behind the signature itself: the flags, and a counter.
_SECURITY_KEY_TRAILER = 5
# What a security key's application begins with, as ssh-keygen demands it: a key for the web has
# its site's name there, and the site could have it sign.
_APPLICATION = b"ssh:"
# Bytes of a key: an RSA key of 16384 bits has some 2,100.
_LARGEST_KEY = 4096
# Characters of a certificate's principals that are shown.
_SHOWN = 200

# Signature algorithm -> the type of key that makes such signatures: never RSA with SHA-1.
USER_KEY_ALGORITHMS = {
    **{kind.encode(): kind.encode() for kind in sorted(KEY_TYPES - {"ssh-rsa"})},
    b"rsa-sha2-512": b"ssh-rsa",
    b"rsa-sha2-256": b"ssh-rsa",
}


class Proof(msgspec.Struct, frozen=True):
    """The avatar id: who logs in, and by what."""

    owner: KeyOwner
    blob: bytes
    """The key, in RFC 4253's format; of a certificate, the certified one."""
    certificate: Certificate | None = None


class AddressedKey(SSHPrivateKey):
    """A key, and where it comes from: it may be let in from some addresses only."""

    def __init__(self, credentials: SSHPrivateKey, address: str) -> None:
        super().__init__(
            credentials.username,
            credentials.algName,
            credentials.blob,
            credentials.sigData,
            credentials.signature,
        )
        self.address = address


class NotHere(UnauthorizedLogin):
    """A known key, or a trusted CA's certificate, does not let in; the text may be shown."""


@implementer(ICredentialsChecker)
class EngineKeyChecker:
    """Knows a key when the engine does, and a certificate when its CA is trusted and the engine
    knows one of its principals; says so truthfully when it is only asked about.

    Names outside ``users``, unknown keys, and what may not be used here fail with
    UnauthorizedLogin, what is known without a signature with ValidPublicKey (RFC 4252, section 7),
    no answer from the engine with EngineError. The avatar id is a Proof.
    """

    credentialInterfaces = (ISSHPrivateKey,)

    def __init__(
        self, permissions: IPermissions, users: Sequence[str], trust: Trust, clock: IReactorTime
    ) -> None:
        self._permissions = permissions
        self._users = frozenset(name.encode() for name in users)
        self._trust = trust
        self._clock = clock

    # cred's avatar ids are bytes; the Proof saves the realm from asking again.
    def requestAvatarId(  # type: ignore[override]
        self, credentials: AddressedKey
    ) -> Deferred[Proof]:
        """See ICredentialsChecker."""
        return Deferred.fromCoroutine(self._check(credentials))

    async def _check(self, credentials: AddressedKey) -> Proof:
        if credentials.username not in self._users:
            raise UnauthorizedLogin("no such user name here")
        if credentials.algName.endswith(SUFFIX):
            return await self._check_certificate(credentials)
        key = _acceptable_key(credentials.algName, credentials.blob)
        self._judge_key(credentials.blob)
        try:
            owner = await self._permissions.owner(credentials.blob, credentials.address)
        except KeyRefused as error:
            raise NotHere(str(error)) from error
        if owner is None:
            raise UnauthorizedLogin("the engine knows no user with this key")
        # While the engine was asked, it may have been revoked.
        self._judge_key(credentials.blob)
        if credentials.signature is None:
            raise ValidPublicKey
        _verify(key, credentials, credentials.algName, owner.verify_required)
        return Proof(owner, credentials.blob)

    async def _check_certificate(self, credentials: AddressedKey) -> Proof:
        if credentials.algName.startswith(b"sk-"):
            raise NotHere(
                "certificates of security keys (sk-) cannot be used here; the security key itself "
                "can, once the engine knows it"
            )
        signature_algorithm, certificate = _acceptable_certificate(
            credentials.algName, credentials.blob
        )
        self._demand_trust(certificate)
        _demand_signature(certificate)
        self._judge(certificate, credentials.address)
        try:
            owner = await self._permissions.user_named(certificate.names)
        except KeyRefused as error:
            raise NotHere(f"the certificate is nobody's: {error}") from error
        if owner is None:
            shown = printable(", ".join(certificate.names), _SHOWN)
            raise NotHere(f"the engine knows no user by the certificate's principals: {shown}")
        # While the engine was asked, it may have been revoked, or come to its end.
        self._demand_trust(certificate)
        self._judge(certificate, credentials.address)
        if credentials.signature is None:
            raise ValidPublicKey
        _verify(certificate.key, credentials, signature_algorithm, verify_required=False)
        return Proof(owner, certificate.key_blob, certificate)

    def _judge_key(self, blob: bytes) -> None:
        if self._trust.revoked.revokes_key(blob):
            raise NotHere("the key has been revoked")

    def _demand_trust(self, certificate: Certificate) -> None:
        if certificate.ca not in self._trust.authorities:
            raise UnauthorizedLogin("the certificate is of no CA that is trusted here")

    def _judge(self, certificate: Certificate, address: str) -> None:
        if self._trust.revoked.revokes(certificate):
            raise NotHere("the certificate has been revoked")
        try:
            check_user_certificate(certificate, address, posix_now(self._clock))
        except CertificateRefused as error:
            raise NotHere(str(error)) from error


def _demand_signature(certificate: Certificate) -> None:
    # Before anything in it is gone by, or told; and once, since it takes time.
    try:
        certificate.verify()
    except CertificateError as error:
        raise UnauthorizedLogin(f"the certificate cannot be used: {error}") from error


def _acceptable_certificate(algorithm: bytes, blob: bytes) -> tuple[bytes, Certificate]:
    if algorithm not in CERTIFICATE_ALGORITHMS:
        raise UnauthorizedLogin(f"algorithm {printable_bytes(algorithm)} is not accepted")
    kind, signature_algorithm = CERTIFICATE_ALGORITHMS[algorithm]
    try:
        if getNS(blob)[0] != kind:
            raise UnauthorizedLogin("the certificate is not of the type that its algorithm names")
        return signature_algorithm, parse_certificate(blob)
    except (CertificateError, struct.error) as error:
        raise UnauthorizedLogin(f"the certificate cannot be used: {error}") from error


def _acceptable_key(algorithm: bytes, blob: bytes) -> Key:
    # Conch trusts the algorithm that the client names, and has no floor for a key's size.
    key_type = USER_KEY_ALGORITHMS.get(algorithm)
    if key_type is None:
        raise UnauthorizedLogin(f"algorithm {printable_bytes(algorithm)} is not accepted")
    if len(blob) > _LARGEST_KEY:
        raise UnauthorizedLogin("the key is too large")
    try:
        key: Key = Key.fromString(blob, type="BLOB")
        canonical = key.blob() == blob
    except UNPARSABLE as error:
        raise UnauthorizedLogin("the key cannot be parsed") from error
    if not canonical:
        # Conch reads other encodings of it, too; the revocation list knows this one alone.
        raise UnauthorizedLogin("the key is not encoded as RFC 4253 has it")
    if key.sshType() != key_type:
        raise UnauthorizedLogin("the key is not of the type that its algorithm names")
    if key_type == b"ssh-rsa" and key.size() not in RSA_BITS:
        raise UnauthorizedLogin(f"RSA keys have {RSA_BITS[0]} to {RSA_BITS[-1]} bits here")
    if key.isSecurityKey() and not key.application.startswith(_APPLICATION):
        raise UnauthorizedLogin("the security key is not one for ssh")
    return key


def _verify(key: Key, credentials: SSHPrivateKey, algorithm: bytes, verify_required: bool) -> None:
    signature = credentials.signature
    try:
        named, number, rest = getNS(signature, 2)
    except struct.error as error:
        raise UnauthorizedLogin("the signature cannot be parsed") from error
    if named != algorithm:
        raise UnauthorizedLogin("the signature is not of the algorithm that was named")
    # Conch takes strings that are cut, and what stands behind them; OpenSSH does not.
    trailer = _SECURITY_KEY_TRAILER if key.isSecurityKey() else 0
    if len(rest) != trailer or NS(named) + NS(number) + rest != signature:
        raise UnauthorizedLogin("the signature is longer or shorter than it says")
    if algorithm.startswith(b"rsa-"):
        # RFC 8332 wants all of its leading zeros. PuTTY 0.78 leaves them out, which OpenSSH takes.
        signature = NS(named) + NS(number.rjust((key.size() + 7) // 8, b"\0"))
    if key.isSecurityKey() and not (rest and rest[0] & _USER_PRESENT):
        raise UnauthorizedLogin("nobody touched the security key")
    if verify_required and not (rest and rest[0] & _USER_VERIFIED):
        raise UnauthorizedLogin("the security key did not verify its user (verify-required)")
    try:
        good = key.verify(signature, credentials.sigData)
    except Exception as error:  # cryptography has several for bytes that are no signature
        raise UnauthorizedLogin("the signature cannot be parsed") from error
    if not good:
        raise UnauthorizedLogin("the signature is wrong")
