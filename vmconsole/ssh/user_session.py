"""Where a command runs, for whom, and which consoles are theirs."""

from __future__ import annotations

from collections.abc import Sequence

from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from vmconsole.audit import Login
from vmconsole.console.choice import (
    NoSuchConsole,
    by_id,
    by_id_or_name,
    by_name,
    by_text,
)
from vmconsole.console.menu import Menu, MenuProtocol
from vmconsole.console.waiting import Waiting
from vmconsole.interfaces import ConsoleInfo, IPermissions, IWatch
from vmconsole.ssh.request import Request
from vmconsole.ssh.session import SessionChannel
from vmconsole.text import ago, printable


class UserSession:
    """One command of one user, on its channel. Its methods raise EngineError, too."""

    _log = Logger()

    def __init__(
        self,
        channel: SessionChannel,
        login: Login,
        watch: IWatch,
        permissions: IPermissions,
        clock: IReactorTime,
        escape: int | None,
    ) -> None:
        self.channel = channel
        self.login = login
        self.watch = watch
        self._permissions = permissions
        self._clock = clock
        self._escape = escape
        # Of which old answer of the engine the user has been told.
        self._told: float | None = None

    @property
    def number(self) -> int:
        """Tells the sessions of one connection apart."""
        return int(self.channel.id)

    async def consoles(self) -> Sequence[ConsoleInfo]:
        """What the user may open."""
        found = await self._permissions.consoles(self.login.user.id)
        both = (self.watch.unconfirmed, found.answered)
        self.tell_stale(min((each for each in both if each is not None), default=None))
        return found.consoles

    async def find(self, consoles: Sequence[ConsoleInfo], request: Request) -> ConsoleInfo:
        """The console that is meant. Raises NoSuchConsole and AmbiguousConsole; when the user
        waits for a VM that is not listed, ConsoleError."""
        try:
            return _find(consoles, request)
        except NoSuchConsole:
            pass
        try:
            return await self._find_anew(request)
        except NoSuchConsole as error:
            if request.wait and self._permissions.placed_only:
                return await self._wait_for(request, str(error))
            raise

    async def pick(
        self, consoles: Sequence[ConsoleInfo], typed: bytes = b""
    ) -> tuple[ConsoleInfo, bytes] | None:
        """Show the menu: what was chosen, and what was typed behind that. Raises NoSuchConsole."""
        if not consoles:
            running = "running" if self._permissions.placed_only else "there"
            raise NoSuchConsole(
                f"There is no console for {printable(self.login.user.name)}: no VM is {running} "
                "that you have access to. Ask who runs this proxy for a grant."
            )
        rows, columns = self.channel.size
        menu = MenuProtocol(Menu(consoles), rows=rows, columns=columns, clock=self._clock)
        self.channel.join(menu, typed)
        chosen = await menu.chosen
        self.channel.part()
        if chosen is None:
            return None
        return await self._look_again(chosen), menu.rest

    def tell_stale(self, answered: float | None) -> None:
        """Tell the user once of an old answer of the engine that is used; see ConsoleList."""
        if answered is None or answered == self._told:
            return
        self._told = answered
        self.watch.unconfirmed = None
        age = ago(self._clock.seconds() - answered)
        self.channel.write_error(f"[engine unreachable: using its answer from {age}]")
        self._log.warn(
            "session {session}: the engine does not answer; {user} is served by its answer from "
            "{age}",
            session=self.login.session,
            user=printable(self.login.user.name),
            age=age,
        )

    async def _find_anew(self, request: Request) -> ConsoleInfo:
        # It may have been made, or granted, since the engine was asked last.
        found = await self._permissions.consoles(self.login.user.id, fresh=True)
        self.tell_stale(found.answered)
        try:
            return _find(found.consoles, request)
        except NoSuchConsole:
            if not self._permissions.placed_only:
                raise
        named = printable(request.vm or request.vm_id or request.vm_name or "")
        raise NoSuchConsole(
            f"{named} is not there: not running, unknown, or not yours. `list` shows yours."
        )

    async def _wait_for(self, request: Request, why: str) -> ConsoleInfo:
        waiting = Waiting(self._clock, self._escape)
        self.channel.write_error(f"[vmconsole: {why} Waiting for it; Ctrl-C gives up.]")
        self.channel.join(waiting)
        found = await waiting.until_found(lambda: self._find_anew(request))
        self.channel.part()
        return found

    async def _look_again(self, chosen: ConsoleInfo) -> ConsoleInfo:
        # The menu may have stood there for hours.
        try:
            return by_id(await self.consoles(), chosen.vm_id)
        except NoSuchConsole:
            name = printable(chosen.vm_name)
            raise NoSuchConsole(
                f"{name} is not there any more: not running, unknown, or not yours."
                if self._permissions.placed_only
                else f"You no longer have access to {name}, or it is gone."
            ) from None


def _find(consoles: Sequence[ConsoleInfo], request: Request) -> ConsoleInfo:
    if request.vm_id is not None:
        return by_id(consoles, request.vm_id)
    if request.vm_name is not None:
        return by_name(consoles, request.vm_name)
    if request.wait:
        # A beginning could be that of another one, which happens to be listed now.
        return by_id_or_name(consoles, request.vm or "")
    return by_text(consoles, request.vm or "")
