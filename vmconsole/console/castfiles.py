"""Recordings on the disk: their files, what they are called, and which are deleted when.

All of it waits for the disk.
"""

from __future__ import annotations

import errno
import hashlib
import heapq
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock

import msgspec

from vmconsole.console.asciicast import AsciicastEncoder
from vmconsole.interfaces import ConsoleInfo

# Output; a marker's label; the end.
Piece = bytes | str | None

# Output that came within so many seconds is one event: a frame of the player.
_FRAME = 1 / 60
# Bytes that are written at once.
_AT_ONCE = 256 * 1024
_OUR_FOLDER = re.compile(r"[\w.~-]+,[\w.~-]+", re.ASCII)
_OUR_FILE = re.compile(r"\d{8}T\d{6}\.\d{3}Z-[\w.~-]+-\d{4,}\.cast", re.ASCII)
_LONGEST = 64
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
_NEW = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
# Of what could not be deleted, so much is told.
_TOLD = 5


def safe_name(text: str) -> str:
    """``text`` as a part of a file's name: ASCII letters, digits, ``.``, ``_``, ``-``.

    Where that changes it, or cuts it, ``~`` and a digest of the whole keep it apart from others.
    """
    safe = re.sub(r"[^\w.-]+", "_", text, flags=re.ASCII)[:_LONGEST].lstrip(".-")
    if safe and safe == text:
        return safe
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{safe or '_'}~{digest[:12]}"


class Pruned(msgspec.Struct):
    """What one look at all recordings did."""

    files: int = 0
    size: int = 0
    """Bytes that were freed."""
    problems: list[str] = []


class CastFile:
    """A file that is being written."""

    def __init__(self, path: Path, descriptor: int, write: Callable[[int, bytes], int]) -> None:
        self.path = path
        self.size = 0
        self._descriptor = descriptor
        self._write = write

    def append(self, lines: bytes) -> None:
        """Write whole lines. Raises OSError; what the file has then still ends with a line."""
        written = 0
        try:
            if not os.fstat(self._descriptor).st_nlink:
                raise FileNotFoundError(errno.ENOENT, "The file was deleted")
            while written < len(lines):
                written += self._write(self._descriptor, lines[written:])
        except OSError:
            whole = lines.rfind(b"\n", 0, written) + 1
            with suppress(OSError):
                os.ftruncate(self._descriptor, self.size + whole)
            raise
        self.size += len(lines)

    def close(self) -> None:
        """Raises OSError: some file systems tell only now that they are full."""
        os.close(self._descriptor)


class CastDirectory:
    """``<VM>,<its id>/<UTC time>-<VM>-<part>.cast``. All methods wait for the disk, in any thread.

    Recordings that were last written more than ``retain_age`` seconds ago are deleted, and the
    oldest of those that have more than ``retain_bytes`` bytes in total; 0: there is no limit.
    ``write`` is os.write.
    """

    def __init__(
        self,
        directory: Path,
        retain_age: float,
        retain_bytes: int,
        write: Callable[[int, bytes], int] = os.write,
    ) -> None:
        self.directory = directory
        self._retain_age = retain_age
        self._retain_bytes = retain_bytes
        self._write = write
        self._open: set[str] = set()
        # Between a folder that is made, or was found to be empty, and what is done with it.
        self._lock = Lock()

    def make(self) -> None:
        """Make the directory, for us alone, where there is none. Raises OSError."""
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def create(self, info: ConsoleInfo, at: float, part: int, header: bytes) -> CastFile:
        """A new file that begins with ``header``. Raises OSError, and leaves none then."""
        name = safe_name(info.vm_name)
        folder = f"{name},{safe_name(info.vm_id)}"
        with self._lock:
            self.make()
            with self._opened(self.directory) as top:
                with suppress(FileExistsError):
                    os.mkdir(folder, 0o700, dir_fd=top)
                with self._opened(folder, top) as descriptor:
                    path, new = self._new_file(folder, descriptor, name, at, part)
        file = CastFile(self.directory / path, new, self._write)
        try:
            # Whatever the umask is.
            os.fchmod(new, 0o600)
            file.append(header)
        except OSError:
            with suppress(OSError):
                file.path.unlink()
            with suppress(OSError):
                self.close(file)
            raise
        return file

    def close(self, file: CastFile, keep: bool = True) -> None:
        """The file is finished: from now on it may be deleted. Raises OSError."""
        try:
            file.close()
            if not keep:
                file.path.unlink(missing_ok=True)
                with self._lock, suppress(OSError):
                    # Only when it is empty.
                    file.path.parent.rmdir()
        finally:
            self._open.discard(f"{file.path.parent.name}/{file.path.name}")

    def prune(self, now: float, stopped: Callable[[], bool]) -> Pruned:
        """Delete what is not retained, the oldest first, until ``stopped``. Raises OSError."""
        pruned = Pruned()
        if not self._retain_age and not self._retain_bytes:
            return pruned
        with self._opened(self.directory) as top:
            # A heap: to sort 100,000 in one go would hold up the reactor's thread, too.
            found: list[tuple[float, str, int]] = []
            total = 0
            for item in self._recordings(top, pruned, stopped):
                heapq.heappush(found, item)
                total += item[2]
            while found and not stopped():
                written, path, size = heapq.heappop(found)
                old = self._retain_age and now - written > self._retain_age
                if not old and not (self._retain_bytes and total > self._retain_bytes):
                    break
                if path not in self._open and self._delete(top, path, pruned):
                    total -= size
                    pruned.files += 1
                    pruned.size += size
        return pruned

    def _new_file(
        self, folder: str, descriptor: int, name: str, at: float, part: int
    ) -> tuple[str, int]:
        while True:
            moment = datetime.fromtimestamp(at, UTC)
            stamp = f"{moment:%Y%m%dT%H%M%S}.{moment.microsecond // 1000:03}Z"
            file = f"{stamp}-{name}-{part:04}.cast"
            path = f"{folder}/{file}"
            # Of the same millisecond there may be another one already.
            at += 0.001
            if path in self._open:
                continue
            # Before it is there, so that it is never deleted.
            self._open.add(path)
            try:
                return path, os.open(file, _NEW, 0o600, dir_fd=descriptor)
            except OSError as error:
                self._open.discard(path)
                if not isinstance(error, FileExistsError):
                    raise

    @contextmanager
    def _opened(self, folder: str | Path, top: int | None = None) -> Iterator[int]:
        flags = _FOLDER if top is not None else _FOLDER & ~os.O_NOFOLLOW
        descriptor = os.open(folder, flags, dir_fd=top)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def _recordings(
        self, top: int, pruned: Pruned, stopped: Callable[[], bool]
    ) -> Iterator[tuple[float, str, int]]:
        with os.scandir(top) as folders:
            for folder in filter(_is_our_folder, folders):
                if stopped():
                    return
                try:
                    with self._opened(folder.name, top) as each, os.scandir(each) as files:
                        for file in filter(_is_our_file, files):
                            status = file.stat(follow_symlinks=False)
                            yield status.st_mtime, f"{folder.name}/{file.name}", status.st_size
                except OSError as error:
                    self._note(pruned, folder.name, error)

    def _delete(self, top: int, path: str, pruned: Pruned) -> bool:
        folder, _, file = path.partition("/")
        try:
            with self._opened(folder, top) as descriptor:
                os.unlink(file, dir_fd=descriptor)
        except FileNotFoundError:
            # Somebody else did.
            return True
        except OSError as error:
            self._note(pruned, path, error)
            return False
        with self._lock, suppress(OSError):
            # Only when it is empty.
            os.rmdir(folder, dir_fd=top)
        return True

    def _note(self, pruned: Pruned, path: str, error: OSError) -> None:
        if not isinstance(error, FileNotFoundError) and len(pruned.problems) < _TOLD:
            pruned.problems.append(f"{self.directory / path}: {error.strerror}")


