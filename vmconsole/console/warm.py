"""Consoles that are held open with nobody on them, so that what their guests print is kept."""

from __future__ import annotations

from collections.abc import Sequence

from twisted.application.service import Service
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.internet.protocol import Protocol
from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from vmconsole.console.attachment import Attachment, Party
from vmconsole.console.choice import matching_names, still_listed
from vmconsole.console.pool import ConsolePool
from vmconsole.errors import ConsoleError, ConsoleInterrupted, EngineError, EngineUnreachable
from vmconsole.interfaces import ConsoleInfo, GuestNews, IGuestObserver, IPermissions, Role
from vmconsole.text import printable

# Seconds from the end of one round through all users to the next; after one that failed; and from
# user to user.
_ROUND = 60.0
_RETRY = 5.0
_PACE = 0.02
# When a guest has started: the engine may hear of it a moment later.
_STARTED = (0.25, 1.0, 4.0)


@implementer(IGuestObserver)
class WarmConsoles(Service):
    """Attaches to the console of each VM whose name matches one of ``patterns`` and that some user
    with a key may open: an engine tells of VMs only by their users.

    It goes through the users round by round, 50 in a second at most, and when a guest has started.
    What cannot be opened is tried again in the next round; what the engine knows cannot be, once it
    says so no more.
    """

    name = "warm consoles"
    _log = Logger()

    def __init__(
        self,
        permissions: IPermissions,
        pool: ConsolePool,
        clock: IReactorTime,
        patterns: Sequence[str],
    ) -> None:
        self._permissions = permissions
        self._pool = pool
        self._clock = clock
        self._patterns = patterns
        self._kept: dict[str, _Keeper] = {}
        self._failed: dict[str, str] = {}
        # VMs of the last round whose names do not match.
        self._ignored: set[str] = set()
        self._trouble = ""
        self._pause: Deferred[None] | None = None
        self._soon: list[float] = []
        self._running: Deferred[None] | None = None

    def startService(self) -> None:
        """See IService."""
        super().startService()
        self._running = Deferred.fromCoroutine(self._keep())
        self._running.addErrback(self._stopped)

    def stopService(self) -> None:
        """See IService."""
        super().stopService()
        if self._running is not None:
            self._running.cancel()
        for keeper in list(self._kept.values()):
            keeper.leave()

    def guest_changed(self, vm_id: str, news: GuestNews) -> None:
        """See IGuestObserver; the consoles are told, too."""
        self._pool.guest_changed(vm_id, news)
        known = vm_id in self._kept or vm_id in self._ignored
        if news.runs and not known and self.running:
            self._soon = list(_STARTED)
            if self._pause is not None:
                self._pause.callback(None)

    async def _keep(self) -> None:
        while True:
            try:
                await self._round()
                seconds = _ROUND
                self._trouble = ""
            except EngineError as error:
                if not self._trouble:
                    self._trouble = str(error)
                    self._log.warn("Warm consoles wait for the engine: {error}", error=str(error))
                seconds = _RETRY
            except CancelledError:
                raise
            except Exception:
                self._log.failure("looking for consoles to keep warm")
                seconds = _ROUND
            if not self._soon:
                self._pause = Deferred()
                self._pause.addTimeout(seconds, self._clock, lambda _result, _seconds: None)
                try:
                    await self._pause
                finally:
                    self._pause = None
            if self._soon:
                await deferLater(self._clock, self._soon.pop(0))

    async def _round(self) -> None:
        """Raises EngineError."""
        ignored: set[str] = set()
        for user_id in await self._permissions.user_ids():
            try:
                listed = await self._permissions.consoles(user_id, fresh=True)
            except EngineUnreachable:
                raise
            except EngineError as error:
                # That is about this user alone.
                if self._failed.get(user_id) != str(error):
                    self._failed[user_id] = str(error)
                    self._log.warn(
                        "No console of the user {id} is kept warm now: {error}",
                        id=printable(user_id),
                        error=str(error),
                    )
            else:
                wanted = matching_names(listed.consoles, self._patterns)
                ignored |= {vm.vm_id for vm in listed.consoles} - {vm.vm_id for vm in wanted}
                for info in wanted:
                    if not info.host or info.vm_id in self._kept:
                        continue
                    if info.problem:
                        # To try it would fail in each round, until the engine tells otherwise.
                        self._not_warm(info, printable(info.problem))
                    else:
                        self._open(info, user_id)
            await deferLater(self._clock, _PACE)
        self._ignored = ignored

    def _open(self, info: ConsoleInfo, user_id: str) -> None:
        keeper = _Keeper(self._permissions, info, user_id)
        self._kept[info.vm_id] = keeper
        party = Party("vmconsole", "", watch=True, hidden=True, access=keeper)
        keeper.attaching = Deferred.fromCoroutine(self._pool.attach(info, party, keeper))
        keeper.attaching.addCallbacks(
            self._opened, self._not_opened, callbackArgs=(info,), errbackArgs=(info,)
        )
        keeper.left.addCallback(lambda _: self._kept.pop(info.vm_id))

    def _opened(self, _attachment: Attachment, info: ConsoleInfo) -> None:
        self._failed.pop(info.vm_id, None)
        self._log.info("The console of {vm} is kept warm", vm=printable(info.vm_name))

    def _not_opened(self, failure: Failure, info: ConsoleInfo) -> None:
        self._kept[info.vm_id].left.callback(None)
        if failure.check(CancelledError):
            return
        failure.trap(ConsoleError)
        self._not_warm(info, failure.getErrorMessage())

    def _not_warm(self, info: ConsoleInfo, error: str) -> None:
        if self._failed.get(info.vm_id) != error:
            self._failed[info.vm_id] = error
            self._log.info(
                "The console of {vm} is not warm: {error}",
                vm=printable(info.vm_name),
                error=error,
            )

    def _stopped(self, failure: Failure) -> None:
        if not failure.check(CancelledError):
            self._log.failure("keeping consoles warm", failure)


class _Keeper(Protocol):
    """The protocol on the Attachment to a warm console, and its IAccess, for one of its users."""

    attaching: Deferred[Attachment]

    def __init__(self, permissions: IPermissions, info: ConsoleInfo, user_id: str) -> None:
        self._permissions = permissions
        self._info = info
        self._user_id = user_id
        self.left: Deferred[None] = Deferred()

    def connectionLost(self, reason: Failure | None = None) -> None:
        """The console is over, or was left."""
        self.left.callback(None)

    def leave(self) -> None:
        """Keep it no longer."""
        if self.transport is None:
            self.attaching.cancel()
        else:
            self.transport.loseConnection()

    # --- IAccess

    async def locate(self) -> ConsoleInfo | None:
        """See IAccess."""
        found = await self._permissions.consoles(self._user_id, fresh=True)
        return still_listed(found, self._info.vm_id)

    def begin(self, attachment: Attachment) -> None:
        """See IAccess."""

    def pause(self, reason: str) -> None:
        """See IAccess."""

    # --- IScreen

    def begun(self) -> None:
        """See IScreen."""

    def tell(self, text: str, hint: str = "") -> None:
        """See IScreen."""

    def waiting(self, reason: str) -> None:
        """See IScreen."""

    def interrupted(self, reason: ConsoleInterrupted, patience: float) -> None:
        """See IScreen."""

    def resumed(self) -> None:
        """See IScreen."""

    def revoked(self, reason: str) -> None:
        """See IScreen."""
        self.leave()

    def role_changed(self, role: Role) -> None:
        """See IScreen."""
