"""Consoles that are recorded, and consoles that are held open."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from twisted.internet import reactor
from twisted.internet.threads import deferToThread
from twisted.internet.utils import getProcessOutput

from tests import lab
from tests.functional.case import FunctionalTestCase
from tests.functional.process import Child
from tests.functional.site import BIN, booted

# Looks at something that comes within a second or so.
_LOOKS = 100


class RecordedCase(FunctionalTestCase):
    """Alice and Bob may open light1, which echoes."""

    async def attach(self, key: Path, *words: str) -> Child:
        """An ssh on light1's console."""
        ssh = self.site.ssh(key, *(words or ("light1",)))
        await ssh.expect(rb"\[vmconsole: light1 on node1\.")
        return ssh

    async def leave(self, *everybody: Child) -> None:
        """They leave, one after the other."""
        for ssh in everybody:
            ssh.type(b"\x1d.")
            self.assertEqual(await ssh.ended(), 0)

    def recordings(self) -> list[Path]:
        """The files, in the order of their making."""
        return sorted((self.site.state / "recordings").glob("*/*.cast"), key=lambda path: path.name)

    async def played(self, recording: Path) -> bytes:
        """What the real asciinema shows of it."""
        output = await getProcessOutput(
            str(BIN / "asciinema"), ["cat", str(recording)], env=os.environ, reactor=reactor
        )
        assert isinstance(output, bytes)
        return output


class RecordingTests(RecordedCase):
    """What guests print is recorded."""

    configuration = '[console]\nlinger = 0\n[recording]\ndirectory = "recordings"'

    async def test_session(self) -> None:
        """Each opening of a console is a file for the proxy's user alone, which asciinema plays.
        It has what the guest printed, whole characters, and who came, left and had the keyboard;
        what was typed only as the guest echoed it."""
        alice = await self.attach(self.alice)
        await alice.expect(rb" It is recorded\. To leave: ")
        alice.type("déjà\r".encode())
        await alice.expect("déjà".encode())
        bob = await self.attach(self.bob)
        await bob.expect(rb"You watch\.")
        bob.type(b"\x1dt")
        await alice.expect(rb"asks for the keyboard")
        alice.type(b"\x1dt")
        await bob.expect(rb"You have the keyboard")
        bob.type(b"vu")
        await bob.expect(rb"vu")
        await self.leave(alice, bob)
        await self.site.stop()
        [recording] = self.recordings()
        self.assertEqual(recording.stat().st_mode & 0o777, 0o600)
        self.assertEqual(recording.parent.stat().st_mode & 0o777, 0o700)
        self.assertIn("déjà\rvu".encode(), await self.played(recording))
        header, *events = [json.loads(line) for line in recording.read_text().splitlines()]
        self.assertEqual((header["version"], header["title"]), (2, "light1"))
        people = ("alice@internal from 127.0.0.1", "bob@internal from 127.0.0.1")
        self.assertEqual(
            [label for _, kind, label in events if kind == "m"],
            [
                f"{people[0]} attached",
                f"{people[0]} has the keyboard",
                f"{people[1]} attached",
                f"{people[1]} has the keyboard",
                f"{people[0]} left",
                f"{people[1]} left",
            ],
        )
        self.assertEqual({kind for _, kind, _ in events}, {"m", "o"})

    async def test_each_opening(self) -> None:
        """The next opening is another file; a console that cannot be opened leaves none."""
        for words in (b"<one>", b"<two>"):
            ssh = await self.attach(self.alice)
            ssh.type(words)
            await ssh.expect(words)
            await self.leave(ssh)
        off = self.site.ssh(self.alice, "off1")
        self.assertEqual(await off.ended(), 1)
        await self.site.stop()
        one, two = self.recordings()
        self.assertIn(b"<one>", await self.played(one))
        self.assertIn(b"<two>", await self.played(two))

    async def test_disk(self) -> None:
        """Where nothing can be recorded the console opens all the same, and the log is loud."""
        recordings = self.site.state / "recordings"
        recordings.rmdir()
        recordings.write_text("in the way")
        ssh = await self.attach(self.alice)
        await self.site.log(rb"critical\] No recording of light1 can be made: [^\n]*recordings")
        ssh.type(b"<words>")
        await ssh.expect(rb"<words>")


