"""Who may log in, what they may open, and looking again while they are here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from twisted.application.service import Service
from twisted.internet.defer import CancelledError, Deferred, DeferredSemaphore, gatherResults
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import LoopingCall, deferLater
from twisted.logger import Logger
from zope.interface import implementer

from vmconsole.engine.authorized_keys import AuthorizedKeys, Index
from vmconsole.engine.console_lists import ConsoleLists
from vmconsole.engine.last_answer import Lifetimes, Outage
from vmconsole.engine.watch import Watch
from vmconsole.errors import EngineError
from vmconsole.interfaces import ConsoleList, IEngine, IPermissions, KeyOwner
from vmconsole.text import printable

# Users who are asked about at the same time.
_AT_ONCE = 4
# Of a period, the part over which the questions about users are spread: the last answers need
# time, too.
_SPREAD = 0.8


@implementer(IPermissions)
class Permissions(Service):
    """Asks ``engine``, remembers its answers, and looks again every ``recheck`` seconds.

    A period has one question for the keys, and one for each user with an open console. Only a
    fresh, successful answer revokes: an outage, or an answer that is no use, ends nothing.
    """

    _log = Logger()

    def __init__(
        self,
        engine: IEngine,
        clock: IReactorTime,
        lifetimes: Lifetimes,
        recheck: float,
        placed_only: bool,
    ) -> None:
        self.placed_only = placed_only
        self._clock = clock
        self._recheck = recheck
        self._outage = Outage()
        self._keys = AuthorizedKeys(engine, clock, lifetimes, self._outage)
        self._consoles = ConsoleLists(engine, clock, lifetimes, self._outage)
        self._watches: set[Watch] = set()
        self._at_once = DeferredSemaphore(_AT_ONCE)
        self._loop = LoopingCall(self._look)
        self._loop.clock = clock
        self._looking: Deferred[None] | None = None
        self._trouble = ""

    async def owner(self, blob: bytes, address: str) -> KeyOwner | None:
        """See IPermissions."""
        return await self._keys.owner(blob, address)

    async def consoles(self, user_id: str, fresh: bool = False) -> ConsoleList:
        """See IPermissions."""
        return await self._consoles.consoles(user_id, fresh)

    def watch(
        self,
        blob: bytes,
        address: str,
        owner: KeyOwner,
        revoked: Callable[[str], None],
        unchecked: Callable[[float | None], None],
    ) -> Watch:
        """See IPermissions."""
        since = self._clock.seconds() if owner.answered is None else owner.answered
        watch = Watch(blob, address, owner.user, since, revoked, unchecked, self._watches.discard)
        self._watches.add(watch)
        return watch

    def startService(self) -> None:
        """See IService."""
        super().startService()
        self._loop.start(self._recheck, now=False)
        # So that the first user need not wait for it, and that what is wrong shows at once.
        Deferred.fromCoroutine(self._ask_first())

    def stopService(self) -> None:
        """See IService."""
        super().stopService()
        self._loop.stop()
        if self._looking is not None:
            self._looking.cancel()

    async def _ask_first(self) -> None:
        try:
            index = await self._keys.fresh()
        except EngineError as error:
            self._log.warn("The engine is not of use yet: {error}", error=str(error))
        else:
            self._log.info("The engine knows {count} keys", count=len(index.users))

    def _look(self) -> Deferred[None]:
        self._looking = Deferred.fromCoroutine(self._look_at_all())

        def done(result: Any) -> None:
            self._looking = None
            if result is not None and not result.check(CancelledError):
                # The next period is a new try.
                self._log.failure("Looking at the permissions of open sessions", result)

        return self._looking.addBoth(done)

    async def _look_at_all(self) -> None:
        began = self._clock.seconds()
        if not self._watches:
            return
        try:
            index = await self._keys.fresh()
        except EngineError as error:
            self._failed(self._watches, error)
            return
        self._look_at_keys(index, began)
        users = sorted({watch.user.id for watch in self._watches if watch.consoles})
        questions = []
        try:
            for number, user_id in enumerate(users):
                due = began + self._recheck * _SPREAD * number / len(users)
                await deferLater(self._clock, max(0.0, due - self._clock.seconds()))
                questions.append(self._at_once.run(partial(self._ask_for, user_id, began)))
            await gatherResults(questions, consumeErrors=True)
        finally:
            for question in questions:
                question.addErrback(lambda _: None)
                question.cancel()
        took = self._clock.seconds() - began
        if took > self._recheck:
            self._log.warn(
                "The look at the permissions of {users} users with open consoles took {took:.1f} "
                "s, and engine.recheck is {recheck:g} s: it lags. Is the engine slow?",
                users=len(users),
                took=took,
                recheck=self._recheck,
            )

    def _look_at_keys(self, index: Index, now: float) -> None:
        for watch in list(self._watches):
            watch.look_at_key(index, now)
            if not watch.consoles and watch in self._watches:
                watch.passed(now)

    def _ask_for(self, user_id: str, began: float) -> Deferred[None]:
        return Deferred.fromCoroutine(self._look_at_consoles(user_id, began))

    async def _look_at_consoles(self, user_id: str, began: float) -> None:
        # The answer to the first of these questions may have told that nobody answers any more.
        if self._outage.known:
            self._failed(self._of(user_id))
            return
        try:
            consoles = await self._consoles.fresh(user_id)
        except EngineError as error:
            self._failed(self._of(user_id), error)
            return
        for watch in self._of(user_id):
            watch.look_at_consoles(consoles)
            watch.passed(began)

    def _of(self, user_id: str) -> Sequence[Watch]:
        return [watch for watch in self._watches if watch.user.id == user_id]

    def _failed(
        self, watches: set[Watch] | Sequence[Watch], error: EngineError | None = None
    ) -> None:
        new = [watch for watch in watches if watch.failed()]
        if error is not None and (new or str(error) != self._trouble):
            self._trouble = str(error)
            self._log.warn(
                "Open sessions go on, and cannot be checked ({names}): {error}",
                names=", ".join(sorted({printable(watch.user.name) for watch in new or watches})),
                error=str(error),
            )
