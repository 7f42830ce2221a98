"""Holes in whose certificates count, for whom, and for how long."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from cryptography.hazmat.primitives.serialization import SSHCertificateType
from twisted.conch.ssh.keys import Key
from twisted.cred.credentials import ISSHPrivateKey
from twisted.cred.error import UnauthorizedLogin

from tests.fuzz.authority import TRUSTED
from tests.fuzz.world import World
from vmconsole.config import Config
from vmconsole.errors import ConfigError
from vmconsole.ssh import checker, hostkeys
from vmconsole.ssh.certificates import Certificate
from vmconsole.ssh.revocation import RevocationList

Open = Callable[[World], None]


def _checker(world: World) -> Any:
    return world.factory.portal.checkers[ISSHPrivateKey]


def with_world(opened: Open) -> Callable[[Any], World]:
    """Makes a server, and opens a hole in it."""

    def make(ring: Any) -> World:
        world = World(ring)
        opened(world)
        return world

    return make


def _trusting(ring: Any) -> World:
    # Another CA's certificates count, too.
    return World(ring, (*TRUSTED, "stranger"))


def _eternal(world: World) -> None:
    # When, from where and for what a certificate is, is nobody's business.
    checking = _checker(world)

    def judge(certificate: Any, address: str) -> None:
        if checking._trust.revoked.revokes(certificate):
            raise checker.NotHere("the certificate has been revoked")

    checking._judge = judge


def _unlisted(world: World) -> None:
    # Serials are not looked for.
    value = world.trust.revoked
    world.trust._revoked.value = RevocationList(value.digests, value.ids)


def _last_principal(world: World) -> None:
    # The last of the principals counts.
    ask = world.permissions.user_named

    async def user_named(names: Sequence[str]) -> Any:
        return await ask(names[::-1])

    world.permissions.user_named = user_named  # type: ignore[method-assign]


def _unsigned(world: World) -> None:
    # That the CA has signed is not looked at.
    checking = _checker(world)
    asked = checking._check_certificate

    async def check(credentials: Any) -> Any:
        with patch.object(checker, "_demand_signature", lambda certificate: None):
            return await asked(credentials)

    checking._check_certificate = check


def _particular(world: World) -> None:
    # The largest serial is taken for none.
    checking = _checker(world)
    asked = checking._judge

    def judge(certificate: Any, address: str) -> None:
        if certificate.serial == 2**64 - 1:
            raise checker.NotHere("the certificate has no serial")
        asked(certificate, address)

    checking._judge = judge


def _indiscreet(world: World) -> None:
    # Whoever shows a certificate is told what is wrong with it.
    checking = _checker(world)
    asked = checking._check_certificate

    async def check(credentials: Any) -> Any:
        try:
            return await asked(credentials)
        except UnauthorizedLogin as error:
            raise checker.NotHere(f"the certificate: {error}") from error

    checking._check_certificate = check


def _silent(world: World) -> None:
    # Nobody is told why a certificate does not count.
    checking = _checker(world)
    asked = checking._check_certificate

    async def check(credentials: Any) -> Any:
        try:
            return await asked(credentials)
        except checker.NotHere as error:
            raise UnauthorizedLogin(str(error)) from error

    checking._check_certificate = check


def avatars(change: Callable[[Any], None]) -> Open:
    """Something is wrong with each avatar."""

    def opened(world: World) -> None:
        realm: Any = world.factory.portal.realm
        made = realm.requestAvatar

        def request_avatar(*arguments: Any) -> Any:
            interface, avatar, logout = made(*arguments)
            change(avatar)
            return interface, avatar, logout

        realm.requestAvatar = request_avatar

    return opened


def _with_terminal(avatar: Any) -> None:
    # A terminal is for everybody.
    avatar.__class__ = type("Ordinary", (type(avatar),), {"permits_pty": True})


def _with_any_command(avatar: Any) -> None:
    # The client's command runs, whatever the certificate says.
    def run(self: Any, channel: Any, line: bytes) -> Any:
        certificate, self.proof = self.proof, checker.Proof(self.proof.owner, self.proof.blob)
        try:
            return base.run(self, channel, line)
        finally:
            self.proof = checker.Proof(self.proof.owner, self.proof.blob, certificate.certificate)

    base = type(avatar)
    avatar.__class__ = type("Unforced", (base,), {"run": run})


def _first_authority(world: World) -> None:
    # Of the CAs the first counts.
    load = world.load_user_authorities
    world.load_user_authorities = lambda config: frozenset(sorted(load(config))[:1])


def _tolerant(world: World) -> None:
    # A file of CAs with a mistake in it is an empty one.
    load = world.load_user_authorities

    def tolerant(config: Config) -> frozenset[bytes]:
        try:
            return load(config)
        except ConfigError:
            return frozenset()

    world.load_user_authorities = tolerant


def _hospitable(world: World) -> None:
    # A user's certificate is taken for a host's.
    def load(config: Config, keys: Sequence[Key]) -> list[Certificate]:
        try:
            return hostkeys.load_host_certificates(config, keys)
        except ConfigError:
            kinds = SimpleNamespace(HOST=SSHCertificateType.USER)
            with patch.object(hostkeys, "SSHCertificateType", kinds):
                return hostkeys.load_host_certificates(config, keys)

    world.load_host_certificates = load


HOLES: dict[str, Callable[[Any], World]] = {
    "trusting": _trusting,
    "eternal": with_world(_eternal),
    "unlisted": with_world(_unlisted),
    "mistaken": with_world(_last_principal),
    "unsigned": with_world(_unsigned),
    "particular": with_world(_particular),
    "indiscreet": with_world(_indiscreet),
    "secretive": with_world(_silent),
    "sole": with_world(_first_authority),
    "tolerant": with_world(_tolerant),
    "hospitable": with_world(_hospitable),
    "ordinary": with_world(avatars(_with_terminal)),
    "unforced": with_world(avatars(_with_any_command)),
}
"""What each is called -> how a server that has it is made."""
