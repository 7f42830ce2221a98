"""What stands where, by the hosts themselves: the embedded engine on a real libvirtd."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from twisted.internet.threads import deferToThread

from tests.functional.process import Child, Unexpected
from tests.functional.test_follow import FollowCase


class InventoryTests(FollowCase):
    """Lists as the users of a site without oVirt get them, asked for anew each time."""

    configuration = "[engine]\ncache_ttl = 0.0"

    async def listed(self, name: str) -> dict[str, str] | None:
        """The VM as alice is told of it; None: she is not."""
        ssh = self.site.ssh(self.alice, "list", "--format", "json", terminal=False)
        self.assertEqual(await ssh.ended(), 0)
        [found] = [each for each in json.loads(ssh.seen) if each["vmname"] == name] or [None]
        return found

    async def until(self, name: str, condition: Callable[[Any], bool], tries: int) -> None:
        """The VM becomes like that; each try takes a login."""
        for _ in range(tries):
            found = await self.listed(name)
            if condition(found):
                return
        raise Unexpected(f"{name} is {found}")

    async def test_migrated(self) -> None:
        """A VM that moved is on its new host for whoever looks next."""
        await self.until("wanderer", lambda vm: vm is not None and vm["host"] == "node1", 100)
        await deferToThread(self.lab.node1.migrate, "wanderer", self.lab.node2)
        # A few logins are well below a second.
        await self.until("wanderer", lambda vm: vm is not None and vm["host"] == "node2", 5)
        await deferToThread(self.lab.node2.migrate, "wanderer", self.lab.node1)
        await self.until("wanderer", lambda vm: vm is not None and vm["host"] == "node1", 5)

    async def test_host_comes_back(self) -> None:
        """What changed on a host while its libvirtd was away is known when it is back, without a
        restart of anything."""
        await self.until("wanderer", lambda vm: vm is not None, 100)
        await deferToThread(self.lab.node1.stop)
        try:
            await self.site.log(rb"host node1 is lost")
            found = await self.listed("wanderer")
            self.assertEqual(found and found["host"], "node1")
        finally:
            await deferToThread(self.lab.node1.start)
        await self.site.log(rb"host node1 answers again")
        await deferToThread(self.lab.node1.destroy, "wanderer")
        await deferToThread(self.lab.node1.remove, "wanderer")
        await self.until("wanderer", lambda vm: vm is None, 100)

    async def test_no_console(self) -> None:
        """A VM whose console cannot be opened is marked in the menu, in JSON and in `vm list`, with
        what to do."""
        text = "no console device: add <console type='pty'/>"
        found = await self.listed("none1")
        assert found is not None
        self.assertIn(text, found["problem"])
        ssh: Child = self.site.ssh(self.alice)
        await ssh.expect(
            rb"none1 \[[^\]]+\]\s+\([^)]*no console device: add <console\s+type='pty'/>"
        )
        await ssh.expect(rb"> $")
        ssh.type(b"q\r")
        self.assertEqual(await ssh.ended(), 0)
        vms = json.loads(await self.site.run("vm", "list", "--json"))
        [problem] = [vm["problem"] for vm in vms if vm["name"] == "none1"]
        self.assertIn(text, problem)
