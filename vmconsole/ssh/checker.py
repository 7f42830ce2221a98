"""The credentials checker: whose key it is, and whether the client has it."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from twisted.conch.error import ValidPublicKey
from twisted.conch.ssh.common import getNS
from twisted.conch.ssh.keys import BadKeyError, Key
from twisted.cred.checkers import ICredentialsChecker
from twisted.cred.credentials import ISSHPrivateKey, SSHPrivateKey
from twisted.cred.error import UnauthorizedLogin
from twisted.internet.defer import Deferred
from zope.interface import implementer

from vmconsole.errors import KeyRefused
from vmconsole.interfaces import IPermissions, KeyOwner
from vmconsole.publickeys import KEY_TYPES, RSA_BITS
from vmconsole.text import printable_bytes

# Flags in a security key's signature (OpenSSH's PROTOCOL.u2f).
_USER_PRESENT = 0x01
_USER_VERIFIED = 0x04
UNPARSABLE = (BadKeyError, ValueError, LookupError, struct.error)
"""What Conch raises for bytes that are no key, or no request."""

# Signature algorithm -> the type of key that makes such signatures: never RSA with SHA-1.
USER_KEY_ALGORITHMS = {
    **{kind.encode(): kind.encode() for kind in sorted(KEY_TYPES - {"ssh-rsa"})},
    b"rsa-sha2-512": b"ssh-rsa",
    b"rsa-sha2-256": b"ssh-rsa",
}


class AddressedKey(SSHPrivateKey):
    """A key, and where it comes from: the engine may let it in from some addresses only."""

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
    """The options of a known key do not let it in; the text may be shown."""


@implementer(ICredentialsChecker)
class EngineKeyChecker:
    """Knows a key when the engine does, and says so truthfully when it is only asked about.

    Names outside ``users``, unknown keys, and keys that may not be used here fail with
    UnauthorizedLogin, a known key without a signature with ValidPublicKey (RFC 4252, section 7),
    no answer from the engine with EngineError. The avatar id is the KeyOwner.
    """

    credentialInterfaces = (ISSHPrivateKey,)

    def __init__(self, permissions: IPermissions, users: Sequence[str]) -> None:
        self._permissions = permissions
        self._users = frozenset(name.encode() for name in users)

    # cred's avatar ids are bytes; the KeyOwner saves the realm from asking again.
    def requestAvatarId(  # type: ignore[override]
        self, credentials: AddressedKey
    ) -> Deferred[KeyOwner]:
        """See ICredentialsChecker."""
        return Deferred.fromCoroutine(self._check(credentials))

    async def _check(self, credentials: AddressedKey) -> KeyOwner:
        if credentials.username not in self._users:
            raise UnauthorizedLogin("no such user name here")
        key = _acceptable_key(credentials.algName, credentials.blob)
        try:
            owner = await self._permissions.owner(credentials.blob, credentials.address)
        except KeyRefused as error:
            raise NotHere(str(error)) from error
        if owner is None:
            raise UnauthorizedLogin("the engine knows no user with this key")
        if credentials.signature is None:
            raise ValidPublicKey
        _verify(key, credentials, owner.verify_required)
        return owner


def _acceptable_key(algorithm: bytes, blob: bytes) -> Key:
    # Conch trusts the algorithm that the client names, and has no floor for a key's size.
    key_type = USER_KEY_ALGORITHMS.get(algorithm)
    if key_type is None:
        raise UnauthorizedLogin(f"algorithm {printable_bytes(algorithm)} is not accepted")
    try:
        key: Key = Key.fromString(blob, type="BLOB")
    except UNPARSABLE as error:
        raise UnauthorizedLogin("the key cannot be parsed") from error
    if key.sshType() != key_type:
        raise UnauthorizedLogin("the key is not of the type that its algorithm names")
    if key_type == b"ssh-rsa" and key.size() not in RSA_BITS:
        raise UnauthorizedLogin(f"RSA keys have {RSA_BITS[0]} to {RSA_BITS[-1]} bits here")
    return key


def _verify(key: Key, credentials: SSHPrivateKey, verify_required: bool) -> None:
    signature = credentials.signature
    try:
        named, _, rest = getNS(signature, 2)
    except struct.error as error:
        raise UnauthorizedLogin("the signature cannot be parsed") from error
    if named != credentials.algName:
        raise UnauthorizedLogin("the signature is not of the algorithm that was named")
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
