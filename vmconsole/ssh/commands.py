"""What a user may say on the command line, and what happens then."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import msgspec
from twisted.internet.defer import CancelledError
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from vmconsole import __version__
from vmconsole.audit import Audit, Login
from vmconsole.console.attachment import Attachment, Party
from vmconsole.console.choice import NoSuchConsole, by_id, by_name, by_text
from vmconsole.console.console_session import ConsoleSession
from vmconsole.console.escape import escape_name
from vmconsole.console.menu import Menu, MenuProtocol
from vmconsole.console.pool import ConsolePool
from vmconsole.console.tail import Tail, TailInput
from vmconsole.console.terminal import RESET, Sanitizer
from vmconsole.console.who import describe_all
from vmconsole.errors import ConsoleError, VMConsoleError
from vmconsole.interfaces import ConsoleInfo, IPermissions, IWatch
from vmconsole.ssh.request import CommandSyntaxError, Request, parse
from vmconsole.ssh.session import SessionChannel
from vmconsole.text import ago, printable

_HELP = """\
vmconsole {version}: the serial consoles of your VMs.

  ssh -t ... USER@PROXY               the menu; with a single VM, its console
  ssh -t ... USER@PROXY VM            the console of VM: its id, its name, a beginning of either,
                                      or a pattern that matches one
  ... connect [--vm-id ID | --vm-name NAME] [--force]
                                      the same, by exactly this id or name; --force takes it from
                                      another program on its host
  ... watch VM                        the same, only to watch
  ... log VM [--bytes N] [--follow]   what VM printed last, while somebody had it open; needs no
                                      terminal; --follow goes on
  ... who [VM]                        who is on the consoles of your VMs
  ... list [--format plain|json]      your VMs; needs no terminal
  ... info                            who you are to this proxy
  ... help                            this text