def _is_our_folder(entry: os.DirEntry[str]) -> bool:
    return bool(_OUR_FOLDER.fullmatch(entry.name)) and entry.is_dir(follow_symlinks=False)


def _is_our_file(entry: os.DirEntry[str]) -> bool:
    return bool(_OUR_FILE.fullmatch(entry.name)) and entry.is_file(follow_symlinks=False)


class Parts:
    """The files of one recording, one after the other; the constructor makes the first.

    A recording of nothing leaves no file. All of it raises OSError.
    """

    def __init__(
        self, files: CastDirectory, info: ConsoleInfo, at: float, max_size: int, max_age: float
    ) -> None:
        self.file: CastFile | None = None
        """None: all is closed."""
        self._files = files
        self._info = info
        self._max_size = max_size
        self._max_age = max_age
        self._encoder = AsciicastEncoder(info.vm_name)
        self._number = 0
        self._is_empty = True
        self.path = self._begin(at)

    def write(self, pieces: Iterable[tuple[float, Piece]]) -> bool:
        """Whether a file was finished. When it raises, all is closed; then this does nothing."""
        if self.file is None:
            return False
        finished = False
        lines = bytearray()
        try:
            for at, piece in _events(pieces):
                self._is_empty = self._is_empty and piece is None
                if piece is None:
                    lines += self._encoder.end(at)
                    self._append(lines)
                    self._close()
                    return True
                if self._is_full(at, len(lines)):
                    self._append(lines)
                    self._close()
                    self.path = self._begin(at)
                    finished = True
                if isinstance(piece, bytes):
                    lines += self._encoder.output(at, piece)
                else:
                    lines += self._encoder.marker(at, piece)
                if len(lines) > _AT_ONCE:
                    self._append(lines)
            self._append(lines)
        except BaseException:
            with suppress(OSError):
                self._close()
            raise
        return finished

    def _begin(self, at: float) -> Path:
        self._number += 1
        self.file = self._files.create(self._info, at, self._number, self._encoder.header(at))
        return self.file.path

    def _append(self, lines: bytearray) -> None:
        assert self.file is not None
        if lines:
            self.file.append(bytes(lines))
            lines.clear()

    def _close(self) -> None:
        file, self.file = self.file, None
        if file is not None:
            self._files.close(file, keep=not self._is_empty)

    def _is_full(self, at: float, unwritten: int) -> bool:
        assert self.file is not None
        size, age = self.file.size + unwritten, self._encoder.elapsed(at)
        return 0 < self._max_size <= size or 0 < self._max_age <= age


def _events(pieces: Iterable[tuple[float, Piece]]) -> Iterator[tuple[float, Piece]]:
    """The same, with output that a player shows at once anyway as one."""
    gathered: list[bytes] = []
    since = 0.0
    for at, piece in pieces:
        if gathered and not (isinstance(piece, bytes) and 0 <= at - since < _FRAME):
            yield since, b"".join(gathered)
            gathered.clear()
        if isinstance(piece, bytes):
            since = since if gathered else at
            gathered.append(piece)
        else:
            yield at, piece
    if gathered:
        yield since, b"".join(gathered)
