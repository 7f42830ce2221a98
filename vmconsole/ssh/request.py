"""What a user's command line asks for."""

from __future__ import annotations

import argparse
import shlex
from typing import NoReturn

import msgspec

from vmconsole.errors import VMConsoleError
from vmconsole.text import printable

# Bytes; shlex takes time that grows with the square of a word's length.
_LONGEST_LINE = 4096
# argparse takes 25 ms for the words that such a line may have.
_MOST_WORDS = 16


class CommandSyntaxError(VMConsoleError):
    """The command line makes no sense; the text says what would."""


class Request(msgspec.Struct, frozen=True):
    """A parsed command line."""

    verb: str = "connect"
    vm: str | None = None
    vm_id: str | None = None
    vm_name: str | None = None
    format: str = "plain"
    force: bool = False
    """Take the console from another program on its host."""
    wait: bool = False
    """Wait until the console can be opened."""
    bytes: int | None = None
    """How much of the output is wanted; None: all that is kept."""
    raw: bool = False
    """Byte for byte as the guest printed it."""
    follow: bool = False
    """Go on with what the guest prints from now on."""

    @property
    def names_vm(self) -> bool:
        """Whether it says which VM is meant."""
        return not (self.vm is self.vm_id is self.vm_name is None)


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
    one.add_argument("vm", nargs="?", type=_not_empty)
    connect.add_argument("--force", action="store_true")
    connect.add_argument("--wait", action="store_true")
    watch = verbs.add_parser("watch", add_help=False, allow_abbrev=False)
    watch.add_argument("vm", type=_not_empty)
    log = verbs.add_parser("log", add_help=False, allow_abbrev=False)
    log.add_argument("vm", type=_not_empty)
    log.add_argument("--bytes", type=_count)
    log.add_argument("--follow", action="store_true")
    log.add_argument("--raw", action="store_true")
    who = verbs.add_parser("who", add_help=False, allow_abbrev=False)
    who.add_argument("vm", nargs="?", type=_not_empty)
    return parser


def _not_empty(text: str) -> str:
    # A script's unset variable must not open the only VM that there is.
    if not text:
        raise argparse.ArgumentTypeError("it is empty")
    return text


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError("it is no number of bytes")
    return int(text[:18])


_VERBS = ("help", "info", "list", "connect", "watch", "log", "who")


def parse(line: bytes) -> Request:
    """What the user's command line asks for. Raises CommandSyntaxError."""
    if len(line) > _LONGEST_LINE:
        raise CommandSyntaxError(f"The command line has more than {_LONGEST_LINE} bytes.")
    try:
        words = shlex.split(line.decode("utf-8", "replace"))
    except ValueError as error:
        raise CommandSyntaxError(f"{error}: check the quotes.") from error
    if len(words) > _MOST_WORDS:
        raise CommandSyntaxError(f"The command line has more than {_MOST_WORDS} words.")
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