"""


class NeedsTerminal(VMConsoleError):
    """A console was asked for without a pty."""


@dataclass
class _Session:
    """Where a command runs, and for whom."""

    channel: SessionChannel
    login: Login
    watch: IWatch
    told: float | None = None
    """Of which old answer of the engine the user has been told."""


class Commands:
    """Carries out what users ask for, on their channels."""

    _logger = Logger()

    def __init__(
        self,
        permissions: IPermissions,
        pool: ConsolePool,
        audit: Audit,
        clock: IReactorTime,
        escape: int | None,
    ) -> None:
        self._permissions = permissions
        self._pool = pool
        self._audit = audit
        self._clock = clock
        self._escape = escape

    async def run(self, channel: SessionChannel, login: Login, watch: IWatch, line: bytes) -> int:
        """Carry out one command line; the result is its exit status. ``watch`` looks whether the
        consoles that are opened may stay open.

        0: done. 1: an error, told on standard error. 2: the line makes no sense.
        """
        try:
            request = parse(line)
            user = _Session(channel, login, watch)
            handler = getattr(self, f"_{request.verb}")
            return int(await handler(user, request))
        except CommandSyntaxError as error:
            channel.write_error(f"ERROR: {error}")
            return 2
        except CancelledError:
            return 1
        except VMConsoleError as error:
            channel.write_error(f"ERROR: {error}")
            return 1
        except Exception:
            self._logger.failure("session {session}: the command failed", session=login.session)
            channel.write_error(
                "ERROR: Something went wrong in the proxy; this is its own fault. Its log tells "
                f"more: look for {login.session}."
            )
            return 1

    async def _help(self, user: _Session, request: Request) -> int:
        text = _HELP.format(version=__version__)
        if self._escape is not None:
            key = escape_name(self._escape)
            text += (
                f"\nOn a console, {key} is a prefix: {key} . leaves, {key} t takes the keyboard or "
                f"asks for it, {key} ? helps.\n"
            )
        _print(user.channel, text)
        return 0

    async def _info(self, user: _Session, request: Request) -> int:
        login = user.login
        self._tell_stale(user, user.watch.unconfirmed)
        _print(
            user.channel,
            f"vmconsole {__version__}\n"
            f"user: {printable(login.user.name)} [{printable(login.user.id)}]\n"
            f"key: {login.fingerprint}\n"
            f"from: {login.address}\n"
            f"session: {login.session}\n",
        )
        return 0

    async def _list(self, user: _Session, request: Request) -> int:
        consoles = await self._consoles(user)
        if request.format == "json":
            # The keys of the engine's own reply, as ovirt-vmconsole prints it.
            entries = [
                {"vmid": vm.vm_id, "vmname": vm.vm_name, "host": vm.host, "console": vm.console}
                for vm in consoles
            ]
            _print(user.channel, json.dumps(entries, indent=4, sort_keys=True) + "\n")
        else:
            _print(
                user.channel,
                "".join(f"{printable(vm.vm_id)}\t{printable(vm.vm_name)}\n" for vm in consoles),
            )
        return 0

    async def _connect(self, user: _Session, request: Request) -> int:
        _need_terminal(user)
        consoles = await self._consoles(user)
        if not request.names_vm:
            return await self._choose(user, consoles, request)
        console = await self._find(user, consoles, request)
        return await self._open(user, console, request)

    async def _watch(self, user: _Session, request: Request) -> int:
        return await self._connect(user, request)

    async def _log(self, user: _Session, request: Request) -> int:
        info = await self._find(user, await self._consoles(user), request)
        console = self._pool.find(info.vm_id)
        if request.follow:
            return await self._follow(user, info, request)
        if console is None:
            raise ConsoleError(
                f"Nothing is kept of {printable(info.vm_name)}: nobody has its console open."
            )
        kept = console.scrollback.tail(request.bytes)
        # A terminal would answer what the guest asked, and that into the user's own shell.
        on_terminal = user.channel.terminal is not None
        user.channel.write(Sanitizer().feed(kept) + RESET if on_terminal else kept)
        return 0

    async def _follow(self, user: _Session, info: ConsoleInfo, request: Request) -> int:
        tail = Tail(user.channel, request.bytes, user.channel.terminal is not None)
        user.channel.join(TailInput(tail))
        party = self._party(user, info, watch=True)
        try:
            attachment = await tail.open(self._pool.attach(info, party, tail))
        except ConsoleError as error:
            self._audit.attach_failed(user.login, int(user.channel.id), info, str(error))
            raise
        if attachment is not None:
            stop_looking = user.watch.console(info, tail.end, lambda _: None)
            reason = await self._attached(user, info, attachment, tail.ended, stop_looking)
            if not tail.left:
                raise ConsoleError(reason)
        return 0

    async def _who(self, user: _Session, request: Request) -> int:
        consoles = await self._consoles(user)
        if request.names_vm:
            consoles = [await self._find(user, consoles, request)]
        now = self._clock.seconds()
        for info in consoles:
            console = self._pool.find(info.vm_id)
            for line in describe_all(console, now) if console is not None else ():
                _print(user.channel, f"{printable(info.vm_name)}\t{line}\n")
        return 0

    async def _find(
        self, user: _Session, consoles: Sequence[ConsoleInfo], request: Request
    ) -> ConsoleInfo:
        try:
            return _find(consoles, request)
        except NoSuchConsole:
            return await self._find_anew(user, request)

    async def _find_anew(self, user: _Session, request: Request) -> ConsoleInfo:
        # It may have been made, or granted, since the engine was asked last.
        found = await self._permissions.consoles(user.login.user.id, fresh=True)
        self._tell_stale(user, found.answered)
        try:
            return _find(found.consoles, request)
        except NoSuchConsole:
            if not self._permissions.placed_only:
                raise
        named = printable(request.vm or request.vm_id or request.vm_name or "")
        raise NoSuchConsole(
            f"{named} is not there: not running, unknown, or not yours. `list` shows yours."
        )

    async def _choose(
        self, user: _Session, consoles: Sequence[ConsoleInfo], request: Request
    ) -> int:
        if len(consoles) == 1:
            return await self._open(user, consoles[0], request)
        picked = await self._pick(user, consoles)
        return 0 if picked is None else await self._open(user, picked[0], request, picked[1])

    async def _pick(
        self, user: _Session, consoles: Sequence[ConsoleInfo], typed: bytes = b""
    ) -> tuple[ConsoleInfo, bytes] | None:
        """Show the menu: what was chosen, and what was typed behind that."""
        if not consoles:
            running = "running" if self._permissions.placed_only else "there"
            raise NoSuchConsole(
                f"There is no console for {printable(user.login.user.name)}: no VM is {running} "
                "that you have access to. Ask who runs this proxy for a grant."
            )
        rows, columns = user.channel.size
        menu = MenuProtocol(Menu(consoles), rows=rows, columns=columns, clock=self._clock)
        user.channel.join(menu, typed)
        chosen = await menu.chosen
        user.channel.part()
        if chosen is None:
            return None
        return await self._look_again(user, chosen), menu.rest

    async def _look_again(self, user: _Session, chosen: ConsoleInfo) -> ConsoleInfo:
        # The menu may have stood there for hours.
        try:
            return by_id(await self._consoles(user), chosen.vm_id)
        except NoSuchConsole:
            name = printable(chosen.vm_name)
            raise NoSuchConsole(
                f"{name} is not there any more: not running, unknown, or not yours."
                if self._permissions.placed_only
                else f"You no longer have access to {name}, or it is gone."
            ) from None

    async def _open(
        self, user: _Session, console: ConsoleInfo, request: Request, typed: bytes = b""
    ) -> int:
        while (rest := await self._use(user, console, request, typed)) is not None:
            user.channel.part()
            picked = await self._pick(user, await self._consoles(user), rest)
            if picked is None:
                break
            console, typed = picked
            # That was meant for the first one.
            request = msgspec.structs.replace(request, force=False)
        return 0

    async def _use(
        self, user: _Session, console: ConsoleInfo, request: Request, typed: bytes
    ) -> bytes | None:
        """Until the user leaves; for the menu: what was typed for that already."""
        party = self._party(user, console, request.verb == "watch")
        session = ConsoleSession(
            console, party, self._pool, self._clock, self._escape, lambda: user.channel.size
        )
        user.channel.join(session, typed)
        try:
            attachment = await session.open(request.force)
        except ConsoleError as error:
            self._audit.attach_failed(user.login, int(user.channel.id), console, str(error))
            if session.back_to_menu:
                return session.rest
            raise
        stop_looking = user.watch.console(console, session.revoke, session.change_role)
        await self._attached(user, console, attachment, session.ended(), stop_looking)
        return session.rest if session.back_to_menu else None

    async def _attached(
        self,
        user: _Session,
        console: ConsoleInfo,
        attachment: Attachment,
        ended: Awaitable[str],
        stop_looking: Callable[[], None],
    ) -> str:
        """Until it has ended, however that comes: the reason, which the audit has, too."""
        login, number, started = user.login, int(user.channel.id), self._clock.seconds()
        self._audit.attached(login, number, console)
        reason = "The session was cancelled."
        try:
            reason = await ended
        finally:
            stop_looking()
            attachment.loseConnection()
            self._audit.detached(
                login,
                number,
                console,
                bytes_in=attachment.bytes_in,
                bytes_out=attachment.bytes_out,
                seconds=self._clock.seconds() - started,
                reason=reason,
            )
        return reason

    def _party(self, user: _Session, console: ConsoleInfo, watch: bool) -> Party:
        name = printable(user.login.user.name)
        return Party(name, user.login.address, console.role, watch)

    async def _consoles(self, user: _Session) -> Sequence[ConsoleInfo]:
        found = await self._permissions.consoles(user.login.user.id)
        both = (user.watch.unconfirmed, found.answered)
        self._tell_stale(user, min((each for each in both if each is not None), default=None))
        return found.consoles

    def _tell_stale(self, user: _Session, answered: float | None) -> None:
        if answered is None or answered == user.told:
            return
        user.told = answered
        user.watch.unconfirmed = None
        age = ago(self._clock.seconds() - answered)
        user.channel.write_error(f"[engine unreachable: using its answer from {age}]")
        self._logger.warn(
            "session {session}: the engine does not answer; {user} is served by its answer from "
            "{age}",
            session=user.login.session,
            user=printable(user.login.user.name),
            age=age,
        )


def _need_terminal(user: _Session) -> None:
    if user.channel.terminal is None:
        raise NeedsTerminal(
            "A console needs a terminal. Run ssh with -t: ssh -t ... (-tt, when the input of ssh "
            "is no terminal)."
        )


def _find(consoles: Sequence[ConsoleInfo], request: Request) -> ConsoleInfo:
    if request.vm_id is not None:
        return by_id(consoles, request.vm_id)
    if request.vm_name is not None:
        return by_name(consoles, request.vm_name)
    return by_text(consoles, request.vm or "")


def _print(channel: SessionChannel, text: str) -> None:
    # A terminal in raw mode, which a client with a pty is, wants the carriage return.
    if channel.terminal is not None:
        text = text.replace("\n", "\r\n")
    channel.write(text.encode())
