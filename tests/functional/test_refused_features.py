"""What ssh can do and a proxy to consoles does not: refused with a word, and without effect."""

from __future__ import annotations

import asyncio
import os
import struct
from typing import Any

import asyncssh
from twisted.conch.ssh.common import getNS
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import (
    TCP4ClientEndpoint,
    TCP4ServerEndpoint,
    UNIXServerEndpoint,
    connectProtocol,
)
from twisted.internet.error import ConnectionRefusedError
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.internet.threads import deferToThread
from twisted.python.failure import Failure

from tests.agent import Agent
from tests.functional.clients import OpenSSH, Session
from tests.functional.interop import InteropCase
from tests.functional.process import Child
from tests.functional.site import hold_port, port_of
from vmconsole.ssh.session import SessionChannel


class Asking(Protocol):
    """Sends something; ``answer`` fires with all that comes back, once the other side closes."""

    def __init__(self, data: bytes = b"") -> None:
        self.answer: Deferred[bytes] = Deferred()
        self._data = data
        self._got = b""

    def connectionMade(self) -> None:
        assert self.transport is not None
        self.transport.write(self._data)

    def dataReceived(self, data: bytes) -> None:
        self._got += data

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.answer.callback(self._got)


class Bait(Factory):
    """Counts who comes to what a client would have forwarded to."""

    noisy = False

    def __init__(self) -> None:
        self.visits = 0

    def buildProtocol(self, addr: object) -> Protocol:
        self.visits += 1
        return Protocol()


class RefusedCase(InteropCase):
    """The real ssh with options of its own, beside a session that echoes."""

    async def setUp(self) -> None:  # type: ignore[override]
        await super().setUp()
        self.requests: list[tuple[bytes, bytes, bool]] = []
        """What was asked for on a session: the kind, its data, whether it was granted."""
        original = SessionChannel.requestReceived

        def received(channel: SessionChannel, kind: bytes, data: bytes) -> bool:
            granted = original(channel, kind, data)
            self.requests.append((kind, data, granted))
            return granted

        self.patch(SessionChannel, "requestReceived", received)
        self.bait = Bait()
        port: Any = await TCP4ServerEndpoint(reactor, 0, interface="127.0.0.1").listen(self.bait)
        self.addCleanup(port.stopListening)
        self.target = f"127.0.0.1:{port.getHost().port}"

    def ssh(self, *options: str, words: tuple[str, ...] = ("echo",), **env: str) -> Child:
        """Start ssh with these options before all others."""
        command = OpenSSH().command(Session(self.door, self.key, words))
        command.words[1:1] = options
        command.environment.update(env)
        child: Child = self.start(command)
        return child

    async def opened(self, *options: str, **env: str) -> Child:
        """The same, once its session is there."""
        ssh = self.ssh(*options, **env)
        await ssh.expect(b"ready;")
        return ssh

    async def leaves(self, ssh: Child) -> None:
        """The session works to the end, and nobody came to the bait."""
        ssh.type(b"all is well")
        await ssh.expect(b"all is well")
        ssh.end_input()
        self.assertEqual(await ssh.ended(), 0, ssh.errors)
        self.assertEqual(self.bait.visits, 0)

    def port(self) -> int:
        """A port that nobody else gets until the test ends."""
        held = hold_port()
        self.addCleanup(held.close)
        return port_of(held)

    def granted(self, kind: bytes) -> list[bool]:
        """What was said to each request of this kind."""
        return [granted for asked, _, granted in self.requests if asked == kind]


async def ask(port: int, data: bytes = b"") -> bytes:
    """What somebody says to ``data`` until they close."""
    asking = Asking(data)
    await connectProtocol(TCP4ClientEndpoint(reactor, "127.0.0.1", port), asking)
    return await asking.answer


