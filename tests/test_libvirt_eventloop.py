"""libvirt's event loop: with real descriptors, the real reactor, and a libvirt in memory."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

from twisted.internet.interfaces import IReadWriteDescriptor
from twisted.internet.task import deferLater
from twisted.trial.unittest import TestCase
from zope.interface.verify import verifyObject

from tests.fakes_libvirt import FakeLibvirt, FakeReactor
from vmconsole.hypervisor.libvirt_eventloop import LibvirtEventLoop

READABLE, WRITABLE, ERROR, HANGUP = 1, 2, 4, 8


class Functions:
    """The six functions as libvirt has them."""

    def __init__(self, registered: tuple[Any, ...]) -> None:
        self.add_handle, self.update_handle, self.remove_handle = registered[:3]
        self.add_timeout, self.update_timeout, self.remove_timeout = registered[3:]


class HandleTests(TestCase):
    """Descriptors."""

    timeout = 20

    def setUp(self) -> None:
        from twisted.internet import reactor

        self.reactor: Any = reactor
        self.libvirt = FakeLibvirt()
        self.loop = LibvirtEventLoop(self.reactor, self.libvirt).register()
        self.functions = Functions(self.libvirt.registered[0])
        self.happened: list[tuple[int, int, int, object]] = []
        self.read_end, self.write_end = os.pipe()
        self.open = {self.read_end, self.write_end}
        self.addCleanup(lambda: [os.close(fd) for fd in self.open])

    def close(self, fd: int) -> None:
        self.open.remove(fd)
        os.close(fd)

    def note(self, watch: int, fd: int, events: int, opaque: object) -> None:
        self.happened.append((watch, fd, events, opaque))

    async def turns(self, seconds: float = 0.05) -> None:
        await deferLater(self.reactor, seconds, lambda: None)

    async def until(self, true: Callable[[], bool]) -> None:
        while not true():
            await self.turns(0.001)

    async def test_readable(self) -> None:
        """What is readable is told with libvirt's own descriptor and opaque, as long as it is."""
        watch = self.functions.add_handle(self.read_end, READABLE, self.note, "opaque")
        await self.turns()
        self.assertEqual(self.happened, [])
        os.write(self.write_end, b"x")
        await self.until(lambda: len(self.happened) > 1)
        self.assertEqual(self.happened[0], (watch, self.read_end, READABLE, "opaque"))
        self.assertEqual(self.functions.remove_handle(watch), 0)
        await self.until(self.loop.is_idle)

    async def test_writable(self) -> None:
        """What is writable is told only while it is asked for."""
        watch = self.functions.add_handle(self.write_end, 0, self.note, None)
        await self.turns()
        self.assertEqual(self.happened, [])
        self.functions.update_handle(watch, WRITABLE)
        await self.until(lambda: bool(self.happened))
        self.functions.update_handle(watch, 0)
        await self.turns(0.01)
        count = len(self.happened)
        await self.turns()
        self.assertEqual(len(self.happened), count)
        self.functions.remove_handle(watch)
        await self.until(self.loop.is_idle)

    async def test_hang_up(self) -> None:
        """A hang-up is told once, as an error and a hang-up, and does not spin when re-armed."""
        watch = self.functions.add_handle(self.write_end, WRITABLE, self.hang_up_noted, None)
        await self.turns()
        self.close(self.read_end)
        await self.until(lambda: any(event[2] == ERROR | HANGUP for event in self.happened))
        self.happened.clear()
        self.functions.update_handle(watch, READABLE | WRITABLE)
        await self.turns()
        self.assertEqual(self.happened, [])
        self.functions.remove_handle(watch)
        await self.until(self.loop.is_idle)

    def hang_up_noted(self, watch: int, fd: int, events: int, opaque: object) -> None:
        self.note(watch, fd, events, opaque)
        if events == WRITABLE:
            self.functions.update_handle(watch, READABLE)

    async def test_two_watches_share_a_descriptor(self) -> None:
        """Two watches on one descriptor work side by side, and one outlives the other."""
        first = self.functions.add_handle(self.read_end, READABLE, self.note, "first")
        second = self.functions.add_handle(self.read_end, READABLE, self.note, "second")
        os.write(self.write_end, b"x")
        await self.until(lambda: {event[3] for event in self.happened} == {"first", "second"})
        self.functions.remove_handle(first)
        await self.turns(0.01)
        self.happened.clear()
        await self.until(lambda: bool(self.happened))
        self.assertEqual({event[3] for event in self.happened}, {"second"})
        self.functions.remove_handle(second)
        await self.until(self.loop.is_idle)

    async def test_closed_right_after_removal(self) -> None:
        """libvirt may close and reuse its descriptor at once after removeHandle."""
        watch = self.functions.add_handle(self.read_end, READABLE, self.note, None)
        await self.turns()
        self.functions.remove_handle(watch)
        self.close(self.read_end)
        reused = os.open(os.devnull, os.O_RDONLY)
        self.open.add(reused)
        await self.until(self.loop.is_idle)
        self.assertEqual(self.happened, [])

    async def test_removed_before_the_reactor_knows(self) -> None:
        """A descriptor that is added and removed in one turn leaves no trace."""
        await self.turns(0)  # The reactor opens descriptors of its own when it starts.
        before = set(os.listdir("/proc/self/fd"))
        watch = self.functions.add_handle(self.read_end, READABLE, self.note, "opaque")
        self.functions.remove_handle(watch)
        await self.until(self.loop.is_idle)
        # Something of an earlier test may have been collected, and closed, meanwhile.
        self.assertLessEqual(set(os.listdir("/proc/self/fd")), before)
        self.assertEqual(self.libvirt.freed, ["opaque"])

    async def test_no_call_after_removal(self) -> None:
        """Once removeHandle has returned, the callback is not called, whatever is pending."""
        os.write(self.write_end, b"x")

        def note(watch: int, *event: Any) -> None:
            self.happened.append((watch, *event))
            self.functions.remove_handle(second if watch == first else first)

        first = self.functions.add_handle(self.read_end, READABLE, note, None)
        second = self.functions.add_handle(self.read_end, READABLE, note, None)
        await self.until(lambda: bool(self.happened))
        called = self.happened[0][0]
        await self.turns(0.01)
        self.assertEqual({event[0] for event in self.happened}, {called})
        self.functions.remove_handle(called)
        await self.until(self.loop.is_idle)

    async def test_free_is_later(self) -> None:
        """The opaque is freed in a later turn, never inside removeHandle."""
        watch = self.functions.add_handle(self.read_end, READABLE, self.note, "opaque")
        await self.turns()
        self.functions.remove_handle(watch)
        self.assertEqual(self.libvirt.freed, [])
        self.assertFalse(self.loop.is_idle())
        await self.until(self.loop.is_idle)
        self.assertEqual(self.libvirt.freed, ["opaque"])

    async def test_unknown_watch(self) -> None:
        """Removing what is not there is refused, and updating it does nothing."""
        self.functions.update_handle(4711, READABLE)
        self.functions.update_timeout(4711, 0)
        self.assertEqual(self.functions.remove_handle(4711), -1)
        self.assertEqual(self.functions.remove_timeout(4711), -1)
        await self.turns(0.01)

    async def test_bad_descriptor(self) -> None:
        """A descriptor that cannot be duplicated is refused, and logged."""
        self.assertEqual(self.functions.add_handle(-1, READABLE, self.note, None), -1)
        self.assertEqual(len(self.flushLoggedErrors(OSError)), 1)
        self.assertTrue(self.loop.is_idle())

    async def test_failing_callback(self) -> None:
        """A callback's exception is logged, and the watch goes on."""

        def fail(watch: int, fd: int, events: int, opaque: object) -> None:
            self.note(watch, fd, events, opaque)
            os.read(self.read_end, 1)
            raise ZeroDivisionError

        watch = self.functions.add_handle(self.read_end, READABLE, fail, None)
        for number in range(5):
            os.write(self.write_end, b"x")
            await self.until(lambda number=number: len(self.happened) > number)
            self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        self.functions.remove_handle(watch)
        await self.until(self.loop.is_idle)

    async def test_threads(self) -> None:
        """Threads add, update and remove at the same time; ids are unique, nothing is left."""
        ids: list[int] = []
        wrong: list[threading.Thread] = []
        here = threading.current_thread()

        def note(*_: object) -> None:
            if threading.current_thread() is not here:
                wrong.append(threading.current_thread())

        def work() -> None:
            for _ in range(100):
                read_end, write_end = os.pipe()
                os.write(write_end, b"x")
                watch = self.functions.add_handle(read_end, READABLE, note, None)
                timer = self.functions.add_timeout(0, note, None)
                self.functions.update_handle(watch, 0)
                self.functions.update_timeout(timer, 1)
                self.functions.update_handle(watch, READABLE)
                ids.extend((watch, timer))
                self.functions.remove_handle(watch)
                self.functions.remove_timeout(timer)
                os.close(read_end)
                os.close(write_end)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        await self.until(lambda: not any(thread.is_alive() for thread in threads))
        await self.until(self.loop.is_idle)
        self.assertEqual(len(ids), 800)
        self.assertEqual(len(set(ids)), 800)
        self.assertEqual(wrong, [])
        self.assertEqual(len(self.libvirt.freed), 800)

    async def test_descriptor_interface(self) -> None:
        """What the reactor is given is an IReadWriteDescriptor with a descriptor of its own."""
        watch = self.functions.add_handle(self.read_end, READABLE, self.note, None)
        await self.turns(0.01)
        ours = [reader for reader in self.reactor.getReaders() if reader.logPrefix() == "libvirt"]
        self.assertEqual(len(ours), 1)
        verifyObject(IReadWriteDescriptor, ours[0])
        self.assertNotEqual(ours[0].fileno(), self.read_end)
        self.functions.remove_handle(watch)
        await self.until(self.loop.is_idle)


