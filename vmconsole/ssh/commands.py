"""What a user may say on the command line, and what happens then."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import msgspec
from twisted.internet.defer import CancelledError
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from vmconsole import __version__
from vmconsole.audit import Audit, Login
from vmconsole.console.choice import NoSuchConsole, by_id, by_name, by_text
from vmconsole.console.console import ConsolePool
from vmconsole.console.console_session import ConsoleSession
from vmconsole.console.escape import escape_name
from vmconsole.console.menu import Menu, MenuProtocol
from vmconsole.errors import ConsoleError, VMConsoleError
from vmconsole.interfaces import ConsoleInfo, IPermissions, IWatch
from vmconsole.ssh.session import SessionChannel
from vmconsole.text import ago, printable

_HELP = """\
vmconsole {version}: the serial consoles of your VMs.

  ssh -t ... USER@PROXY               the menu; with a single VM, its console
  ssh -t ... USER@PROXY VM            the console of VM: its id, its name, or a beginning of either
  ... connect [--vm-id ID | --vm-name NAME]
                                      the same, by exactly this id or name
  ... list [--format plain|json]      your VMs; needs no terminal
  ... info                            who you are to this proxy
  ... help                            this text
"""


# Bytes; shlex takes time that grows with the square of a word's length.
_LONGEST_LINE = 4096


class CommandSyntaxError(VMConsoleError):
    """The command line makes no sense; the text says what would."""


class NeedsTerminal(VMConsoleError):
    """A console was asked for without a pty."""


class Request(msgspec.Struct, frozen=True):
    """A parsed command line."""

    verb: str = "connect"
    vm: str | None = None
    vm_id: str | None = None
    vm_name: str | None = None
    format: str = "plain"


class _Parser(argparse.ArgumentParser):
    # argparse would print to our own stderr and end the process.
    def error(self, message: str) -> NoReturn:
        raise CommandSyntaxError(f"{printable(message)}. `help` tells what can be said.")


def _make_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="", add_help=False, allow_abbrev=False)
    verbs = parser.add_subparsers(dest="verb")
    verbs.add_parser("help", add_help=False)
    verbs.add_parser("info", add_help=False)
    listing = verbs.add_parser("list", add_help=False, allow_abbrev=False)
    listing.add_argument("--format", choices=("plain", "json"), default="plain")
    connect = verbs.add_parser("connect", add_help=False, allow_abbrev=False)
    one = connect.add_mutually_exclusive_group()
    one.add_argument("--vm-id", type=_not_empty)
    one.add_argument("--vm-name", type=_not_empty)
    return parser


def _not_empty(text: str) -> str:
    # A script's unset variable must not open the only VM that there is.
    if not text:
        raise argparse.ArgumentTypeError("it is empty")
    return text


_VERBS = ("help", "info", "list", "connect")


def parse(line: bytes) -> Request:
    """What the user's command line asks for. Raises CommandSyntaxError."""
    if len(line) > _LONGEST_LINE:
        raise CommandSyntaxError(f"The command line has more than {_LONGEST_LINE} bytes.")
    try:
        words = shlex.split(line.decode("utf-8", "replace"))
    except ValueError as error:
        raise CommandSyntaxError(f"{error}: check the quotes.") from error
    # ovirt-vmconsole takes --debug before its command; errors here need none.
    if words[:1] == ["--debug"]:
        words = words[1:]
    if not words:
        return Request()
    if words[0] == "help" or "--help" in words or "-h" in words:
        return Request(verb="help")
    if words[0] in _VERBS:
        return Request(**vars(_make_parser().parse_args(words)))
    if len(words) > 1 or not words[0] or words[0].startswith("-"):
        raise CommandSyntaxError(
            f"{printable(words[0]) or 'An empty word'} is no command. `help` tells what can be "
            "said."
        )
    return Request(vm=words[0])


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

    _log = Logger()

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
            self._log.failure("session {session}: the command failed", session=login.session)
            channel.write_error(
                "ERROR: Something went wrong in the proxy; this is its own fault. Its log tells "
                f"more: look for {login.session}."
            )
            return 1

    async def _help(self, user: _Session, request: Request) -> int:
        text = _HELP.format(version=__version__)
        if self._escape is not None:
            key = escape_name(self._escape)
            text += f"\nOn a console, {key} is a prefix: {key} . leaves, {key} ? helps.\n"
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
        if user.channel.terminal is None:
            raise NeedsTerminal(
                "A console needs a terminal. Run ssh with -t: ssh -t ... (-tt, when the input of "
                "ssh is no terminal)."
            )
        consoles = await self._consoles(user)
        if request.vm is request.vm_id is request.vm_name is None:
            return await self._choose(user, consoles)
        try:
            console = _find(consoles, request)
        except NoSuchConsole:
            console = await self._find_anew(user, request)
        return await self._open(user, console)

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

    async def _choose(self, user: _Session, consoles: Sequence[ConsoleInfo]) -> int:
        if not consoles:
            running = "running" if self._permissions.placed_only else "there"
            raise NoSuchConsole(
                f"There is no console for {printable(user.login.user.name)}: no VM is {running} "
                "that you have access to. Ask who runs this proxy for a grant."
            )
        if len(consoles) == 1:
            return await self._open(user, consoles[0])
        rows, columns = user.channel.size
        menu = MenuProtocol(Menu(consoles), rows=rows, columns=columns, clock=self._clock)
        user.channel.join(menu)
        chosen = await menu.chosen
        user.channel.part()
        if chosen is None:
            return 0
        return await self._open(user, await self._look_again(user, chosen), menu.rest)

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

    async def _open(self, user: _Session, console: ConsoleInfo, typed: bytes = b"") -> int:
        login = user.login
        session = ConsoleSession(console, self._pool, self._clock, self._escape)
        user.channel.join(session, typed)
        number = int(user.channel.id)
        holder = f"{printable(login.user.name)} from {login.address}"
        try:
            attachment = await session.open(holder)
        except ConsoleError as error:
            self._audit.attach_failed(login, number, console, str(error))
            raise
        started = self._clock.seconds()
        self._audit.attached(login, number, console)
        stop_looking = user.watch.console(console, session.revoke, session.change_role)
        reason = "The session was cancelled."
        try:
            reason = await session.ended()
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
        return 0

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
        self._log.warn(
            "session {session}: the engine does not answer; {user} is served by its answer from "
            "{age}",
            session=user.login.session,
            user=printable(user.login.user.name),
            age=age,
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
