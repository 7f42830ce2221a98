"""Our engine for proxies on other machines: HTTPS, several of each, one database for all."""

from __future__ import annotations

import atexit
import shutil
import socket
import ssl
import subprocess
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from http.client import HTTPSConnection
from pathlib import Path
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.threads import deferToThread

from tests import postgres
from tests.engine_kit import todays_authority
from tests.functional import case
from tests.functional.case import LabTestCase
from tests.functional.process import Child
from tests.functional.remote import make_key
from tests.functional.site import BIN, Site
from tests.functional.test_engine import is_stale, is_well
from vmconsole import pki
from vmconsole.engine.ticket import sign_ticket

# More than any test here needs, and less than its time.
_TRIES = 200


class EnginesTestCase(LabTestCase):
    """Engines that run alone, and proxies that ask them; all have the template's keys."""

    settings = "recheck = 1.0\ncache_ttl = 0.5\ntimeout = 2.0\n"
    """More TOML for [engine] of the proxies."""

    async def setUp(self) -> None:  # type: ignore[override]
        self.sites: list[Site] = []
        self.boot_lab()
        if case._template is None:
            case._template = await case._make_template()
            atexit.register(shutil.rmtree, case._template, True)
        shutil.copytree(case._template, self.site.folder, dirs_exist_ok=True)
        self.alice = self.site.folder / "alice.key"

    async def tearDown(self) -> None:  # type: ignore[override]
        for site in self.sites:
            await site.stop()
            # They are looked at there.
            self.site._logs += site.logs.encode()
            await site.close()
        await super().tearDown()

    def serve(self, engine: Site, settings: str = "") -> None:
        """Make it an engine alone, with HTTPS for localhost."""
        (engine.state / "ssh_host_ed25519_key").unlink(missing_ok=True)
        put_certificate(engine)
        engine.config.write_text(
            "[ssh]\nlisten = []\n"
            f'[engine.embedded]\nlisten = "ssl:{engine.port}:interface=127.0.0.1"\n'
            f'certificate = "server.cer"\nkey = "server.key"\n{settings}\n'
            f'[state]\ndirectory = "{engine.state}"\n'
        )

    def copied(self) -> Site:
        """One more site, with everybody's keys and no database."""
        site = Site(reactor)
        self.sites.append(site)
        assert case._template is not None
        ignored = shutil.ignore_patterns("engine.*")
        shutil.copytree(case._template, site.folder, dirs_exist_ok=True, ignore=ignored)
        return site

    def proxy_of(self, engine: Site, settings: str = "") -> Site:
        """A proxy whose tickets the engine's own CA vouches for."""
        proxy = self.copied()
        state = engine.state
        authority = pki.Identity.load(state / "ticket-ca.cer", state / "ticket-ca.key")
        identity = pki.issue(authority, "a proxy", "ticket", datetime.now(UTC), key_size=2048)
        identity.save(proxy.state / "proxy.cer", proxy.state / "proxy.key")
        pki.write_public(proxy.state / "engine-ca.cer", todays_authority().certificate_pem())
        overrides = "\n".join(f'{name} = "{host.uri}"' for name, host in self.lab.hosts.items())
        proxy.configure(
            f'[engine]\nurl = "https://localhost:{engine.port}/"\nca = "engine-ca.cer"\n'
            f'certificate = "proxy.cer"\nkey = "proxy.key"\n{self.settings}\n{settings}\n'
            f'[hosts]\npki = "{self.lab.pki}"\n[hosts.overrides]\n{overrides}\n'
        )
        return proxy

    async def opened(self, proxy: Site, name: str) -> Child:
        """Alice on the console of a VM that echoes."""
        ssh = proxy.ssh(self.alice, name)
        await ssh.expect(rb"\[vmconsole: " + name.encode() + rb" on node[12]\. To leave")
        ssh.type(b"<echo>")
        await ssh.expect(b"<echo>")
        return ssh

    async def until(self, proxy: Site, key: Path, wanted: Callable[[Child], object]) -> Child:
        """List again and again until the proxy says what is ``wanted``."""
        for _ in range(_TRIES):
            ssh = proxy.ssh(key, "list", terminal=False)
            await ssh.ended()
            if wanted(ssh):
                return ssh
        self.fail(f"{ssh.status} {ssh.seen!r} {ssh.errors!r}\n{proxy.logs}")

    def sees(self, *names: str) -> Callable[[Child], bool]:
        """Whether it lists these VMs, all well."""
        return lambda ssh: (
            is_well(ssh) and all(f"\t{name}\n".encode() in ssh.seen for name in names)
        )


