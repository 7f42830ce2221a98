"""All consoles that are open through this proxy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

from twisted.application.service import Service
from twisted.internet.endpoints import connectProtocol
from twisted.internet.interfaces import IReactorTime, IStreamClientEndpoint
from twisted.internet.protocol import Protocol
from twisted.python.failure import Failure

from vmconsole.config import Console as Settings
from vmconsole.console.attachment import Attachment, Party
from vmconsole.console.console import Console
from vmconsole.console.keyboard import Keyboard
from vmconsole.errors import ConsoleGone
from vmconsole.flight import Flight
from vmconsole.interfaces import ConsoleInfo, IConsoleEndpoints
from vmconsole.text import printable


class ConsolePool(Service):
    """Each VM's console at most once, whoever is attached to it."""

    def __init__(
        self, endpoints: IConsoleEndpoints, clock: IReactorTime, settings: Settings
    ) -> None:
        self._endpoints = endpoints
        self._clock = clock
        self.settings = settings
        self._consoles: dict[str, Console] = {}

    def __len__(self) -> int:
        return len(self._consoles)

    def __iter__(self) -> Iterator[Console]:
        return iter(list(self._consoles.values()))

    def find(self, vm_id: str) -> Console | None:
        """The VM's console, if it is open or being opened."""
        return self._consoles.get(vm_id)

    async def attach(
        self, info: ConsoleInfo, party: Party, protocol: Protocol, force: bool = False
    ) -> Attachment:
        """Attach ``party`` to the VM's console, which is opened if it is not open.

        Output goes to ``protocol``, whose transport is the Attachment. ``force`` takes the console
        from another program on the host. Raises ConsoleError; cancelling gives it up.
        """
        console = self._consoles.get(info.vm_id) or self._open(info, force)
        attachment = Attachment(console, party, protocol, self._clock, self.settings.backlog)
        console.join(attachment)
        if not console.is_open:
            try:
                await console.opening.wait()
            except BaseException:
                console.detach(attachment)
                raise
        return attachment

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

    def _open(self, info: ConsoleInfo, force: bool) -> Console:
        keyboard = Keyboard(
            self._clock,
            printable(info.vm_name),
            self.settings.takeover,
            self.settings.handover_idle,
        )
        console = Console(
            info, self._clock, keyboard, self.settings.scrollback, self.settings.linger
        )
        endpoint = cast(IStreamClientEndpoint, self._endpoints.console_endpoint(info, force))
        self._consoles[info.vm_id] = console
        connecting = connectProtocol(endpoint, console)
        connecting.addErrback(self._not_opened, console)
        console.give_up = connecting.cancel
        console.opening = Flight(connecting)
        console.closed.addCallback(lambda _: self._forget(console))
        return console

    def _not_opened(self, failure: Failure, console: Console) -> Failure:
        self._forget(console)
        return failure

    def _forget(self, console: Console) -> None:
        if self._consoles.get(console.info.vm_id) is console:
            del self._consoles[console.info.vm_id]
