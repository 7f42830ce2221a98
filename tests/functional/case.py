"""What the functional tests stand on: a lab, a site made once and copied, and a clean log."""

from __future__ import annotations

import atexit
import re
import shutil
from pathlib import Path

from twisted.internet import reactor
from twisted.trial.unittest import TestCase

from tests import lab
from tests.functional.site import Site

_template: Path | None = None


async def _make_template() -> Path:
    """A state directory with everybody in it: keys are slow to make, so they are made once."""
    site = Site(reactor)
    hosts = lab.get()
    try:
        for host in (hosts.node1, hosts.node2):
            await site.run("host", "add", host.name, host.uri)
        await site.add_user("alice", "*")
        await site.add_user("bob", "light1")
        await site.add_user("carol")
        await site.start()
        await site.log(rb"node2 has")
        await site.stop()
        site.held.close()
    except BaseException:
        await site.close()
        raise
    return site.folder


def _boot_guests(hosts: lab.Lab) -> None:
    """Boot the guests, on the first use in this process."""
    if "light1" in hosts.node1.virsh("list", "--all", "--name").split():
        return
    hosts.node1.run(lab.LightGuest("light1"))
    hosts.node1.run(lab.LinuxGuest("linux1"))
    hosts.node1.define(lab.LightGuest("off1"))
    hosts.node1.run(lab.LightGuest("none1", serial="none"))
    hosts.node1.run(lab.LightGuest("socket1", serial="unix"))
    hosts.node2.run(lab.LightGuest("light2"))


class LabTestCase(TestCase):
    """A proxy before a real lab, and a clean log in the end.

    In the lab stand, on node1, light1 (it echoes every byte), linux1 (a Linux with a login), off1
    (shut off), none1 (no console device), socket1 (a console that is no pty), and light2 on node2.
    """

    # The first test of a process has the lab to start, and its guests: some 40 s on a busy machine.
    timeout = 300

    # Not in setUpClass, which trial's own runner does not call.
    def boot_lab(self) -> None:
        """Start hosts and guests, unless they run."""
        self.lab = lab.get()
        _boot_guests(self.lab)
        self.site = Site(reactor)

    async def hosts_known(self) -> None:
        """Wait until the embedded engine, which has just started, knows what stands on both hosts.
        Until then it lists none of their VMs."""
        wanted = {b"node1 has", b"node2 has"}
        while wanted:
            assert self.site.proxy is not None
            match = await self.site.proxy.expect(rb"node[12] has")
            wanted.discard(match[0])

    def memory(self, what: str) -> int:
        """Bytes of the proxy's memory: VmRSS, what it has now, or VmHWM, the most it had."""
        assert self.site.proxy is not None
        status = Path(f"/proc/{self.site.proxy.transport.pid}/status").read_text()
        [line] = [line for line in status.splitlines() if line.startswith(f"{what}:")]
        return int(line.split()[1]) * 1024

    async def tearDown(self) -> None:  # type: ignore[override]
        await self.site.stop()
        logs = self.site.logs
        await self.site.close()
        trouble = re.search(r"[^\n]*\n[^\n]*(?:Traceback|Unhandled).*", logs, re.DOTALL)
        self.assertIsNone(trouble, trouble and trouble[0])


class FunctionalTestCase(LabTestCase):
    """A proxy with the embedded engine: alice may open everything, bob light1, carol nothing."""

    configuration = ""
    """More TOML for the proxy."""
    ssh_settings = ""
    """More TOML for its section [ssh]."""

    async def setUp(self) -> None:  # type: ignore[override]
        global _template
        self.boot_lab()
        if _template is None:
            _template = await _make_template()
            # Not with the reactor, which some runners never shut down.
            atexit.register(shutil.rmtree, _template, True)
        shutil.copytree(_template, self.site.folder, dirs_exist_ok=True)
        self.site.configure(self.configuration, self.ssh_settings)
        self.alice, self.bob, self.carol = (
            self.site.folder / f"{name}.key" for name in ("alice", "bob", "carol")
        )
        await self.start_site()

    async def start_site(self) -> None:
        """Start the proxy, and wait until it knows what stands on both hosts."""
        await self.site.start()
        await self.hosts_known()
