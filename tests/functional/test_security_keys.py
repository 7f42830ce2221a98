"""Keys in hardware, with the real ssh: a software authenticator stands behind its agent."""

from __future__ import annotations

import base64
from typing import Any

from twisted.internet import reactor
from twisted.internet.endpoints import UNIXServerEndpoint

from tests.agent import Agent, Held
from tests.authenticator import SK_ECDSA, SK_ED25519, USER_PRESENT, USER_VERIFIED, Authenticator
from tests.functional.case import FunctionalTestCase
from tests.functional.process import Child

_KINDS = (SK_ED25519, SK_ECDSA)


def public_line(authenticator: Authenticator) -> str:
    """The public key as OpenSSH writes it."""
    blob = base64.b64encode(authenticator.blob).decode()
    return f"{authenticator.kind.decode()} {blob} software\n"


class SecurityKeyTests(FunctionalTestCase):
    """Alice has four keys, which the proxy knows from ``vmconsole key add``: of both sk- types, one
    without options and one with verify-required."""

    async def start_site(self) -> None:
        """Add them before the proxy starts: a new key counts a second later."""
        self.plain = [Authenticator(kind) for kind in _KINDS]
        self.verified = [Authenticator(kind) for kind in _KINDS]
        for options, authenticators in (("", self.plain), ("verify-required ", self.verified)):
            for authenticator in authenticators:
                await self.add("alice", authenticator, options)
        await super().start_site()

    async def add(self, user: str, authenticator: Authenticator, options: str = "") -> None:
        """``vmconsole key add``, with options before the key."""
        path = self.site.folder / "line"
        path.write_text(options + public_line(authenticator))
        await self.site.run("key", "add", user, str(path))

    async def log_in(self, held: Held) -> tuple[Child, Agent]:
        """An ssh that ended, and the agent that held its only key."""
        path = self.site.folder / "agent"
        agent = Agent(held)
        port: Any = await UNIXServerEndpoint(reactor, str(path)).listen(agent)
        key = self.site.folder / "sk.pub"
        key.write_text(public_line(held.authenticator))
        ssh = self.site.ssh(key, "info", terminal=False, options=(f"IdentityAgent={path}",))
        await ssh.ended()
        await port.stopListening()
        return ssh, agent

    async def test_touched(self) -> None:
        """A signature that somebody made by a touch logs in."""
        for authenticator in self.plain:
            ssh, agent = await self.log_in(Held(authenticator))
            self.assertEqual(ssh.status, 0, ssh.errors)
            self.assertIn(b"user: alice@internal", ssh.seen)
            self.assertEqual(agent.signatures, 1)

    async def test_not_touched(self) -> None:
        """A signature without a touch, as any program on a user's machine might get one where the
        key was made for that, is refused, though it is a good one; the log says why."""
        for flags in (0, USER_VERIFIED):
            for authenticator in self.plain:
                ssh, agent = await self.log_in(Held(authenticator, flags))
                self.assertEqual(ssh.status, 255)
                self.assertIn(b"Permission denied (publickey)", ssh.errors)
                self.assertEqual(agent.signatures, 1)
                await self.site.log(
                    rb"login refused session=\w+ [^\n]*reason='nobody touched the security key'"
                )

    async def test_verified(self) -> None:
        """A key with verify-required wants a PIN or a finger beside the touch."""
        for authenticator in self.verified:
            ssh, _ = await self.log_in(Held(authenticator))
            self.assertEqual(ssh.status, 255)
            await self.site.log(rb"reason='the security key did not verify its user")
            ssh, _ = await self.log_in(Held(authenticator, USER_PRESENT | USER_VERIFIED))
            self.assertEqual(ssh.status, 0, ssh.errors)

    async def test_another_application(self) -> None:
        """A signature that the same key made for a web site's login is none for ssh."""
        for authenticator in self.plain:
            ssh, agent = await self.log_in(Held(authenticator, application=b"https://example.com"))
            self.assertEqual(ssh.status, 255)
            self.assertEqual(agent.signatures, 1)
            await self.site.log(rb"login refused session=\w+ [^\n]*reason='the signature is wrong'")
