"""Why a console ended: in the words of libvirt it is mostly "end of file"."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING

from twisted.internet.task import deferLater

from vmconsole.errors import ConsoleGone, ConsoleTaken, GuestGone, HostLost, InputLost
from vmconsole.hypervisor.libvirt_domains import console_ending, moved
from vmconsole.hypervisor.libvirt_errors import connection_lost
from vmconsole.interfaces import ConsoleInfo
from vmconsole.text import printable

if TYPE_CHECKING:
    from vmconsole.hypervisor.libvirt_host import Host

# Seconds for finding out why a console ended, and when to look whether its domain changed.
EXPLAINING = 2.0
_LOOKS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.6)
# The first look by which what the host tells of a domain has come.
_NEWS = 2
# Seconds without an answer that make a guest a stuck one.
_STUCK = 5.0


class Ending:
    """Finds out why one console ended. All raise HostUnreachable."""

    def __init__(self, host: Host, console: ConsoleInfo) -> None:
        self._host = host
        self._console = console
        self._host_name = printable(host.name)
        self._vm_name = printable(console.vm_name)

    async def at_its_end(self) -> ConsoleGone:
        """The stream came to its end."""
        return await self._look(
            _LOOKS,
            f"The console of {self._vm_name} was closed by {self._host_name}; another program may "
            "have taken it by force.",
        )

    async def by_error(self) -> ConsoleGone:
        """The stream failed, and its connection did not."""
        return await self._look(
            _LOOKS[:3],
            f"Another program on {self._host_name} took the console of {self._vm_name} by force.",
        )

    async def by_loss(self, unanswered: float, unsent: int) -> ConsoleGone:
        """Its connection was lost, when a question had been ``unanswered`` for so many seconds,
        and so many bytes were ``unsent``."""
        if unanswered >= _STUCK:
            # If the host answers on another connection, it was the guest.
            await self._host.ask(lambda raw: raw.getLibVersion(), EXPLAINING)
            return InputLost(
                f"{self._vm_name} took no input for {unanswered:.0f} s, and {self._host_name}'s "
                f"libvirtd dropped the connection; {unsent} bytes typed may be lost."
            )
        return HostLost(connection_lost(self._host.name))

    async def _look(self, pauses: Iterable[float], running: str) -> ConsoleGone:
        """What became of the domain; ConsoleTaken, with the text ``running``, if nothing did."""
        for number, pause in enumerate(pauses):
            # A console ends a little before its domain does, and before its events come.
            await deferLater(self._host.reactor, pause, lambda: None)
            last = self._host.last_events.get(self._console.vm_id)
            gone = moved(self._console, last)
            if gone is not None:
                return gone
            ending = await self._host.ask(
                partial(console_ending, console=self._console, last=last), EXPLAINING
            )
            unsure = isinstance(ending, GuestGone) and last is None
            if ending is not None and not (unsure and number < _NEWS):
                return ending
        return ConsoleTaken(running)
