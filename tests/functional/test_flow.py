"""Much at once, either way, on consoles that are shared: nothing of a paste is lost, and neither a
guest nor a reader who stopped holds up anybody else, or fills the proxy's memory; for real."""

from __future__ import annotations

import hashlib
import re
import signal
from collections.abc import Callable
from typing import Any, cast

from twisted.internet.interfaces import IConsumer, IPullProducer
from twisted.internet.threads import deferToThread
from zope.interface import implementer

from tests import lab
from tests.functional.process import Child
from tests.functional.site import booted, log_in
from tests.functional.test_sharing import ALICE, SharedCase, said

MIB = 1048576
# What a client takes of a paste that is held: the window, and the buffers of its ssh and pty.
HELD = MIB // 4
# What the proxy may have more in the middle of it all: what Python wastes, and backlogs besides.
MEMORY = 8 * MIB
# Seconds for what comes at once, unless it hangs.
AT_ONCE = 5.0
# More than anything here needs.
_TRIES = 200
_LINE = b"%08d the quick brown fox jumps over the lazy dog 0123456789\n"
_DROPPED = re.compile(rb"\r\n\x1b\[0m\[vmconsole: (\d+) bytes dropped\]\r\n")


def text(size: int) -> bytes:
    """Something to paste: numbered lines, and an end like no other."""
    end = b"<end>"
    lines = b"".join(_LINE % number for number in range(size // len(_LINE % 0)))
    return lines[: size - len(end)] + end


@implementer(IPullProducer)
class Paste:
    """A paste into the terminal of an ssh, which takes it as fast as it likes."""

    def __init__(self, ssh: Child, data: bytes) -> None:
        self.taken = 0
        """So many bytes the terminal took."""
        self._given = 0
        self._data = data
        self._terminal = cast(IConsumer, ssh.transport)
        self._terminal.registerProducer(self, False)

    def resumeProducing(self) -> None:
        """All that was given was taken."""
        self.taken = self._given
        piece = self._data[self._given : self._given + 4096]
        self._given += len(piece)
        if piece:
            self._terminal.write(piece)
        else:
            self._terminal.unregisterProducer()

    def stopProducing(self) -> None:
        """The ssh ended."""


class Recording:
    """What an ssh prints, from now until the end of the recording: a lot of it, which Child would
    copy, and search, for each piece that comes."""

    def __init__(self, ssh: Child) -> None:
        self.size = 0
        self._pieces: list[bytes] = []
        self._ssh = ssh
        cast(Any, ssh).outReceived = self._received

    def _received(self, data: bytes) -> None:
        self.size += len(data)
        self._pieces.append(data)

    def end(self) -> bytes:
        """All of it; what comes from now on is Child's again."""
        del cast(Any, self._ssh).outReceived
        return b"".join(self._pieces)


class FlowCase(SharedCase):
    """A guest of the test's own on node1; and Bob on light1, also there, who must not notice."""

    async def setUp(self) -> None:  # type: ignore[override]
        await super().setUp()
        self.bystander = await self.attach(self.bob)
        self._trips = 0
        await self.round_trips(1)

    async def boot(self, guest: lab.Guest) -> None:
        """Run a guest on node1 for this test."""
        await deferToThread(self.lab.node1.run, guest)
        self.addCleanup(deferToThread, self.lab.node1.remove, guest.name)

    async def run_in_linux(self, name: str, script: bytes) -> Child:
        """Alice, at the console of a new Linux guest that runs this after a line of hers.

        It is the fast console: what a guest prints there while libvirtd is late, QEMU drops.
        """
        await self.boot(lab.LinuxGuest(name, console="virtio"))
        alice = await self.attach(self.alice, name)
        await log_in(alice, name)
        alice.type(b"stty raw -echo; echo rea''dy; read go; " + script + b"\r")
        await alice.expect(rb"ready\n")
        return alice

    async def watch(self, name: str) -> Child:
        """Somebody who watches Alice there."""
        watcher = await self.attach(self.alice, name)
        await watcher.expect(said(rb"You watch\. " + ALICE + rb" has the keyboard, .*"))
        return watcher

    async def round_trips(self, count: int) -> None:
        """So many keystrokes of Bob's, and their echoes."""
        for _ in range(count):
            self._trips += 1
            self.bystander.type(b"%d;" % self._trips)
            await self.bystander.expect(b"%d;" % self._trips, AT_ONCE)

    async def at_rest(self, size: Callable[[], int]) -> int:
        """Wait until a size grows no more; meanwhile Bob works."""
        for _ in range(_TRIES):
            before = size()
            await self.round_trips(100)
            if size() == before:
                return before
        self.fail(f"it still grows: {size()}")

    def assert_same(self, came: bytes, expected: bytes) -> None:
        """Two long texts are one; if not, where do they part?"""
        if came == expected:
            return
        pairs = enumerate(zip(came, expected, strict=False))
        at = next((at for at, (one, other) in pairs if one != other), min(len(came), len(expected)))
        self.fail(
            f"{len(came)} bytes came, {len(expected)} were expected; from {at} on "
            f"{came[at : at + 100]!r} instead of {expected[at : at + 100]!r}"
        )


class PasteTests(FlowCase):
    """Much that is typed at once."""

    async def test_echo(self) -> None:
        """A paste into a guest behind a serial port, at its pace: who pastes and who watches see
        the whole echo, in order, while somebody else on the same host works."""
        await self.boot(lab.LightGuest("serial1"))
        alice = await self.attach(self.alice, "serial1")
        await booted(alice)
        watcher = await self.watch("serial1")
        await self.types(alice, b"<both>", watcher)
        pasted = text(65536)
        before = self.memory("VmRSS")
        Paste(alice, pasted)
        for number in range(0, 1000, 20):
            await alice.expect(b"%08d" % number)
            await self.round_trips(1)
        for ssh in (alice, watcher):
            await ssh.expect(rb"<end>$")
            self.assert_same(ssh.seen.partition(b"<both>")[2], pasted)
        self.assertLess(self.memory("VmRSS") - before, MEMORY)
        await self.leave(watcher, alice)

    async def test_whole(self) -> None:
        """1 MiB into a guest that takes nothing for a while: the client is held back by its window,
        others on the host work, and in the end every byte arrives, in order."""
        pasted = text(MIB)
        alice = await self.run_in_linux("reads1", b"head -c %d | sha256sum" % MIB)
        watcher = await self.watch("reads1")
        await deferToThread(self.lab.node1.suspend, "reads1")
        before = self.memory("VmRSS")
        paste = Paste(alice, b"go\n" + pasted)
        self.assertLess(await self.at_rest(lambda: paste.taken), HELD)
        self.assertLess(self.memory("VmRSS") - before, MEMORY)
        await deferToThread(self.lab.node1.resume, "reads1")
        digest = hashlib.sha256(pasted).hexdigest().encode()
        for ssh in (alice, watcher):
            match = await ssh.expect(rb"([0-9a-f]{64})  -\n")
            self.assertEqual(match[1], digest)
        self.assertLess(self.memory("VmRSS") - before, MEMORY)
        await self.leave(watcher, alice)

    async def test_stuck(self) -> None:
        """A paste without end into a guest that takes nothing: the client is held by its window and
        costs no memory; closing its terminal leaves at once, and who watched has the keyboard then.
        Their paste fits the window, so ``^] .`` behind it leaves at once; and the next one comes in
        as ever."""
        await self.boot(lab.LightGuest("stuck1"))
        alice = await self.attach(self.alice, "stuck1")
        await booted(alice)
        watcher = await self.watch("stuck1")
        await deferToThread(self.lab.node1.suspend, "stuck1")
        before = self.memory("VmRSS")
        paste = Paste(alice, text(MIB) * 32)
        self.assertLess(await self.at_rest(lambda: paste.taken), HELD)
        self.assertLess(self.memory("VmRSS") - before, MEMORY)
        await alice.kill("HUP")
        await watcher.expect(said(ALICE + rb" left\. You have the keyboard\."), AT_ONCE)
        watcher.type(text(100000) + b"\x1d.")
        await watcher.expect(said(rb"You left stuck1\."), AT_ONCE)
        self.assertEqual(await watcher.ended(AT_ONCE), 0)
        await self.leave(await self.attach(self.alice, "stuck1"))
        await self.round_trips(10)


class FloodTests(FlowCase):
    """Much that is printed."""

    # This process reads, too, and may be late with it; a reader that is stopped answers nothing.
    configuration = f"{FlowCase.configuration}\n[console]\nbacklog = {4 * MIB}\n"
    ssh_settings = "keepalive = 600.0"

    async def test_stopped_readers(self) -> None:
        """A guest prints without end to a watcher and a ``log --follow``, who both stopped reading:
        who has the keyboard reads and types on, as do others on the host; the memory is bounded;
        and when the two read again, each is told exactly how much it missed."""
        alice = await self.run_in_linux(
            "flood2",
            b"seq -w 50000 > /lines; cat $(yes /lines | head -n 2000) & read stop; kill $!; wait; "
            b'while read word; do echo "and $word"; done',
        )
        watcher = await self.watch("flood2")
        follower = self.site.ssh(self.alice, "log flood2 --bytes 6 --follow", terminal=False)
        await follower.expect(rb"^ready\n")
        before = self.memory("VmRSS")
        for ssh in (watcher, follower):
            ssh.transport.signalProcess("STOP")

        recording = Recording(alice)
        alice.type(b"go\n")
        for _ in range(_TRIES):
            if recording.size > 16 * MIB:
                break
            await self.round_trips(50)
        self.assertGreater(recording.size, 16 * MIB)
        alice.type(b"stop\n")
        await self.at_rest(lambda: recording.size)
        printed = recording.end()
        self.assertEqual(_DROPPED.findall(printed), [])
        for number in range(50):
            alice.type(b"%d\n" % number)
            printed += (await alice.expect(rb".*?and %d\n" % number, AT_ONCE))[0]
        self.assertLess(self.memory("VmRSS") - before, MEMORY + 2 * 4 * MIB)

        for ssh in (watcher, follower):
            ssh.transport.signalProcess(signal.SIGCONT)
            await ssh.expect(_DROPPED.pattern)
            await ssh.expect(rb"and 49\n")
            seen = ssh.seen.partition(b"ready\n")[2]
            first, dropped, rest = _DROPPED.split(seen)
            self.assertEqual(len(first) + int(dropped) + len(rest), len(printed))
            self.assert_same(first, printed[: len(first)])
            self.assert_same(rest, printed[-len(rest) :])
        alice.type(b"live\n")
        for ssh in (alice, watcher, follower):
            await ssh.expect(rb"and live\n", AT_ONCE)
        await self.leave(watcher, alice)
