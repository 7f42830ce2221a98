"""Recordings of consoles: what their guests printed, and who came and went."""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from twisted.application.service import Service
from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.defer import TimeoutError as DeferredTimeout
from twisted.internet.interfaces import IDelayedCall
from twisted.internet.threads import deferToThreadPool
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.python.threadpool import ThreadPool

from vmconsole.clocks import posix_clock, posix_now
from vmconsole.console.castfiles import CastDirectory, Parts, Piece, Pruned
from vmconsole.console.recording_failures import cure, reason, unavailable
from vmconsole.errors import ConsoleUnavailable
from vmconsole.interfaces import ConsoleInfo
from vmconsole.text import printable
from vmconsole.threads import DaemonThreadPool

T = TypeVar("T")
# Seconds that output waits to be written, so that a lot of it is one write.
_GATHER = 0.25
# Bytes: who has more than the first of them waiting is not left to wait; and all together may
# have as much as the second, when the disk stalls.
_PRESSED = 256 * 1024
_LIMIT = 64 * 1024 * 1024
# What a piece takes of memory beside its bytes.
_PIECE = 150
# One writes, one deletes, and the others make files.
_THREADS = 4
_OPEN_SECONDS = 10.0
_STOP_SECONDS = 5.0
# Seconds until old recordings are deleted: after the last time, and after a file was finished.
_PRUNE_LATER = 300.0
_PRUNE_SOON = 5.0


class Recording:
    """One opening of a console. What is to be recorded waits in memory until a thread takes it."""

    def __init__(self, recordings: Recordings, parts: Parts, seconds: Callable[[], float]) -> None:
        self.failed: Deferred[str] = Deferred()
        """Fires when nothing more is recorded, with a sentence for users that says why."""
        self.is_due = False
        """Whether it will be written soon."""
        self._recordings = recordings
        self._parts = parts
        self._seconds = seconds
        self._pieces: deque[tuple[float, Piece]] = deque()
        self._ended = False
        self._dropped = False
        # The first is changed by the reactor's thread alone, the second by the other one.
        self._added = 0
        self._written = 0

    def write(self, data: bytes) -> None:
        """The guest printed."""
        self._add(data)

    def mark(self, label: str) -> None:
        """Something happened that a player can jump to."""
        self._add(label)

    def close(self) -> None:
        """The console was closed: the file is finished soon."""
        if not self._ended:
            self._ended = True
            self._append(None)

    def drop(self) -> None:
        """Record no more, and forget what waits."""
        self._ended = self._dropped = True
        self._pieces.clear()
        self._append(None)

    def fail(self, reason: str) -> None:
        """Record no more, and tell why."""
        self.drop()
        self.failed.callback(f"This console is not recorded any more: {reason}.")

    @property
    def path(self) -> Path:
        """The file, the last one that was begun."""
        return self._parts.path

    @property
    def waiting(self) -> int:
        """Bytes of memory that wait to be written."""
        return 0 if self._dropped else self._added - self._written

    @property
    def is_finished(self) -> bool:
        """Whether the file is closed."""
        return self._parts.file is None

    def write_out(self) -> bool:
        """In a thread: write what waits. Whether a file was finished. Raises OSError."""
        pieces: list[tuple[float, Piece]] = []
        # The other thread may take them away.
        with suppress(IndexError):
            while True:
                pieces.append(self._pieces.popleft())
        finished = self._parts.write(pieces)
        self._written += sum(len(piece or b"") + _PIECE for _, piece in pieces)
        return finished

    def _add(self, piece: bytes | str) -> None:
        # Every byte of every guest comes by here: it is noted, and that is all.
        if not self._ended:
            size = self._append(piece)
            if self._recordings.is_too_much(size) or self._added - self._written > _PRESSED:
                self._recordings.press(self)

    def _append(self, piece: Piece) -> int:
        self._pieces.append((self._seconds(), piece))
        size = _PIECE + (len(piece) if piece else 0)
        self._added += size
        if not self.is_due:
            self.is_due = True
            self._recordings.schedule(self)
        return size