def put_certificate(engine: Site) -> None:
    """A new certificate for localhost."""
    now = datetime.now(UTC)
    identity = pki.issue(todays_authority(), "engine", "server", now, ["localhost"], key_size=2048)
    identity.save(engine.state / "server.cer", engine.state / "server.key")


def served_certificate(port: int) -> str:
    """What a new TLS connection shows, in PEM. Waits."""
    with socket.create_connection(("127.0.0.1", port), 10) as plain:
        context = ssl.create_default_context(cadata=todays_authority().certificate_pem().decode())
        with context.wrap_socket(plain, server_hostname="localhost") as tls:
            shown = tls.getpeercert(binary_form=True)
            assert shown is not None
            return ssl.DER_cert_to_PEM_cert(shown)


async def together(*waiting: Coroutine[Any, Any, object]) -> None:
    """Do all at a time."""
    await gatherResults([Deferred.fromCoroutine(each) for each in waiting], consumeErrors=True)


class AloneTests(EnginesTestCase):
    """One engine on SQLite, and two proxies."""

    async def setUp(self) -> None:  # type: ignore[override]
        await super().setUp()
        self.serve(self.site)
        await self.site.start()

    async def test_two_proxies(self) -> None:
        """Each serves alice; what the engine takes back ends her sessions at both."""
        self.assertIn("The engine serves HTTPS on 127.0.0.1, port", self.site.logs)
        self.assertIn("ssh on nothing (an engine alone)", self.site.logs)
        await self.hosts_known()
        first, second = self.proxy_of(self.site), self.proxy_of(self.site)
        await together(first.start(), second.start())
        sessions = [await self.opened(first, "light1"), await self.opened(second, "light2")]
        await self.site.run("revoke", "alice", "*")
        for session, name in zip(sessions, (b"light1", b"light2"), strict=True):
            await session.expect(rb"\[vmconsole: You no longer have access to " + name)
            self.assertEqual(await session.ended(), 0)

    async def test_renewed(self) -> None:
        """A new certificate is shown at the next connection, and what is no pair never is."""
        before = await deferToThread(served_certificate, self.site.port)
        assert self.site.proxy is not None
        (self.site.state / "server.key").write_bytes(todays_authority().key_pem())
        self.site.proxy.transport.signalProcess("HUP")
        await self.site.log(rb"is not the key of engine\.embedded\.certificate[^\n]* stays in use")
        self.assertEqual(await deferToThread(served_certificate, self.site.port), before)
        put_certificate(self.site)
        self.site.proxy.transport.signalProcess("HUP")
        await self.site.log(rb"engine\.embedded\.certificate \([^\n]*: changed, and in use")
        after = await deferToThread(served_certificate, self.site.port)
        self.assertNotEqual(after, before)
        self.assertEqual(after, (self.site.state / "server.cer").read_text())

    async def test_cannot_start(self) -> None:
        """A port that is taken, and a key that is not there: it ends with 1, and a line that says
        why."""
        second = self.copied()
        self.serve(second)
        text = second.config.read_text()
        second.config.write_text(text.replace(f":{second.port}:", f":{self.site.port}:"))
        told = await self.told(second)
        self.assertIn(
            f"127.0.0.1, port {self.site.port}, cannot be listened on: Address already in use. "
            "See engine.embedded.listen.",
            told,
        )
        (second.state / "server.key").unlink()
        self.assertIn("server.key) cannot be read: No such file", await self.told(second))

    async def told(self, engine: Site) -> str:
        """What it says before it ends with 1."""
        child = Child("twistd").spawn(
            reactor,
            [str(BIN / "twistd"), "-n", "--pidfile=", "vmconsole", "--config", str(engine.config)],
            cwd=str(engine.folder),
        )
        self.addCleanup(child.kill)
        self.assertEqual(await child.ended(), 1)
        told = (child.seen + child.errors).decode()
        self.assertNotIn("Traceback", told)
        self.assertNotIn("is ready", told)
        return told


