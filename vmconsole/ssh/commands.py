"""What a user may say on the command line, and what happens then."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Sequence

import msgspec
from twisted.internet.defer import CancelledError
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from vmconsole import __version__
from vmconsole.audit import Audit, Login
from vmconsole.console.attachment import Attachment, Party
from vmconsole.console.console_session import ConsoleSession
from vmconsole.console.escape import escape_name
from vmconsole.console.pool import ConsolePool
from vmconsole.console.tail import Tail, TailInput
from vmconsole.console.terminal import RESET, Sanitizer
from vmconsole.console.who import describe_all
from vmconsole.errors import ConsoleError, VMConsoleError
from vmconsole.interfaces import ConsoleInfo, IPermissions, IWatch
from vmconsole.ssh.access import Access
from vmconsole.ssh.request import CommandSyntaxError, Request, parse
from vmconsole.ssh.session import SessionChannel
from vmconsole.ssh.user_session import UserSession
from vmconsole.text import printable

_HELP = """\
vmconsole {version}: the serial consoles of your VMs.

  ssh -t ... USER@PROXY               the menu; with a single VM, its console
  ssh -t ... USER@PROXY VM            the console of VM: its id, its name, a beginning of either,
                                      or a pattern that matches one
  ... connect [--vm-id ID | --vm-name NAME | VM] [--wait] [--force]
                                      the same, also by exactly this id or name; --wait waits until
                                      VM runs; --force takes it from another program on its host
  ... watch VM                        the same, only to watch
  ... log VM [--bytes N] [--follow] [--raw]
                                      what VM printed last, while somebody had it open; needs no
                                      terminal; --follow goes on; --raw leaves in what a terminal
                                      would answer
  ... who [VM]                        who is on the consoles of your VMs
  ... list [--format plain|json]      your VMs; needs no terminal
  ... info                            who you are to this proxy
  ... help                            this text