class TimeoutTests(TestCase):
    """Timers, on a clock."""

    def setUp(self) -> None:
        self.reactor = FakeReactor()
        self.libvirt = FakeLibvirt()
        self.loop = LibvirtEventLoop(self.reactor, self.libvirt).register()  # type: ignore[arg-type]
        self.functions = Functions(self.libvirt.registered[0])
        self.fired: list[tuple[float, int, object]] = []

    def note(self, timer: int, opaque: object) -> None:
        self.fired.append((round(self.reactor.seconds(), 2), timer, opaque))

    def run_for(self, seconds: float) -> None:
        self.reactor.settle(seconds)

    def test_periodic(self) -> None:
        """A timer fires again and again, until it is removed."""
        timer = self.functions.add_timeout(200, self.note, "opaque")
        self.run_for(1.0)
        self.assertEqual(self.fired, [(t, timer, "opaque") for t in (0.2, 0.4, 0.6, 0.8, 1.0)])
        self.functions.remove_timeout(timer)
        self.run_for(1.0)
        self.assertEqual(len(self.fired), 5)
        self.assertEqual(self.libvirt.freed, ["opaque"])
        self.assertTrue(self.loop.is_idle())
        self.assertEqual(self.reactor.getDelayedCalls(), [])

    def test_disarmed(self) -> None:
        """-1 disarms; an update arms anew, from the update on."""
        timer = self.functions.add_timeout(-1, self.note, None)
        self.run_for(1.0)
        self.assertEqual(self.fired, [])
        self.functions.update_timeout(timer, 500)
        self.run_for(0.5)
        self.assertEqual(len(self.fired), 1)
        self.functions.update_timeout(timer, -1)
        self.run_for(2.0)
        self.assertEqual(len(self.fired), 1)

    def test_each_turn(self) -> None:
        """0 fires in each turn of the reactor, until it is updated in the callback."""

        def note(timer: int, opaque: object) -> None:
            self.note(timer, opaque)
            if len(self.fired) == 3:
                self.functions.update_timeout(timer, -1)

        self.functions.add_timeout(0, note, None)
        self.run_for(0.0)
        self.assertGreaterEqual(len(self.fired), 3)
        self.assertLessEqual(len(self.fired), 4)

    def test_nothing_inline(self) -> None:
        """Nothing touches the reactor inside libvirt's call: it may be another thread's."""
        self.functions.add_timeout(0, self.note, None)
        self.assertEqual(self.reactor.getDelayedCalls(), [])

    def test_last_word(self) -> None:
        """Another thread's update waits for the reactor, whose own does not; libvirt's last word
        holds, also when an earlier one is applied after it."""
        timer = self.functions.add_timeout(-1, self.note, None)
        self.run_for(0.0)
        thread = threading.Thread(target=self.functions.update_timeout, args=(timer, 100))
        thread.start()
        thread.join()
        self.assertEqual(self.reactor.getDelayedCalls(), [])
        self.functions.update_timeout(timer, 300)
        self.assertEqual(len(self.reactor.getDelayedCalls()), 1)
        self.run_for(1.0)
        self.assertEqual([at for at, _, _ in self.fired], [0.3, 0.6, 0.9])

    def test_registered_once(self) -> None:
        """A second loop on the same reactor gives way to the first; on another it is refused."""
        again = LibvirtEventLoop(self.reactor, self.libvirt)  # type: ignore[arg-type]
        self.assertIs(again.register(), self.loop)
        self.assertIs(self.loop.register(), self.loop)
        self.assertEqual(len(self.libvirt.registered), 1)
        with self.assertRaises(RuntimeError):
            LibvirtEventLoop(FakeReactor(), self.libvirt).register()  # type: ignore[arg-type]