class DatabaseTests(EnginesTestCase):
    """Two engines on one PostgreSQL database, and a proxy for each."""

    if postgres.missing():
        skip = postgres.missing()

    settings = "recheck = 1.0\ncache_ttl = 0.5\ntimeout = 2.0\nstale_grace = 300.0\n"

    async def setUp(self) -> None:  # type: ignore[override]
        await super().setUp()
        self.server = await deferToThread(postgres.get)
        self.url = await deferToThread(self.server.database)
        self.engines = self.site, self.copied()
        for engine in self.engines:
            self.serve(engine, f'database = "{self.url}"')

    async def fill(self) -> None:
        """The hosts, and alice with her key: through the first engine's command."""
        for name, host in self.lab.hosts.items():
            await self.site.run("host", "add", name, host.uri)
        await self.add("alice", self.alice, self.site)

    async def add(self, user: str, key: Path, engine: Site) -> None:
        """A user who may open all, by the command of one engine."""
        await engine.run("user", "add", user)
        await self.add_key(user, key, engine)
        await engine.run("grant", user, "*")

    async def add_key(self, user: str, key: Path, engine: Site) -> None:
        public = key.with_name(f"{key.name}.pub")
        if not public.exists():
            public.write_text(await deferToThread(public_key, key))
        await engine.run("key", "add", user, str(public))

    async def test_two_engines(self) -> None:
        """What is changed through one the other knows; with one engine gone its proxy goes on
        with what it knows, and the other's with all."""
        await together(*(engine.start() for engine in self.engines))
        await self.fill()
        proxies = [self.proxy_of(engine) for engine in self.engines]
        await together(*(proxy.start() for proxy in proxies))
        sees = self.sees("light1", "light2")
        await together(*(self.until(proxy, self.alice, sees) for proxy in proxies))
        dave = self.site.folder / "dave.key"
        await deferToThread(make_key, dave)
        await self.add("dave", dave, self.engines[1])
        await together(*(self.until(proxy, dave, sees) for proxy in proxies))
        await self.engines[0].stop()
        await self.until(proxies[0], self.alice, is_stale)
        await self.opened(proxies[0], "light1")
        await self.until(proxies[1], dave, sees)

    async def test_server_killed(self) -> None:
        """While PostgreSQL is down whom the proxies know is let in; when it is back, new keys
        count: nothing has to be started again."""
        await together(*(engine.start() for engine in self.engines))
        await self.fill()
        proxies = [self.proxy_of(engine) for engine in self.engines]
        await together(*(proxy.start() for proxy in proxies))
        sees = self.sees("light1", "light2")
        await together(*(self.until(proxy, self.alice, sees) for proxy in proxies))
        await deferToThread(self.server.kill)
        await together(*(self.until(proxy, self.alice, is_stale) for proxy in proxies))
        await self.opened(proxies[0], "light1")
        await deferToThread(self.server.start)
        other = self.site.folder / "other.key"
        await deferToThread(make_key, other)
        await self.add_key("alice", other, self.engines[0])
        await together(*(self.until(proxy, other, sees) for proxy in proxies))

    async def test_server_down_at_start(self) -> None:
        """An engine that starts before PostgreSQL does waits for it: 503 until it is there."""
        await deferToThread(self.server.kill)
        await self.site.start()
        await self.site.log(rb"The embedded engine waits: ")
        self.assertEqual(await deferToThread(self.status), 503)
        await deferToThread(self.server.start)
        await self.site.log(rb"Made the database")
        self.assertEqual(await deferToThread(self.status), 200)

    def status(self) -> int:
        """Of the reply to a good question. Waits."""
        state = self.site.state
        identity = pki.Identity.load(state / "ticket.cer", state / "ticket.key")
        command = '{"command":"public_keys","version":1}'
        self.salts = getattr(self, "salts", 0) + 1
        body = sign_ticket(command, identity, datetime.now(UTC), self.salts.to_bytes(8, "big"))
        context = ssl.create_default_context(cadata=todays_authority().certificate_pem().decode())
        connection = HTTPSConnection("localhost", self.site.port, timeout=10, context=context)
        try:
            connection.request("POST", "/services/vmconsole-proxy", body)
            return connection.getresponse().status
        finally:
            connection.close()


def public_key(key: Path) -> str:
    """The public line of a private key's file. Waits."""
    command = ["ssh-keygen", "-y", "-f", str(key)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
