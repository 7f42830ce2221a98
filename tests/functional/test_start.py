"""What keeps the proxy from starting is told in one line, with exit status 1 and no traceback."""

from __future__ import annotations

from pathlib import Path

from twisted.internet import reactor
from twisted.trial.unittest import TestCase

from tests.functional.process import Child
from tests.functional.site import BIN, Site, hold_port, port_of


class StartTests(TestCase):
    """``twistd -n vmconsole`` with something wrong."""

    timeout = 120

    def setUp(self) -> None:
        self.site = Site(reactor)
        self.addCleanup(self.site.close)

    async def told(self, *arguments: str) -> str:
        """What it says before it ends with 1."""
        child = Child("twistd").spawn(
            reactor,
            [str(BIN / "twistd"), "-n", "--pidfile=", "vmconsole", *arguments],
            env={"HOME": str(self.site.folder)},
            cwd=str(self.site.folder),
        )
        self.addCleanup(child.kill)
        status = await child.ended()
        text = (child.seen + child.errors).decode()
        self.assertEqual(status, 1, text)
        self.assertNotIn("Traceback", text)
        return text

    async def test_listed(self) -> None:
        """``twistd --help`` lists vmconsole, and ``twistd vmconsole --help`` its option."""
        for words, pattern in (
            (["--help"], rb"vmconsole +An ssh proxy to the serial consoles"),
            (["vmconsole", "--help"], rb"--config="),
        ):
            child = Child("twistd").spawn(reactor, [str(BIN / "twistd"), *words])
            self.assertEqual(await child.ended(), 0)
            self.assertRegex(child.seen, pattern)

    async def test_configuration(self) -> None:
        """A mistake in the file, and a file that is not there."""
        self.site.config.write_text("[ssh]\nlisten_on = 22\n")
        self.assertIn("listen_on", await self.told("--config", str(self.site.config)))
        self.assertIn("/no/such cannot be read", await self.told("--config", "/no/such"))

    async def test_endpoint(self) -> None:
        """An endpoint that is none."""
        self.site.config.write_text('[ssh]\nlisten = ["tcp:22x"]\n')
        text = await self.told("--config", str(self.site.config))
        self.assertIn("vmconsole: ssh.listen: 'tcp:22x' is no Twisted endpoint", text)
        self.site.configure("")
        text = self.site.config.read_text()
        self.site.config.write_text(text.replace(f"tcp:{self.site.port}", "tcp:99999"))
        self.assertIn("cannot listen", await self.told("--config", str(self.site.config)))

    async def test_embedded_engine(self) -> None:
        """An embedded engine that cannot start ends the proxy: a service manager has to see it."""
        await self.site.start()
        first = self.site.config.read_text()
        other = self.site.folder / "other.toml"
        held = hold_port()
        self.addCleanup(held.close)
        other.write_text(first.replace(f"tcp:{self.site.port}", f"tcp:{port_of(held)}"))
        text = await self.told("--config", str(other))
        self.assertIn("the embedded engine did not start", text)
        self.assertNotIn("is ready", text)

    async def test_port_in_use(self) -> None:
        """A port that somebody else has."""
        self.site.held.listen()
        text = await self.told("--config", str(self.site.config))
        self.assertIn(f"cannot listen on 127.0.0.1, port {self.site.port}", text)

    async def test_daemon(self) -> None:
        """Plain ``twistd``, which makes a daemon, tells it, too, instead of waiting for ever."""
        self.site.held.listen()
        child = Child("twistd").spawn(
            reactor,
            [str(BIN / "twistd"), "vmconsole", "--config", str(self.site.config)],
            cwd=str(self.site.folder),
        )
        self.addCleanup(child.kill)
        self.assertEqual(await child.ended(), 1)
        told = (child.seen + child.errors).decode()
        self.assertIn(f"cannot listen on 127.0.0.1, port {self.site.port}", told)

    async def test_state_directory(self) -> None:
        """A state directory that cannot be made."""
        Path(self.site.state).write_text("a file")
        text = await self.told("--config", str(self.site.config))
        self.assertIn("the host key cannot be read: Not a directory", text)

    async def test_weak_algorithm(self) -> None:
        """An algorithm that is too weak."""
        self.site.configure("", ssh_settings='ciphers = ["3des-cbc"]')
        text = await self.told("--config", str(self.site.config))
        self.assertIn("ssh.ciphers: '3des-cbc' is unknown or too weak", text)