class RequiredTests(RecordedCase):
    """There must be a recording."""

    configuration = '[recording]\ndirectory = "recordings"\nrequired = true'

    async def test_none(self) -> None:
        """Without a recording there is no session, and its user is told why."""
        recordings = self.site.state / "recordings"
        recordings.rmdir()
        recordings.write_text("in the way")
        ssh = self.site.ssh(self.alice, "light1")
        self.assertEqual(await ssh.ended(), 1)
        self.assertRegex(ssh.seen, rb"ERROR: This console cannot be recorded: [^\n]*")

    if os.geteuid() == 0:

        async def test_full_disk(self) -> None:
            """When the disk is full, the session ends with a line, and the log is loud; what was
            recorded before is there."""
            recordings = self.site.state / "recordings"
            mount = ("mount", "-t", "tmpfs", "-o", "size=128k,mode=700", "none", str(recordings))
            subprocess.run(mount, check=True)
            self.addCleanup(subprocess.run, ("umount", str(recordings)), check=True)
            # What was asked to stop last closes its file.
            self.addCleanup(self.site.stop)
            ssh = await self.attach(self.alice)
            ssh.type(b"<words>")
            await ssh.expect(rb"<words>")
            for _ in range(_LOOKS):
                if self.recordings() and b"<words>" in self.recordings()[0].read_bytes():
                    break
                await self.leave_a_turn()
            with (recordings / "filler").open("wb", 0) as filler, self.assertRaises(OSError):
                while True:
                    filler.write(b"x" * 4096)
            ssh.type(b"more" * 2000)
            await ssh.expect(rb"This console is not recorded any more: No space left on device")
            self.assertEqual(await ssh.ended(), 0)
            await self.site.log(rb"critical\] The recording [^\n]* ended: No space left on device")
            [recording] = self.recordings()
            self.assertIn(b"<words>", await self.played(recording))

    async def leave_a_turn(self) -> None:
        """A command of the proxy's, which takes a moment."""
        ssh = self.site.ssh(self.alice, "list", terminal=False)
        await ssh.ended()


class WarmTests(RecordedCase):
    """Consoles that are held open."""

    configuration = '[console]\nlinger = 0\nwarm = ["light1", "fr*"]'

    async def listed(self, *words: str) -> bytes:
        """What a command prints."""
        ssh = self.site.ssh(self.alice, *words, terminal=False)
        self.assertEqual(await ssh.ended(), 0, ssh.errors)
        return ssh.seen

    async def is_warm(self, name: str) -> None:
        """Wait until the console of a VM is held open."""
        line = f"The console of {name} is kept warm"
        if line not in self.site.logs:
            await self.site.log(line.encode())

    async def until(self, wanted: bytes, *words: str) -> bytes:
        """Ask again until it prints what is wanted."""
        for _ in range(_LOOKS):
            ssh = self.site.ssh(self.alice, *words, terminal=False)
            await ssh.ended()
            if wanted in ssh.seen:
                return ssh.seen
        self.fail(f"{ssh.seen!r} {ssh.errors!r}")

    async def test_kept(self) -> None:
        """What a guest prints with nobody there is kept; who comes is shown it, and finds nobody.
        The console stays open when they leave."""
        await self.is_warm("light1")
        await deferToThread(self.lab.node1.reset, "light1")
        await self.until(lab.LIGHT_PROMPT, "log", "light1")
        self.assertEqual(await self.listed("who"), b"")
        ssh = await self.attach(self.alice)
        await ssh.expect(rb"What light1 printed last:.*light ready")
        self.assertNotIn(b"watch", ssh.seen)
        ssh.type(b"<words>")
        await ssh.expect(rb"<words>")
        await self.leave(ssh)
        self.assertIn(b"<words>", await self.listed("log", "light1"))
        virsh = Child("virsh").spawn(
            reactor, ["virsh", "-c", self.lab.node1.local_uri, "console", "light1"], terminal=True
        )
        self.addCleanup(virsh.kill)
        await virsh.expect(rb"Active console session exists")

    async def test_started(self) -> None:
        """A VM that is made later is warm soon after its start, and when it is started again, with
        what it printed before."""
        await self.is_warm("light1")
        await deferToThread(self.lab.node1.run, lab.LightGuest("fresh"))
        self.addCleanup(deferToThread, self.lab.node1.remove, "fresh")
        await self.is_warm("fresh")
        await deferToThread(self.lab.node1.reset, "fresh")
        await self.until(lab.LIGHT_PROMPT, "log", "fresh")
        ssh = self.site.ssh(self.alice, "fresh")
        await ssh.expect(rb"What fresh printed last:.*light ready")
        await deferToThread(self.lab.node1.destroy, "fresh")
        await ssh.expect(rb"fresh was powered off\.")
        await deferToThread(self.lab.node1.create, "fresh")
        await ssh.expect(rb"fresh is back")
        await booted(ssh)
        ssh.type(b"<words>")
        await ssh.expect(rb"<words>")
        await self.leave(ssh)
        self.assertRegex(await self.listed("log", "fresh"), rb"(?s)light ready.*<words>")
