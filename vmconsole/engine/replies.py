"""The engine's replies, read: whole, or not at all; an entry that is no good spoils no other."""

from __future__ import annotations

import codecs
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import ijson
import msgspec
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from vmconsole.engine.keyline import find_fingerprint, parse_key_line
from vmconsole.engine.splitter import EntrySplitter
from vmconsole.errors import EngineError
from vmconsole.interfaces import AuthorizedKey, ConsoleInfo, Role, User
from vmconsole.text import printable

# What the parser is fed at a time, in bytes: less than a millisecond of work.
_PIECE = 16384
# Problems that are logged of one user's entries, and of one answer.
_OF_ONE = 10
_OF_ALL = 1000
# Seconds after which a problem that was not seen meanwhile is news again; and how many problems
# are remembered.
_FORGOTTEN = 600.0
_CAPACITY = 100_000
# JSON's escapes (RFC 8259, section 7): UTF-16, with surrogates in pairs, if all is well.
_ESCAPE = re.compile(
    r"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"
    r"|(?P<lone>u[dD][89a-fA-F][0-9a-fA-F]{2})|.)",
    re.DOTALL,
)
_IN_ESCAPES = "\\uabcdefABCDEF0123456789"


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
    problem: str = ""
    """Of an engine that knows the feature ``console_problem``."""


class Problems:
    """Logs what is wrong with the engine's answers: each problem once, not at every refresh."""

    _log = Logger()

    def __init__(self, clock: IReactorTime) -> None:
        self._clock = clock
        # When each was seen last; the latest stands last.
        self._seen: dict[str, float] = {}

    def report(self) -> Callable[[str, str], None]:
        """Tells of one answer's problems: whose entry it is, and what is wrong with it."""
        counts: Counter[str] = Counter()

        def tell(owner: str, problem: str) -> None:
            counts[owner] += 1
            if counts[owner] == _OF_ONE + 1:
                problem = f"more of {owner or 'the same kind'}"
            if counts[owner] > _OF_ONE + 1:
                return
            now = self._clock.seconds()
            last = self._seen.pop(problem, None)
            self._seen[problem] = now
            if len(self._seen) > _CAPACITY:
                del self._seen[next(iter(self._seen))]
            if last is not None and 0 <= now - last < _FORGOTTEN:
                return
            counts[""] += 1
            if counts[""] <= _OF_ALL:
                self._log.warn("Left out of the engine's answer: {problem}", problem=problem)
            elif counts[""] == _OF_ALL + 1:
                self._log.warn("Left out of the engine's answer: much more, which is not logged")

        return tell


def warn_if_slow(log: Logger) -> None:
    """Say so when the parser of key lists has no compiled part here."""
    if ijson.backend == "python":
        log.warn("ijson has no compiled part here: reading long lists of keys will be slow.")


def read_keys(pieces: Sequence[bytes], problems: Problems) -> Iterator[AuthorizedKey | User | None]:
    """The keys in a reply that may be large, read as they are taken; None: a step without one.

    A User is one who has no key, of an engine that knows the feature ``keyless_users``, or none
    that can be taken.

    Raises EngineError: then none of what came before counts.
    """
    tell = problems.report()
    entries = readable = 0
    for entry in _entries_of_any(pieces):
        key: AuthorizedKey | User | None = None
        if entry is not None:
            entries += 1
            try:
                fields = msgspec.convert(entry, _KeyEntry)
            except msgspec.ValidationError as error:
                tell("a malformed entry", f"a key: {printable(str(error))}")
            else:
                readable += 1
                key = _authorized_key(fields, tell)
        yield key
    if entries and not readable:
        # An answer without keys locks everybody out: it has to be one that says so.
        raise EngineError(f"The engine's answer has {entries} keys, and none can be understood.")