class Recordings(Service):
    """Records consoles in ``directory``, each file for the service's user alone.

    After ``max_size`` bytes, or when a file covers ``max_age`` seconds, the next output begins
    another file. ``retain_age`` and ``retain_bytes``: see CastDirectory. 0: there is no limit.
    ``required`` is for who opens consoles to heed. ``write`` is os.write.
    """

    _log = Logger()

    def __init__(
        self,
        reactor: Any,
        directory: Path,
        *,
        required: bool = False,
        max_size: int = 0,
        max_age: float = 0.0,
        retain_age: float = 0.0,
        retain_bytes: int = 0,
        make_pool: Callable[[int, int, str], ThreadPool] | None = None,
        write: Callable[[int, bytes], int] = os.write,
    ) -> None:
        self.required = required
        self._reactor = reactor
        self._files = CastDirectory(directory, retain_age, retain_bytes, write)
        self._max_size = max_size
        self._max_age = max_age
        self._make_pool = make_pool or DaemonThreadPool
        self._pool: ThreadPool | None = None
        self._jobs = 0
        self._recordings: set[Recording] = set()
        self._due: list[Recording] = []
        self._next_write: IDelayedCall | None = None
        self._is_writing = False
        # Bytes of memory, as far as was counted since the last time that something was written.
        self._waiting = 0
        # Openings that the disk has not answered in time.
        self._overdue = 0
        self._trouble = ""
        self._next_prune: IDelayedCall | None = None
        self._prune_delay = _PRUNE_LATER
        self._stopped: Deferred[None] | None = None

    def startService(self) -> None:
        """See IService. Also deletes what is not to be retained, now and from then on."""
        super().startService()
        self._pool = self._make_pool(0, _THREADS, "recordings")
        self._pool.start()
        self._prune()

    def stopService(self) -> Deferred[None]:
        """See IService. Fires when all files are finished, or after some seconds without that."""
        super().stopService()
        if self._pool is None:
            return succeed(None)
        stopped: Deferred[None] = Deferred()
        self._stopped = stopped
        if self._next_prune is not None and self._next_prune.active():
            self._next_prune.cancel()
        for recording in tuple(self._recordings):
            recording.close()
        self._write()
        self._end_if_idle()
        stopped.addTimeout(_STOP_SECONDS, self._reactor)
        return stopped.addErrback(self._say_unfinished)

    def open(self, info: ConsoleInfo) -> Deferred[Recording]:
        """A new file for one opening of a console. Fails with ConsoleUnavailable."""
        if not self.running:
            return fail(ConsoleUnavailable("vmconsole is stopping."))
        opened: Deferred[Recording] = Deferred()
        overdue = False
        name = printable(info.vm_name)

        def failed(error: Exception) -> ConsoleUnavailable:
            # Not for each try of each console.
            if reason(error) != self._trouble:
                self._trouble = reason(error)
                self._say_failed(f"No recording of {name} can be made", error)
            return unavailable(reason(error))

        def made(parts: Parts | Exception) -> None:
            self._overdue -= overdue
            if isinstance(parts, Exception):
                opened.errback(failed(parts))
                return
            self._trouble = ""
            recording = Recording(self, parts, posix_clock(self._reactor))
            self._recordings.add(recording)
            # Nobody waits for it any more, perhaps.
            if opened.called or not self.running:
                recording.close()
            opened.callback(recording)

        def too_late(_: object, limit: float) -> Recording:
            nonlocal overdue
            overdue = True
            self._overdue += 1
            raise failed(_silent())

        if self._overdue:
            return fail(failed(_silent()))
        self._run(partial(self._make, info, posix_now(self._reactor)), made)
        return opened.addTimeout(_OPEN_SECONDS, self._reactor, too_late)

    # --- for Recording

    def schedule(self, recording: Recording) -> None:
        """It has something to write: not yet, since more may follow."""
        self._due.append(recording)
        self._write_soon()

    def is_too_much(self, size: int) -> bool:
        """So many bytes more wait: whether that is more than all together may have."""
        self._waiting += size
        return self._waiting > _LIMIT

    def press(self, recording: Recording) -> None:
        """It has a lot to write, or all have: no more may follow before that begins."""
        if not self._is_writing:
            self._write()
        elif sum(each.waiting for each in self._recordings) > _LIMIT:
            recording.drop()
            error = OSError(errno.ETIMEDOUT, "The disk is too slow")
            # Who writes just now does not expect to be told.
            self._reactor.callLater(0, self._end, recording, error)

    # --- writing, one job at a time

    def _write_soon(self) -> None:
        if self._due and not self._is_writing and self._next_write is None:
            delay = _GATHER if self.running else 0
            self._next_write = self._reactor.callLater(delay, self._write)

    def _write(self) -> None:
        if self._next_write is not None and self._next_write.active():
            self._next_write.cancel()
        self._next_write = None
        if self._is_writing or not self._due:
            return
        due, self._due = self._due, []
        for recording in due:
            recording.is_due = False
        self._is_writing = True
        self._run(partial(_write_out, due), self._wrote)

    def _wrote(self, outcome: Sequence[tuple[Recording, bool, Exception | None]]) -> None:
        self._is_writing = False
        self._waiting = sum(each.waiting for each in self._recordings)
        for recording, finished, error in outcome:
            if error is not None:
                self._end(recording, error)
            if recording.is_finished:
                self._recordings.discard(recording)
            if finished:
                self._prune_soon()
        self._write_soon()

    def _end(self, recording: Recording, error: Exception) -> None:
        # It may be too slow at first, and then full.
        if not recording.failed.called:
            self._say_failed(f"The recording {recording.path} ended", error)
            recording.fail(reason(error))

    def _make(self, info: ConsoleInfo, at: float) -> Parts | Exception:
        try:
            return Parts(self._files, info, at, self._max_size, self._max_age)
        except Exception as error:
            return error

    # --- retention

    def _prune(self) -> None:
        self._next_prune = None
        self._run(partial(self._look, posix_now(self._reactor)), self._looked)

    def _prune_soon(self) -> None:
        soon = self._reactor.seconds() + _PRUNE_SOON
        if self._next_prune is None:
            self._prune_delay = _PRUNE_SOON
        elif self._next_prune.active() and self._next_prune.getTime() > soon:
            self._next_prune.reset(_PRUNE_SOON)

    def _look(self, now: float) -> Pruned | Exception:
        try:
            self._files.make()
            return self._files.prune(now, lambda: not self.running)
        except Exception as error:
            return error

    def _looked(self, pruned: Pruned | Exception) -> None:
        if isinstance(pruned, Exception):
            self._say_failed("The directory of recordings cannot be used", pruned)
        else:
            for problem in pruned.problems:
                self._log.error("An old recording is not deleted: {problem}", problem=problem)
            if pruned.files:
                self._log.info(
                    "{files} old recordings deleted, {size} bytes",
                    files=pruned.files,
                    size=pruned.size,
                )
        if self.running:
            self._next_prune = self._reactor.callLater(self._prune_delay, self._prune)
            self._prune_delay = _PRUNE_LATER

    # --- threads

    def _run(self, function: Callable[[], T], done: Callable[[T], None]) -> None:
        assert self._pool is not None
        self._jobs += 1
        result = deferToThreadPool(self._reactor, self._pool, function)
        result.addCallback(done)
        result.addErrback(lambda failure: self._log.failure("Recording", failure))
        result.addBoth(self._ran)

    def _ran(self, _: object) -> None:
        self._jobs -= 1
        self._end_if_idle()

    def _end_if_idle(self) -> None:
        if self._stopped is None or self._stopped.called or self._jobs or self._due:
            return
        assert self._pool is not None
        # Its threads have nothing to do: this waits for nothing.
        self._pool.stop()
        self._pool = None
        self._stopped.callback(None)

    def _say_unfinished(self, failure: Failure) -> None:
        failure.trap(DeferredTimeout)
        self._log.error(
            "{count} recordings may lack their end, which {directory} did not take in {limit:g} s",
            count=len(self._recordings),
            directory=str(self._files.directory),
            limit=_STOP_SECONDS,
        )

    def _say_failed(self, what: str, error: Exception) -> None:
        self._log.critical(
            "{what}: {reason}. {cure}",
            what=what,
            reason=reason(error),
            cure=cure(error, self._files.directory),
        )


def _write_out(due: Sequence[Recording]) -> list[tuple[Recording, bool, Exception | None]]:
    outcome: list[tuple[Recording, bool, Exception | None]] = []
    for recording in due:
        try:
            outcome.append((recording, recording.write_out(), None))
        except Exception as error:
            outcome.append((recording, True, error))
    return outcome


def _silent() -> OSError:
    return OSError(errno.ETIMEDOUT, f"The disk did not answer within {_OPEN_SECONDS:g} s")
