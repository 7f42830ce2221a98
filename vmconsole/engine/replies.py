"""The engine's replies, read: whole, or not at all; an entry that is no good spoils no other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import ijson
import msgspec
from twisted.logger import Logger

from vmconsole.engine.keyline import parse_key_line
from vmconsole.errors import EngineError
from vmconsole.interfaces import AuthorizedKey, ConsoleInfo, Role
from vmconsole.text import printable

# What the parser is fed at a time, in bytes: less than a millisecond of work.
_PIECE = 65536
# A reply without any key is looked at in one go, if it is no larger, to tell what it is instead.
_SMALL = 1024 * 1024
_MAX_PROBLEMS = 1000


class _KeyList(msgspec.Struct):
    content: str
    keys: list[msgspec.Raw]


class _ConsoleList(msgspec.Struct):
    content: str
    consoles: list[msgspec.Raw]


class _KeyEntry(msgspec.Struct):
    entityid: str
    entity: str
    key: str
    options: str = ""
    """Of an engine that knows the feature ``key_options``: then the key is a bare one."""


class _ConsoleEntry(msgspec.Struct):
    vmid: str
    vmname: str
    host: str
    console: str = "default"
    role: Role = "operator"


class Problems:
    """Logs what is wrong with the engine's answers, each problem once, not at every refresh."""

    _log = Logger()

    def __init__(self) -> None:
        self._told: set[str] = set()

    def tell(self, problem: str) -> None:
        """Log it, if it is news."""
        if problem in self._told or len(self._told) >= _MAX_PROBLEMS:
            return
        self._told.add(problem)
        self._log.warn("Left out of the engine's answer: {problem}", problem=problem)
        if len(self._told) == _MAX_PROBLEMS:
            self._log.warn(
                "{count} entries were left out of the engine's answers; no more are logged.",
                count=_MAX_PROBLEMS,
            )


def read_keys(pieces: Sequence[bytes], problems: Problems) -> Iterator[AuthorizedKey]:
    """The keys in a reply that may be large, read as they are taken. Raises EngineError."""
    found = False
    for entry in _entries(pieces):
        found = True
        try:
            key = _authorized_key(entry)
        except ValueError as error:
            problems.tell(str(error))
        else:
            if key is not None:
                yield key
    if not found:
        # No keys at all would lock out everybody: it has to be an answer that says so.
        if sum(map(len, pieces)) > _SMALL:
            raise EngineError("The engine's answer holds no keys.")
        _decode(pieces, _KeyList, "key_list")


def read_consoles(
    pieces: Sequence[bytes], problems: Problems, found: list[ConsoleInfo]
) -> Iterator[None]:
    """Put the consoles in a reply into ``found``, one a step. Raises EngineError."""
    for raw in _decode(pieces, _ConsoleList, "console_list").consoles:
        try:
            found.append(_console(raw))
        except ValueError as error:
            problems.tell(str(error))
        yield


def _entries(pieces: Iterable[bytes]) -> Iterator[object]:
    entries = ijson.sendable_list()
    parser = ijson.items_coro(entries, "keys.item")
    try:
        for piece in pieces:
            for start in range(0, len(piece), _PIECE):
                parser.send(piece[start : start + _PIECE])
                yield from entries
                del entries[:]
        parser.close()
    except (ijson.JSONError, ValueError, ArithmeticError, RecursionError) as error:
        raise _not_understood(error) from error
    yield from entries


_Reply = TypeVar("_Reply", _KeyList, _ConsoleList)


def _decode(pieces: Sequence[bytes], kind: type[_Reply], content: str) -> _Reply:
    try:
        reply = msgspec.json.decode(b"".join(pieces), type=kind)
    except (ValueError, RecursionError) as error:
        raise _not_understood(error) from error
    if reply.content != content:
        raise EngineError(
            f"The engine's answer holds {printable(reply.content, 40)} instead of {content}."
        )
    return reply


def _not_understood(error: Exception) -> EngineError:
    return EngineError(f"The engine's answer cannot be understood: {printable(str(error))}.")


def _authorized_key(entry: object) -> AuthorizedKey | None:
    try:
        fields = msgspec.convert(entry, _KeyEntry)
    except msgspec.ValidationError as error:
        raise ValueError(f"a key: {printable(str(error))}") from error
    if not fields.key.strip():
        return None
    try:
        line = parse_key_line(f"{fields.options} {fields.key}")
    except ValueError as error:
        raise ValueError(f"a key of {printable(fields.entity)}: {error}") from None
    if not fields.entityid:
        raise ValueError(f"a key of {printable(fields.entity)}: the user has no id")
    return AuthorizedKey(fields.entityid, fields.entity, line.blob, line.options)


def _console(raw: msgspec.Raw) -> ConsoleInfo:
    try:
        entry = msgspec.json.decode(raw, type=_ConsoleEntry)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise ValueError(f"a console: {printable(str(error))}") from error
    if not entry.vmid or not entry.host:
        raise ValueError(f"the console of {printable(entry.vmname)}: no VM id, or no host")
    return ConsoleInfo(entry.vmid, entry.vmname, entry.host, entry.console, entry.role)