def read_consoles(
    pieces: Sequence[bytes], problems: Problems, found: list[ConsoleInfo]
) -> Iterator[None]:
    """Put the consoles in a reply into ``found``, one a step. Raises EngineError."""
    tell = problems.report()
    try:
        reply = msgspec.json.decode(b"".join(pieces), type=_ConsoleList)
    except (ValueError, RecursionError) as error:
        raise _not_understood(error) from error
    _check_content(reply.content, "console_list")
    for raw in reply.consoles:
        try:
            found.append(_console(raw))
        except ValueError as error:
            tell("a malformed entry", str(error))
        yield


def _entries(pieces: Iterable[bytes]) -> Iterator[Any]:
    """The entries of a list of keys, as dictionaries if they are some; None: a step without one."""
    splitter = EntrySplitter("keys")
    events = ijson.sendable_list()
    # As floats: yajl2_c crashes on integers that Python would not read.
    parser = ijson.basic_parse_coro(events, use_float=True)
    try:
        for piece in pieces:
            for start in range(0, len(piece), _PIECE):
                parser.send(piece[start : start + _PIECE])
                yield from splitter.feed(events)
                del events[:]
                yield None
        parser.close()
    except UnicodeDecodeError:
        raise
    except (ijson.JSONError, ValueError) as error:
        raise _not_understood(error) from error
    _check_content(splitter.content, "key_list")
    if not splitter.complete:
        raise EngineError("The engine's answer holds no list of keys.")


def _entries_of_any(pieces: Sequence[bytes]) -> Iterator[Any]:
    """The same; an escape that is no Unicode spoils its own entry, and no other."""
    try:
        yield from _entries(pieces)
    except UnicodeDecodeError:
        # Those that were read already come again, which is no matter.
        yield from _entries(_as_unicode(pieces))


def _as_unicode(pieces: Iterable[bytes]) -> Iterator[bytes]:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    held = ""
    for piece in pieces:
        for start in range(0, len(piece), _PIECE):
            text = held + decoder.decode(piece[start : start + _PIECE])
            # An escape, or a pair of them, may go on in the next piece.
            cut = len(text.rstrip(_IN_ESCAPES))
            text, held = (text[:cut], text[cut:]) if len(text) - cut < _PIECE else (text, "")
            yield _ESCAPE.sub(_mended, text).encode()
    yield _ESCAPE.sub(_mended, held + decoder.decode(b"", final=True)).encode()


def _mended(escape: re.Match[str]) -> str:
    return r"\ufffd" if escape["lone"] else escape[0]


def _check_content(found: object, expected: str) -> None:
    if found != expected:
        shown = printable(found, 40) if isinstance(found, str) else "something else"
        raise EngineError(f"The engine's answer holds {shown} instead of {expected}.")


def _not_understood(error: Exception) -> EngineError:
    return EngineError(f"The engine's answer cannot be understood: {printable(str(error))}.")


def _authorized_key(
    entry: _KeyEntry, tell: Callable[[str, str], None]
) -> AuthorizedKey | User | None:
    user = User(entry.entityid, entry.entity) if entry.entityid and entry.entity else None
    if not entry.key.strip():
        return user
    owner = printable(entry.entity)
    try:
        line = parse_key_line(f"{entry.options} {entry.key}")
        if not entry.entityid:
            raise ValueError("the user has no id")
    except ValueError as error:
        shown = find_fingerprint(entry.key)
        tell(owner, f"a key of {owner}{shown and f' ({shown})'}: {error}")
        # A name that two users have is nobody's, whatever their keys are like.
        return user
    return AuthorizedKey(entry.entityid, entry.entity, line.blob, line.options)


def _console(raw: msgspec.Raw) -> ConsoleInfo:
    try:
        entry = msgspec.json.decode(raw, type=_ConsoleEntry)
    except msgspec.MsgspecError as error:
        raise ValueError(f"a console: {printable(str(error))}") from error
    if not entry.vmid or not entry.host:
        raise ValueError(f"the console of {printable(entry.vmname)}: no VM id, or no host")
    return ConsoleInfo(
        entry.vmid, entry.vmname, entry.host, entry.console, entry.role, entry.problem
    )