class ForwardingTests(RefusedCase):
    """Connections that would come out of the proxy, or into it."""

    async def test_local(self) -> None:
        """-L to a port and to a unix socket: each connection is closed, with a word from ssh."""
        for target in (self.target, str(self.folder / "target")):
            port = self.port()
            ssh = await self.opened("-L", f"127.0.0.1:{port}:{target}")
            self.assertEqual(await ask(port, b"hello"), b"")
            await self.leaves(ssh)
            self.assertRegex(
                ssh.errors, rb"open failed: administratively prohibited: only sessions here"
            )

    async def test_dynamic(self) -> None:
        """-D: a SOCKS client's connection is closed."""
        port = self.port()
        ssh = await self.opened("-D", f"127.0.0.1:{port}")
        host, number = self.target.split(":")
        packed = struct.pack(">H4B", int(number), *map(int, host.split(".")))
        self.assertEqual(await ask(port, b"\x04\x01" + packed + b"me\0"), b"")
        await self.leaves(ssh)
        self.assertRegex(ssh.errors, rb"open failed: administratively prohibited")

    async def test_stdio(self) -> None:
        """-W, which is what -J uses: ssh ends with 255."""
        ssh = self.ssh("-W", self.target, words=())
        self.assertEqual(await ssh.ended(), 255)
        self.assertRegex(ssh.errors, rb"administratively prohibited: only sessions here")
        self.assertEqual(self.bait.visits, 0)

    async def test_remote(self) -> None:
        """-R of a port and of a unix socket: ssh warns, nothing listens, and the session works."""
        port, path = self.port(), self.folder / "remote"
        ssh = await self.opened(
            *("-R", f"127.0.0.1:{port}:{self.target}", "-R", f"{path}:{self.target}")
        )
        await self.assertFailure(Deferred.fromCoroutine(ask(port)), ConnectionRefusedError)
        self.assertFalse(path.exists())
        await self.leaves(ssh)
        self.assertRegex(ssh.errors, rb"remote port forwarding failed for listen port %d" % port)
        self.assertRegex(
            ssh.errors, rb"remote port forwarding failed for listen path %b" % bytes(path)
        )

    async def test_remote_that_is_needed(self) -> None:
        """-R with ExitOnForwardFailure ends ssh with 255."""
        ssh = self.ssh("-o", "ExitOnForwardFailure=yes", "-R", f"0:{self.target}")
        self.assertEqual(await ssh.ended(), 255)
        self.assertIn(b"remote port forwarding failed", ssh.errors)

    async def test_agent(self) -> None:
        """-A: the request is refused, and nobody comes to the agent any more."""
        path, agent = str(self.folder / "agent"), Agent()
        port: Any = await UNIXServerEndpoint(reactor, path).listen(agent)
        self.addCleanup(port.stopListening)
        ssh = await self.opened("-A", "-o", f"IdentityAgent={path}")
        visits = agent.visits
        await self.leaves(ssh)
        self.assertEqual(self.granted(b"auth-agent-req@openssh.com"), [False])
        self.assertEqual(agent.visits, visits)

    async def test_x11(self) -> None:
        """-Y: ssh says that it was refused, and the session works."""
        ssh = await self.opened("-Y", "-o", "XAuthLocation=/none", DISPLAY=f"{self.target}.0")
        await self.leaves(ssh)
        self.assertIn(b"X11 forwarding request failed", ssh.errors)
        self.assertEqual(self.granted(b"x11-req"), [False])

    async def test_tunnel(self) -> None:
        """-w, of which asyncssh needs no device of its own: the channel is refused."""

        async def tunnel() -> None:
            async with asyncssh.connect(
                "127.0.0.1",
                self.server.port,
                username="vmproxy",
                client_keys=[str(self.key)],
                known_hosts=str(self.door.known_hosts),
                config=None,
                agent_path=None,
            ) as connection:
                for opening in (connection.open_tun, connection.open_tap):
                    try:
                        await opening()
                    except asyncssh.ChannelOpenError as error:
                        refusals.append(str(error))

        refusals: list[str] = []
        await deferToThread(asyncio.run, tunnel())
        self.assertEqual(refusals, ["only sessions here"] * 2)