"""


class NeedsTerminal(VMConsoleError):
    """A console was asked for without a pty."""


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
            user = UserSession(channel, login, watch, self._permissions, self._clock, self._escape)
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

    async def _help(self, user: UserSession, request: Request) -> int:
        text = _HELP.format(version=__version__)
        if self._escape is not None:
            key = escape_name(self._escape)
            text += (
                f"\nOn a console, {key} is a prefix: {key} . leaves, {key} t takes the keyboard or "
                f"asks for it, {key} ? helps.\n"
            )
        _print(user.channel, text)
        return 0

    async def _info(self, user: UserSession, request: Request) -> int:
        login = user.login
        user.tell_stale(user.watch.unconfirmed)
        certificate = f"certificate: {login.certificate}\n" if login.certificate else ""
        _print(
            user.channel,
            f"vmconsole {__version__}\n"
            f"user: {printable(login.user.name)} [{printable(login.user.id)}]\n"
            f"key: {login.fingerprint}\n"
            f"{certificate}from: {login.address}\n"
            f"session: {login.session}\n",
        )
        return 0

    async def _list(self, user: UserSession, request: Request) -> int:
        consoles = await user.consoles()
        if request.format == "json":
            entries = [_entry(vm) for vm in consoles]
            _print(user.channel, json.dumps(entries, indent=4, sort_keys=True) + "\n")
        else:
            _print(
                user.channel,
                "".join(f"{printable(vm.vm_id)}\t{printable(vm.vm_name)}\n" for vm in consoles),
            )
        return 0

    async def _connect(self, user: UserSession, request: Request) -> int:
        _need_terminal(user)
        consoles = await user.consoles()
        if not request.names_vm:
            return await self._choose(user, consoles, request)
        return await self._open(user, await user.find(consoles, request), request)

    async def _watch(self, user: UserSession, request: Request) -> int:
        return await self._connect(user, request)

    async def _log(self, user: UserSession, request: Request) -> int:
        info = await user.find(await user.consoles(), request)
        console = self._pool.find(info.vm_id)
        if request.follow:
            return await self._follow(user, info, request)
        if console is None:
            raise ConsoleError(
                f"Nothing is kept of {printable(info.vm_name)}: nobody has its console open."
            )
        kept = console.scrollback.tail(request.bytes)
        # A terminal would answer what the guest asked, and that into the user's own shell: one
        # that is behind ssh's standard output, too.
        user.channel.write(kept if request.raw else Sanitizer().feed(kept))
        if user.channel.terminal is not None:
            user.channel.write(RESET)
        return 0

    async def _follow(self, user: UserSession, info: ConsoleInfo, request: Request) -> int:
        tail = Tail(
            user.channel,
            request.bytes,
            lambda text: user.channel.write_error(f"[vmconsole: {text}]"),
            request.raw,
            user.channel.terminal is not None,
        )
        user.channel.join(TailInput(tail))
        with self._access(user, info) as access:
            attaching = self._pool.attach(info, self._party(user, info, access, watch=True), tail)
            attachment = await tail.open(attaching)
            if attachment is not None:
                reason = await self._attached(user, attachment, tail.ended)
                if not tail.left:
                    raise ConsoleError(reason)
        return 0

    async def _who(self, user: UserSession, request: Request) -> int:
        consoles = await user.consoles()
        if request.names_vm:
            consoles = [await user.find(consoles, request)]
        now = self._clock.seconds()
        for info in consoles:
            console = self._pool.find(info.vm_id)
            for line in describe_all(console, now) if console is not None else ():
                _print(user.channel, f"{printable(info.vm_name)}\t{line}\n")
        return 0

    async def _choose(
        self, user: UserSession, consoles: Sequence[ConsoleInfo], request: Request
    ) -> int:
        if len(consoles) == 1:
            return await self._open(user, consoles[0], request)
        picked = await user.pick(consoles)
        return 0 if picked is None else await self._open(user, picked[0], request, picked[1])

    async def _open(
        self, user: UserSession, console: ConsoleInfo, request: Request, typed: bytes = b""
    ) -> int:
        while (rest := await self._use(user, console, request, typed)) is not None:
            user.channel.part()
            picked = await user.pick(await user.consoles(), rest)
            if picked is None:
                break
            console, typed = picked
            # That was meant for the first one.
            request = msgspec.structs.replace(request, force=False)
        return 0

    async def _use(
        self, user: UserSession, console: ConsoleInfo, request: Request, typed: bytes
    ) -> bytes | None:
        """Until the user leaves; for the menu: what was typed for that already."""
        access = self._access(user, console)
        party = self._party(user, console, access, request.verb == "watch")
        session = ConsoleSession(
            console, party, self._pool, self._clock, self._escape, lambda: user.channel.size
        )
        user.channel.join(session, typed)
        try:
            with access:
                attachment = await session.open(request.force, request.wait)
                await self._attached(user, attachment, session.ended())
        except ConsoleError:
            if not session.back_to_menu:
                raise
        return session.rest if session.back_to_menu else None

    async def _attached(
        self,
        user: UserSession,
        attachment: Attachment,
        ended: Awaitable[str],
    ) -> str:
        """Until it has ended, however that comes: the reason, which the audit has, too."""
        started = self._clock.seconds()
        reason = "The session was cancelled."
        try:
            reason = await ended
        except CancelledError:
            attachment.loseConnection()
            raise
        finally:
            self._audit.detached(
                user.login,
                user.number,
                attachment.console.info,
                bytes_in=attachment.bytes_in,
                bytes_out=attachment.bytes_out,
                seconds=self._clock.seconds() - started,
                reason=reason,
            )
        return reason

    def _access(self, user: UserSession, console: ConsoleInfo) -> Access:
        return Access(
            self._permissions,
            user.watch,
            self._audit,
            user.login,
            user.number,
            console,
            user.tell_stale,
        )

    def _party(self, user: UserSession, console: ConsoleInfo, access: Access, watch: bool) -> Party:
        name = printable(user.login.user.name)
        return Party(name, user.login.address, console.role, watch, access=access)


def _entry(vm: ConsoleInfo) -> dict[str, str]:
    # The keys of the engine's own reply, as ovirt-vmconsole prints it.
    entry = {"vmid": vm.vm_id, "vmname": vm.vm_name, "host": vm.host, "console": vm.console}
    return entry | {"problem": vm.problem} if vm.problem else entry


def _need_terminal(user: UserSession) -> None:
    if user.channel.terminal is None:
        raise NeedsTerminal(
            "A console needs a terminal. Run ssh with -t: ssh -t ... (-tt, when the input of ssh "
            "is no terminal)."
        )


def _print(channel: SessionChannel, text: str) -> None:
    # A terminal in raw mode, which a client with a pty is, wants the carriage return.
    if channel.terminal is not None:
        text = text.replace("\n", "\r\n")
    channel.write(text.encode())
