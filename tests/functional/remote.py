"""The proxy before an oVirt Engine: the stand-in, which listens in the test's own process."""

from __future__ import annotations

import atexit
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from twisted.internet import reactor
from twisted.internet.interfaces import IReactorTime
from twisted.internet.threads import deferToThread

from tests.engine_kit import todays_authority
from tests.functional.case import LabTestCase
from tests.functional.process import Child
from tests.functional.site import booted
from tests.ovirt_engine import OVirtEngine

# More than any test here needs, and less than its time.
_TRIES = 200


@functools.cache
def _keys() -> Path:
    """A folder with everybody's keys, and the proxy's: they are slow to make."""
    folder = Path(tempfile.mkdtemp(prefix="vmc-keys-"))
    # Not with the reactor, which some runners never shut down.
    atexit.register(shutil.rmtree, folder, True)
    (folder / "state").mkdir(mode=0o700)
    for name, kind in (
        ("state/ssh_host_ed25519_key", "ed25519"),
        ("state/ssh_host_rsa_key", "rsa"),
        ("alice.key", "ed25519"),
        ("bob.key", "ed25519"),
    ):
        make_key(folder / name, kind)
    return folder


def make_key(path: Path, kind: str = "ed25519") -> str:
    """A new key in ``path``; the result is the line for the engine. Waits."""
    command = ["ssh-keygen", "-q", "-t", kind, "-N", "", "-C", path.stem, "-f", str(path)]
    subprocess.run(command, check=True)
    return public_line(path)


def public_line(path: Path) -> str:
    """The line for the engine of the key in ``path``."""
    return path.with_name(f"{path.name}.pub").read_text().strip()


class RemoteTestCase(LabTestCase):
    """A proxy with an oVirt Engine: alice may open light1, linux1 and light2, bob light1."""

    settings = ""
    """More TOML for the proxy's section [engine]."""

    async def setUp(self) -> None:  # type: ignore[override]
        self.boot_lab()
        keys = await deferToThread(_keys)
        shutil.copytree(keys, self.site.folder, dirs_exist_ok=True)
        self.alice, self.bob = (self.site.folder / f"{name}.key" for name in ("alice", "bob"))
        self.engine = OVirtEngine(IReactorTime(reactor), todays_authority())
        await self.engine.listen(reactor, self.site.folder)
        self.addCleanup(self.engine.close)
        self.vms: dict[str, str] = {}
        """VM ids by name."""
        for host, name in (("node1", "light1"), ("node1", "linux1"), ("node2", "light2")):
            uuid = await deferToThread(self.lab.hosts[host].uuid, name)
            self.vms[name] = self.engine.add_vm(uuid, name, host)
            self.engine.grant("alice", uuid)
        self.engine.grant("bob", self.vms["light1"])
        self.engine.add_key("alice", public_line(self.alice))
        self.engine.add_key("bob", public_line(self.bob))
        self.site.configure(self.configuration())
        await self.site.start()

    def configuration(self) -> str:
        """The TOML that makes the proxy ask the stand-in."""
        engine, hosts = self.engine, self.lab.hosts
        overrides = "\n".join(f'{name} = "{host.uri}"' for name, host in hosts.items())
        return (
            f'[engine]\nurl = "{engine.url}"\nca = "{engine.ca}"\n'
            f'certificate = "{engine.certificate}"\nkey = "{engine.key}"\n{self.settings}\n'
            f'[hosts]\npki = "{self.lab.pki}"\n[hosts.overrides]\n{overrides}\n'
        )

    async def opened(self, key: Path, name: str) -> Child:
        """An ssh on the console of a VM that echoes."""
        ssh = self.site.ssh(key, name)
        await ssh.expect(rb"\[vmconsole: " + name.encode() + rb" on node[12]\. To leave")
        await booted(ssh)
        return ssh

    async def works(self, ssh: Child, patience: float = 30.0) -> None:
        """What is typed into an echoing guest comes back."""
        self._typed = getattr(self, "_typed", 0) + 1
        words = b"<%d>" % self._typed
        ssh.type(words)
        await ssh.expect(words, patience)

    async def listed(self, key: Path) -> Child:
        """An ended ssh that asked for the list; ``errors`` has what it was told besides."""
        ssh = self.site.ssh(key, "list", terminal=False)
        await ssh.ended()
        return ssh

    async def until(self, key: Path, wanted: Callable[[Child], object]) -> Child:
        """List again and again until the proxy says what is ``wanted``: the first such ssh."""
        for _ in range(_TRIES):
            ssh = await self.listed(key)
            if wanted(ssh):
                return ssh
        self.fail(f"{ssh.status} {ssh.seen!r} {ssh.errors!r}\n{self.site.logs}")
