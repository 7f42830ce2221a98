"""vmconsole.toml."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
from twisted.trial.unittest import SynchronousTestCase

from tests.engine_kit import short_directory
from tests.fakes_libvirt import FakeLibvirt
from vmconsole import config, tap
from vmconsole.console.pool import ConsolePool
from vmconsole.console.recording import Recordings
from vmconsole.console.warm import WarmConsoles
from vmconsole.engine.embedded.files import EmbeddedFiles
from vmconsole.engine.embedded.service import EmbeddedEngine
from vmconsole.engine.files import ExpiryWatch
from vmconsole.errors import ConfigError
from vmconsole.hypervisor.libvirt_host import HostPool
from vmconsole.signals import HangUp
from vmconsole.ssh.avatar import ConsoleRealm
from vmconsole.ssh.hostkeys import HostKeys
from vmconsole.ssh.ports import Ports
from vmconsole.ssh.trust import Trust


class ConfigTests(SynchronousTestCase):
    """What is read, and what is told."""

    def load(self, text: str, **environ: str) -> config.Config:
        self.path = Path(self.mktemp())
        self.path.write_text(text)
        return config.load(self.path, environ)

    def test_defaults(self) -> None:
        """Without a file all is as the contract says; the state is in the home directory."""
        loaded = config.load(None, {})
        self.assertEqual(loaded.ssh.listen, ("tcp:2222",))
        self.assertEqual(loaded.ssh.users, ("ovirt-vmconsole", "vmproxy"))
        self.assertEqual(loaded.state_directory, Path("~/.local/state/vmconsole").expanduser())
        self.assertEqual(loaded.escape_byte, 0x1D)

    def test_example(self) -> None:
        """The example in etc/ is valid, and its values are the defaults."""
        example = Path(__file__).parent.parent / "etc" / "vmconsole.toml"
        environ = {"STATE_DIRECTORY": "/var/lib/vmconsole"}
        self.assertEqual(config.load(example, environ), config.load(None, environ))
        commented = "\n".join(
            line.removeprefix("#") if line.startswith("#") and " = " in line else line
            for line in example.read_text().splitlines()
        )
        written = self.load(commented, **environ)
        self.assertEqual(written.hosts.overrides, {"node1": "qemu:///system"})
        self.assertEqual(
            msgspec.structs.replace(
                written, hosts=msgspec.structs.replace(written.hosts, overrides={})
            ),
            config.load(None, environ),
        )

    def test_state_directory(self) -> None:
        """systemd's $STATE_DIRECTORY is used, the first when there are several; a configured one
        comes first. Relative names are below it, absolute ones are not."""
        loaded = self.load("", STATE_DIRECTORY="/var/lib/a:/var/lib/b")
        self.assertEqual(loaded.path("x"), Path("/var/lib/a/x"))
        self.assertEqual(loaded.path("/etc/x"), Path("/etc/x"))
        self.assertEqual(self.load('[hosts]\npki = "p"', STATE_DIRECTORY="/s").hosts.pki, "/s/p")
        loaded = self.load('[state]\ndirectory = "/srv"', STATE_DIRECTORY="/var/lib/a")
        self.assertEqual(loaded.path("x"), Path("/srv/x"))

    def test_mistakes(self) -> None:
        """Each mistake is told with the file, the key, and what would be right."""
        for text, told in (
            ("[ssh]\nlisten_on = 1", "listen_on"),
            ("[nonsense]\n", "nonsense"),
            ("[ssh]\nlisten = 2222", "$.ssh.listen"),
            ("[ssh", "no valid TOML"),
            ('[console]\nescape = "X"', "console.escape"),
            ('[console]\nbreak = "yes"', "$.console.break"),
            ("[console]\nallow_break = true", "allow_break"),
            ("[console]\nforce = 1", "$.console.force"),
            ("[limits]\nlogin_grace = 0", "limits.login_grace"),
            ("[limits]\nlogin_grace = nan", "limits.login_grace"),
            ("[engine]\ncache_ttl = inf", "engine.cache_ttl"),
            ('[state]\ndirectory = "~no-such-user/x"', "state.directory"),
            ("[engine]\ncache_ttl = -1", "engine.cache_ttl"),
            ("[engine]\nstale_grace = -1", "engine.stale_grace"),
            ("[engine]\nrecheck = 0", "engine.recheck"),
            ('[engine]\nurl = "engine"', "engine.url"),
            ('[engine]\nurl = "https://e/"', "engine.certificate is missing"),
            ("[ssh]\nusers = []", "ssh.users is empty"),
            ("[ssh]\nhost_keys = []", "ssh.host_keys is empty"),
            ("[console]\nfollow = -1", "console.follow = -1"),
            ("[console]\nfollow = inf", "console.follow = inf"),
            ('[console]\nwarm = "web*"', "$.console.warm"),
            ("[console]\nwarm = [1]", "$.console.warm"),
            ("[recording]\nmax_age = -0.5", "recording.max_age = -0.5"),
            ("[recording]\nmax_age = nan", "recording.max_age = nan"),
            ("[recording]\nretain_age = -1", "recording.retain_age = -1"),
            ("[recording]\nretain_age = inf", "recording.retain_age = inf"),
            ("[recording]\nretain_bytes = -1", "recording.retain_bytes = -1"),
            ("[recording]\nretain_bytes = 0.5", "$.recording.retain_bytes"),
            ("[recording]\nmax_size = 65535", "recording.max_size = 65535: 65536 bytes"),
            ("[recording]\nmax_size = 1", "recording.max_size = 1: 65536 bytes"),
            ("[recording]\nmax_size = -1", "recording.max_size = -1: 65536 bytes"),
            ("[recording]\nrequired = true", "recording.required needs a recording.directory."),
            ("[recording]\nsize = 1", "size"),
        ):
            with self.assertRaises(ConfigError) as caught:
                self.load(text)
            self.assertIn(told, str(caught.exception))
            self.assertIn(self.path.name, str(caught.exception))

    def test_zero(self) -> None:
        """Answers of the engine may be remembered for no time at all."""
        loaded = self.load("[engine]\ncache_ttl = 0\nstale_grace = 0")
        self.assertEqual((loaded.engine.cache_ttl, loaded.engine.stale_grace), (0, 0))

    def test_recording(self) -> None:
        """Nothing is recorded unless a directory is named, which is below the state directory
        unless it is absolute; nor is any console kept warm. Without limits all is kept."""
        self.assertEqual(config.load(None, {}).recording, config.Recording())
        loaded = self.load("", STATE_DIRECTORY="/s")
        self.assertEqual(msgspec.structs.astuple(loaded.recording), ("", False, 0, 0.0, 0.0, 0))
        self.assertEqual((loaded.console.warm, loaded.console.follow), ((), 300.0))
        for written, directory in (("r/x", "/s/r/x"), ("/var/r", "/var/r")):
            loaded = self.load(f'[recording]\ndirectory = "{written}"', STATE_DIRECTORY="/s")
            self.assertEqual(loaded.recording.directory, directory)
            self.assertEqual(loaded.state_directory, Path("/s"))

    def test_recording_limits(self) -> None:
        """All of it may be set, to the least, too."""
        loaded = self.load(
            """
            [recording]
            directory = "r"
            required = true
            max_size = 65536
            max_age = 86400
            retain_age = 0.5
            retain_bytes = 1
            [console]
            warm = ["web*", "db"]
            follow = 0
            """,
            STATE_DIRECTORY="/s",
        )
        self.assertEqual(
            msgspec.structs.astuple(loaded.recording), ("/s/r", True, 65536, 86400.0, 0.5, 1)
        )
        self.assertEqual((loaded.console.warm, loaded.console.follow), (("web*", "db"), 0.0))

    def test_unreadable(self) -> None:
        """A file that is not there, or no text, is told."""
        with self.assertRaises(ConfigError) as caught:
            config.load(Path("/nonexistent/vmconsole.toml"), {})
        self.assertIn("/nonexistent/vmconsole.toml cannot be read", str(caught.exception))
        path = Path(self.mktemp())
        path.write_bytes(b"\xff\xfe")
        self.assertRaises(ConfigError, config.load, path, {})

    def test_escape(self) -> None:
        """The escape is ^ and a letter; "" is none."""
        self.assertEqual(self.load('[console]\nescape = "^a"').escape_byte, 1)
        self.assertIsNone(self.load('[console]\nescape = ""').escape_byte)

    def test_powers(self) -> None:
        """Neither BREAK nor force is allowed unless the file says so, each for itself."""
        console = config.load(None, {}).console
        self.assertEqual((console.allow_break, console.force), (False, False))
        console = self.load("[console]\nbreak = true").console
        self.assertEqual((console.allow_break, console.force), (True, False))
        console = self.load("[console]\nforce = true").console
        self.assertEqual((console.allow_break, console.force), (False, True))

    def test_default_path(self) -> None:
        """$VMCONSOLE_CONFIG names the file when the command line does not."""
        self.assertEqual(config.default_path({"VMCONSOLE_CONFIG": "/x"}), Path("/x"))


class ComposedTests(SynchronousTestCase):
    """What the proxy has for what its configuration says."""

    def make(self, **sections: Any) -> dict[type, Any]:
        """Its parts, in the order in which they start."""
        # Nothing is started: this one has all that they ask for.
        from twisted.internet import reactor

        state = config.State(directory=str(short_directory(self)))
        loaded = config.Config(ssh=config.SSH(listen=()), state=state, **sections)
        proxy = tap.make_proxy(loaded, reactor, FakeLibvirt(), None, bytes)
        return {type(part): part for part in proxy}

    def test_neither(self) -> None:
        """By default nothing is recorded, nothing is kept warm, and consoles hear of guests."""
        parts = self.make()
        self.assertNotIn(Recordings, parts)
        self.assertNotIn(WarmConsoles, parts)
        self.assertIs(parts[HostPool].guest_observer, parts[ConsolePool])
        self.assertIsNone(parts[ConsolePool]._recordings)

    def test_both(self) -> None:
        """Recordings start before the consoles and stop after them; those that are to be warm
        start later, hear of guests, and stop earlier. The ssh ports start last, and stop first."""
        parts = self.make(
            console=config.Console(warm=("web*",)),
            recording=config.Recording(directory="/r", required=True),
        )
        order = list(parts)
        self.assertEqual(order[-4:], [Recordings, ConsolePool, WarmConsoles, Ports])
        self.assertEqual(order[0], HostPool)
        self.assertIs(parts[HostPool].guest_observer, parts[WarmConsoles])
        self.assertIs(parts[WarmConsoles]._pool, parts[ConsolePool])
        self.assertEqual(parts[WarmConsoles]._patterns, ("web*",))
        self.assertIs(parts[ConsolePool]._recordings, parts[Recordings])
        self.assertTrue(parts[Recordings].required)

    def test_files(self) -> None:
        """The embedded engine's files are watched, too, and their end; SIGHUP is for them."""
        parts = self.make()
        files = parts[EmbeddedFiles]
        self.assertIs(parts[EmbeddedEngine].files, files)
        both = (files, parts[Trust])
        self.assertEqual(parts[ExpiryWatch]._files, both)
        self.assertEqual(parts[HangUp]._action.args, (both,))

    def test_trust(self) -> None:
        """When what is trusted has changed, logins that it no longer lets in are ended, and new
        connections get the host keys as they are then."""
        from twisted.internet import reactor

        asked: list[object] = []
        self.patch(ConsoleRealm, "end_refused", lambda realm, refusal: asked.append(refusal))
        ssh = config.SSH(listen=("tcp:0",), host_keys=("ssh_host_ed25519_key",))
        state = config.State(directory=str(short_directory(self)))
        loaded = config.Config(ssh=ssh, state=state)
        proxy = tap.make_proxy(loaded, reactor, FakeLibvirt(), None, bytes)
        proxy._prepare()
        [trust] = [part for part in proxy if isinstance(part, Trust)]
        self.assertIs(proxy._factory.host_keys, trust.host_keys)
        trust._host_keys.value = HostKeys(trust.host_keys.keys)
        trust._tell()
        self.assertIs(proxy._factory.host_keys, trust.host_keys)
        self.assertEqual(asked, [trust.refusal])

    def test_recordings(self) -> None:
        """What is configured is what it does."""
        self.assertIsNone(tap.make_recordings(None, config.Recording(required=True)))
        made: list[dict[str, Any]] = []

        def note(_reactor: Any, directory: Path, **settings: Any) -> None:
            made.append({"directory": str(directory), **settings})

        self.patch(tap, "Recordings", note)
        settings = config.Recording(
            directory="/r",
            required=True,
            max_size=65536,
            max_age=1.0,
            retain_age=2.0,
            retain_bytes=3,
        )
        tap.make_recordings(None, settings)
        self.assertEqual(made, [msgspec.structs.asdict(settings)])