_REACTOR_SCRIPT = """
import os, sys
from twisted.internet import {name}reactor
{name}reactor.install()
from twisted.internet import reactor
from tests.fakes_libvirt import FakeLibvirt
from vmconsole.hypervisor.libvirt_eventloop import LibvirtEventLoop
libvirt = FakeLibvirt()
loop = LibvirtEventLoop(reactor, libvirt).register()
add, update, remove, add_timeout, _, remove_timeout = libvirt.registered[0]
read_end, write_end = os.pipe()
said = []
def readable(watch, fd, events, opaque):
    data = os.read(fd, 10) if events & 1 else b""
    said.append((events, data))
    if data:
        os.close(write_end)
    else:
        remove(watch)
        reactor.callLater(0.05, done)
def tick(timer, opaque):
    remove_timeout(timer)
    os.write(write_end, b"x")
def done():
    print(said[0] == (1, b"x"), len(said) == 2, loop.is_idle())
    # What is left open must not keep the process.
    add(read_end, 1, readable, None)
    add_timeout(1000, tick, None)
    reactor.callLater(0, reactor.stop)
add(read_end, 1, readable, None)
add_timeout(10, tick, None)
reactor.run()
"""


class ReactorTests(TestCase):
    """Each of Twisted's reactors for Linux."""

    def _try(self, name: str) -> None:
        done = subprocess.run(
            [sys.executable, "-c", _REACTOR_SCRIPT.format(name=name)],
            capture_output=True,
            text=True,
            timeout=20,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        self.assertEqual((done.stdout.strip(), done.stderr), ("True True True", ""))

    def test_epoll(self) -> None:
        """Data, a hang-up, timers and a clean end on the epoll reactor."""
        self._try("epoll")

    def test_select(self) -> None:
        """Data, a hang-up, timers and a clean end on the select reactor."""
        self._try("select")

    def test_asyncio(self) -> None:
        """Data, a hang-up, timers and a clean end on the asyncio reactor."""
        self._try("asyncio")
