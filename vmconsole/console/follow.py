"""Keeps a Console on its VM, whatever becomes of the VM and of its host."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar, cast

from twisted.internet.defer import (
    CancelledError,
    Deferred,
    DeferredSemaphore,
    FirstError,
    gatherResults,
)
from twisted.internet.endpoints import connectProtocol
from twisted.internet.interfaces import IReactorTime, IStreamClientEndpoint
from twisted.logger import Logger
from twisted.python.failure import Failure

from vmconsole.console.attachment import Attachment
from vmconsole.console.console import Console
from vmconsole.console.recording import Recording, Recordings
from vmconsole.errors import (
    ConsoleElsewhere,
    ConsoleError,
    ConsoleGone,
    ConsoleInterrupted,
    ConsoleUnavailable,
    GuestStopped,
)
from vmconsole.interfaces import ConsoleInfo, GuestNews, IConsoleEndpoints
from vmconsole.text import lasting, printable

T = TypeVar("T")
_Found = dict[Attachment, ConsoleInfo | None]

# Seconds until the next try, and so on. An engine may list a VM that moved some seconds late.
_DELAYS = (0.25, 0.5, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 3.5, 4.25, 5.0)
# A stream that was opened again, and ends within so many seconds, is not opened at once.
_BRIEF = 0.5


class Follower:
    """Opens a Console's stream, and opens it again whenever it was interrupted.

    For those who were on it when it was interrupted it is tried for ``patience`` seconds. Before
    each of these tries the engine is asked anew for each of them: where the VM stands may have
    changed, and whether they may be there. Who comes later waits for one try, or, when patient, for
    as long as it takes.
    """

    _log = Logger()

    def __init__(
        self,
        console: Console,
        endpoints: IConsoleEndpoints,
        clock: IReactorTime,
        patience: float,
        recordings: Recordings | None,
        at_once: DeferredSemaphore,
    ) -> None:
        """``at_once`` bounds how many questions all of them have for the engine at a time."""
        self.done: Deferred[None] = Deferred()
        """Fires when nobody wants the console any more, or when it is over for good."""
        self.console = console
        self._endpoints = endpoints
        self._clock = clock
        self._patience = patience
        self._recordings = recordings
        self._at_once = at_once
        self._until = 0.0
        self._failures = 0
        self._paused = False
        self._begun = False
        self._known: ConsoleInfo | None = None
        self._tried = ""
        self._by_hearsay = False
        self._pause: Deferred[None] | None = None
        self._awaited: Deferred[object] | None = None
        console.give_up = self.stop

    def stop(self) -> None:
        """Try no more."""
        # When nothing is awaited we are called from `_follow`, which looks by itself.
        if self._awaited is not None:
            self._awaited.cancel()

    def open(self, known: ConsoleInfo) -> None:
        """Open it now, if it is not open: somebody came who was just told where it stands."""
        if self.console.is_open:
            return
        self._known = known
        if not self._begun:
            self._begun = True
            following = Deferred.fromCoroutine(self._follow())
            following.addErrback(self._failed).chainDeferred(self.done)
        elif self._pause is not None:
            self._pause.callback(None)

    def guest_changed(self, news: GuestNews) -> None:
        """The guest was paused, or runs: tell it, or try now."""
        if self.console.is_open and not news.runs:
            self._paused = True
            self.console.tell(f"{self._name} {news.text}.")
        elif self.console.is_open and self._paused:
            self._paused = False
            self.console.tell(f"{self._name} runs again.")
        elif news.runs:
            # The engine may hear of it a moment later than we.
            self._failures = 0
            if self._pause is not None:
                self._pause.callback(None)

    async def _follow(self) -> None:
        while True:
            force = self._force
            try:
                await self._open(force)
            except ConsoleError as error:
                if self._somebody_knows_better or (self._force and not force):
                    # Or would take it, and came meanwhile.
                    continue
                if isinstance(error, ConsoleElsewhere) and self._by_hearsay:
                    # Of some seconds ago: the engine may know better.
                    self._known = None
                    continue
                self._known = None
                self._not_opened(error)
                if not self.console.attachments:
                    return
            else:
                self._paused = False
                opened = self._clock.seconds()
                is_first = not self._until
                if not self._interrupted(await self._result_of(self.console.ended)):
                    return
                if is_first or self._clock.seconds() - opened >= _BRIEF:
                    self._failures = 0
                    continue
            delay = _DELAYS[min(self._failures, len(_DELAYS) - 1)]
            self._failures += 1
            await self._wait(delay)

    @property
    def _somebody_knows_better(self) -> bool:
        return self._known is not None and self._known.host != self._tried

    @property
    def _force(self) -> bool:
        # Never by somebody from whom it was taken.
        return any(each.force and not each.has_begun for each in self.console.attachments)

    async def _open(self, force: bool) -> None:
        """Raises ConsoleError."""
        console = self.console
        known, self._known = self._known, None
        found = await self._locate(
            each
            for each in console.attachments
            if each.has_begun or each.has_waited or known is None
        )
        if found and not any(found.values()):
            # What who came last knows may be of some seconds ago.
            found |= await self._locate(each for each in console.attachments if each not in found)
            known = None
        place = next((info for info in found.values() if info is not None), known)
        if place is None:
            raise ConsoleUnavailable(f"{self._name} is not there: not running, or gone.")
        # A VM that moves may be missing for a moment: one more look.
        found |= await self._locate(each for each, info in found.items() if info is None)
        self._tried, self._by_hearsay = place.host, place is known
        endpoint = self._endpoints.console_endpoint(place, force)
        recording = console.recording = await self._record(place)
        try:
            await self._result_of(connectProtocol(cast(IStreamClientEndpoint, endpoint), console))
        except BaseException:
            if recording is not None:
                recording.close()
            console.recording = None
            raise
        self._known = None
        self._admit(found)
        console.begin(place)

    async def _locate(self, attachments: Iterable[Attachment]) -> _Found:
        asked = list(attachments)
        questions = [self._at_once.run(each.locate) for each in asked]
        answers = gatherResults(questions, consumeErrors=True)
        try:
            found: list[ConsoleInfo | None] = await self._result_of(answers)
        except FirstError as error:
            error.subFailure.raiseException()
        return dict(zip(asked, found, strict=True))

    async def _record(self, place: ConsoleInfo) -> Recording | None:
        """Raises ConsoleError when there must be a recording, and there can be none."""
        if self._recordings is None:
            return None
        try:
            recording = await self._result_of(self._recordings.open(place))
        except ConsoleError:
            if self._recordings.required:
                raise
            return None
        recording.failed.addCallback(self._recording_failed, recording)
        return recording

    def _recording_failed(self, why: str, recording: Recording) -> None:
        if self.console.recording is recording:
            self.console.recording = None
            if self._recordings is not None and self._recordings.required:
                self.console.end(Failure(ConsoleGone(why)))
            else:
                self.console.tell(why)

    def _admit(self, found: _Found) -> None:
        for attachment, info in found.items():
            if attachment in self.console.attachments:
                if info is None:
                    attachment.revoke(f"You no longer have access to {self._name}.")
                else:
                    attachment.change_role(info.role)

    def _not_opened(self, error: ConsoleError) -> None:
        late = self._clock.seconds() >= self._until
        for attachment in list(self.console.attachments):
            if not attachment.has_begun:
                attachment.refuse(error)
            elif late:
                attachment.revoke(
                    f"{self._name} did not come back within {lasting(self._patience)}. {error}"
                )

    def _interrupted(self, reason: BaseException) -> bool:
        """Whether it is to be opened again."""
        if not isinstance(reason, ConsoleInterrupted) or not self._patience:
            self.console.end(Failure(reason))
        if isinstance(reason, GuestStopped):
            self.console.scrollback.restart()
        self._until = self._clock.seconds() + self._patience
        for attachment in list(self.console.attachments):
            if attachment.has_begun:
                attachment.interrupt(cast(ConsoleInterrupted, reason), self._patience)
            else:
                attachment.refuse(cast(ConsoleInterrupted, reason))
        return bool(self.console.attachments)

    async def _wait(self, seconds: float) -> None:
        left = self._until - self._clock.seconds()
        self._pause = Deferred()
        self._pause.addTimeout(min(seconds, left) if left > 0 else seconds, self._clock, _elapsed)
        try:
            await self._result_of(self._pause)
        finally:
            self._pause = None

    async def _result_of(self, deferred: Deferred[T]) -> T:
        """Await it; ``stop`` cancels it."""
        self._awaited = cast(Deferred[object], deferred)
        try:
            return await deferred
        finally:
            self._awaited = None

    def _failed(self, failure: Failure) -> None:
        if not failure.check(CancelledError):
            self._log.failure("following {vm} failed", failure, vm=self._name)
            text = "Something went wrong in the proxy; this is its own fault. Its log tells more."
            self.console.end(Failure(ConsoleGone(text)))

    @property
    def _name(self) -> str:
        return printable(self.console.info.vm_name)


def _elapsed(_result: object, _seconds: float) -> None:
    """The pause is over."""