class RequestTests(RefusedCase):
    """What a session may not have."""

    async def test_subsystem(self) -> None:
        """-s, by whatever name: ssh says that it failed, and ends with 255."""
        for name in ("sftp", "netconf"):
            ssh = self.ssh("-s", words=(name,))
            self.assertEqual(await ssh.ended(), 255)
            self.assertIn(b"subsystem request failed on channel 0", ssh.errors)
        self.assertEqual(self.granted(b"subsystem"), [False, False])

    async def test_sftp(self) -> None:
        """sftp and scp end at once, with 255, and nothing is made."""
        options = [
            *("-P", str(self.server.port), "-i", str(self.key), "-F", "none"),
            *("-o", f"UserKnownHostsFile={self.door.known_hosts}", "-o", "IdentitiesOnly=yes"),
        ]
        made = self.folder / "made"
        for words in (
            ["/usr/bin/sftp", *options, "vmproxy@127.0.0.1"],
            ["/usr/bin/scp", *options, str(self.key), f"vmproxy@127.0.0.1:{made}"],
        ):
            child = Child(words[0]).spawn(reactor, words)
            self.addCleanup(child.kill)
            self.assertEqual(await child.ended(), 255)
            self.assertIn(b"subsystem request failed on channel 0", child.errors)
        self.assertFalse(made.exists())

    async def test_environment(self) -> None:
        """LANG, LC_* and TERM are taken, which changes nothing; all else is refused."""
        taken = ("LANG=C", "LC_ALL=C.UTF-8", "LC_TIME=C", "TERM=vt100")
        refused = ("PATH=/", "LD_PRELOAD=/x.so", "LANGUAGE=de", "LC=C", "XTERM=1", "HOME=/")
        sent = "SetEnv=" + " ".join((*taken, *refused))
        await self.leaves(await self.opened("-o", sent, "-o", "SendEnv=SHELL", SHELL="/bin/false"))
        answers = {
            getNS(data)[0].decode(): granted
            for kind, data, granted in self.requests
            if kind == b"env"
        }
        names = [name.partition("=")[0] for name in (*taken, *refused)]
        self.assertEqual(
            answers,
            {name: number < len(taken) for number, name in enumerate(names)} | {"SHELL": False},
        )


class ControlMasterTests(RefusedCase):
    """Many sessions of one connection."""

    def shared(self) -> Child:
        """One more session of the connection; without it there is none."""
        ssh = self.ssh("-S", f"{self.folder}/c", "-o", "ProxyCommand=false")
        # The first one has this one's pipes, too: it has to end before.
        self.addCleanup(self.first.kill)
        return ssh

    async def echoes(self, *sessions: Child) -> None:
        """All of them work."""
        for number, session in enumerate(sessions):
            words = b"<%d:%s>" % (number, os.urandom(4).hex().encode())
            session.type(words)
            await session.expect(words)

    async def test_eight(self) -> None:
        """Eight sessions; the ninth is refused with a word; one that leaves, and one that is
        killed, end none of the others, and make room again."""
        self.first = await self.opened("-M", "-S", f"{self.folder}/c", "-o", "ControlPersist=no")
        sessions = [self.first]
        for _ in range(7):
            sessions.append(self.shared())
            await sessions[-1].expect(b"ready;")
        self.assertEqual(len(self.server.connections), 1)
        await self.echoes(*sessions)

        refused = self.shared()
        self.assertEqual(await refused.ended(), 255)
        self.assertIn(b"Session open refused by peer", refused.errors)
        self.assertRegex(sessions[0].errors, rb"open failed: resource shortage: \S.*sessions")
        await self.echoes(*sessions)

        leaving = sessions.pop(3)
        leaving.end_input()
        self.assertEqual(await leaving.ended(), 0)
        killed = sessions.pop(5)
        killed.transport.signalProcess("KILL")
        # The ssh that has the connection does nothing about it until something else happens.
        await self.echoes(*sessions)
        await killed.ended()
        for _ in range(2):
            sessions.append(self.shared())
            await sessions[-1].expect(b"ready;")
        await self.echoes(*sessions)
        self.assertEqual(len(self.server.connections), 1)
