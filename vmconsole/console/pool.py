"""All consoles that are open through this proxy."""

from __future__ import annotations

from collections.abc import Iterator

from twisted.application.service import Service
from twisted.internet.defer import CancelledError, DeferredSemaphore
from twisted.internet.interfaces import IReactorTime
from twisted.internet.protocol import Protocol
from twisted.python.failure import Failure
from zope.interface import implementer

from vmconsole.config import Console as Settings
from vmconsole.console.attachment import Attachment, Party
from vmconsole.console.console import Console
from vmconsole.console.follow import Follower
from vmconsole.console.keyboard import Keyboard
from vmconsole.console.recording import Recordings
from vmconsole.errors import ConsoleGone
from vmconsole.interfaces import ConsoleInfo, GuestNews, IConsoleEndpoints, IGuestObserver
from vmconsole.text import printable

# Users about whom the engine is asked at the same time, when many consoles are opened again.
_AT_ONCE = 8


@implementer(IGuestObserver)
class ConsolePool(Service):
    """Each VM's console at most once, whoever is attached to it."""

    def __init__(
        self,
        endpoints: IConsoleEndpoints,
        clock: IReactorTime,
        settings: Settings,
        recordings: Recordings | None = None,
    ) -> None:
        self._endpoints = endpoints
        self._recordings = recordings
        self._at_once = DeferredSemaphore(_AT_ONCE)
        self._clock = clock
        self.settings = settings
        self._followers: dict[str, Follower] = {}

    def __len__(self) -> int:
        return len(self._followers)

    def __iter__(self) -> Iterator[Console]:
        return iter([follower.console for follower in self._followers.values()])

    def find(self, vm_id: str) -> Console | None:
        """The VM's console, if it is open, or if somebody waits for it to be."""
        follower = self._followers.get(vm_id)
        return None if follower is None else follower.console

    async def attach(
        self,
        info: ConsoleInfo,
        party: Party,
        protocol: Protocol,
        force: bool = False,
        patient: bool = False,
    ) -> Attachment:
        """Attach ``party`` to the VM's console, which is opened if it is not open.

        Output goes to ``protocol``, an IScreen, whose transport is the Attachment. ``force`` takes
        the console from another program on the host; who is ``patient`` waits until it can be
        opened. Raises ConsoleError; cancelling gives it up.
        """
        follower = self._followers.get(info.vm_id) or self._follow(info)
        console = follower.console
        attachment = Attachment(
            console, party, protocol, self._clock, self.settings.backlog, force, patient
        )
        console.join(attachment)
        follower.open(info)
        try:
            await attachment.opened
        except CancelledError:
            console.detach(attachment)
            raise
        return attachment

    def guest_changed(self, vm_id: str, news: GuestNews) -> None:
        """See IGuestObserver."""
        follower = self._followers.get(vm_id)
        if follower is not None:
            follower.guest_changed(news)

    async def send_break(self, info: ConsoleInfo) -> None:
        """See IConsoleEndpoints."""
        await self._endpoints.send_break(info)

    async def send_sysrq(self, info: ConsoleInfo, letter: str) -> bytes:
        """See IConsoleEndpoints."""
        return await self._endpoints.send_sysrq(info, letter)

    def stopService(self) -> None:
        """End every console that is open; its users are told."""
        super().stopService()
        for console in self:
            console.end(Failure(ConsoleGone("The proxy is being stopped.")))

    def _follow(self, info: ConsoleInfo) -> Follower:
        keyboard = Keyboard(
            self._clock,
            printable(info.vm_name),
            self.settings.takeover,
            self.settings.handover_idle,
        )
        console = Console(
            info, self._clock, keyboard, self.settings.scrollback, self.settings.linger
        )
        follower = Follower(
            console,
            self._endpoints,
            self._clock,
            self.settings.follow,
            self._recordings,
            self._at_once,
        )
        self._followers[info.vm_id] = follower
        follower.done.addCallback(lambda _: self._forget(follower))
        return follower

    def _forget(self, follower: Follower) -> None:
        vm_id = follower.console.info.vm_id
        if self._followers.get(vm_id) is follower:
            del self._followers[vm_id]
