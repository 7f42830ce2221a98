"""Who may log in, what they may open, and looking again while they are here."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any

from twisted.application.service import Service
from twisted.internet.defer import CancelledError, Deferred, DeferredList, DeferredSemaphore
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import LoopingCall, deferLater
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from vmconsole.clocks import posix_now
from vmconsole.engine.authorized_keys import AuthorizedKeys
from vmconsole.engine.console_lists import ConsoleLists
from vmconsole.engine.last_answer import Lifetimes, Outage
from vmconsole.engine.watch import Look, Watch
from vmconsole.errors import EngineError, EngineUnreachable
from vmconsole.interfaces import ConsoleList, IEngine, IPermissions, KeyOwner
from vmconsole.text import printable

# Users who are asked about at the same time.
_AT_ONCE = 4
# Of a period, the part over which the questions about users are spread: the last answers need
# time, too.
_SPREAD = 0.8
# Users who are named in a line of the log.
_NAMED = 10


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
        domain: str = "",
    ) -> None:
        """``domain`` is that of all users, if there is but one: it may be left out of a name."""
        self.placed_only = placed_only
        self._domain = domain
        self._clock = clock
        self._recheck = recheck
        self._outage = Outage()
        self._keys = AuthorizedKeys(engine, clock, lifetimes, self._outage)
        self._consoles = ConsoleLists(engine, clock, lifetimes, self._outage)
        self._watches: set[Watch] = set()
        self._at_once = DeferredSemaphore(_AT_ONCE)
        # Apart, so that many users with open consoles do not hold up the look at the keys.
        self._key_look = _Look("the keys", clock, self._look_at_keys)
        self._console_look = _Look("the consoles", clock, self._look_at_consoles)
        self._asked: dict[str, float] = {}
        self._trouble = ""
        self._troubled = 0.0

    async def owner(self, blob: bytes, address: str) -> KeyOwner | None:
        """See IPermissions."""
        return await self._keys.owner(blob, address)

    async def user_named(self, names: Sequence[str]) -> KeyOwner | None:
        """See IPermissions."""
        if self._domain:
            names = [
                full
                for name in names
                for full in ((name,) if "@" in name else (name, f"{name}@{self._domain}"))
            ]
        return await self._keys.user_named(names)

    async def consoles(self, user_id: str, fresh: bool = False) -> ConsoleList:
        """See IPermissions."""
        return await self._consoles.consoles(user_id, fresh)

    async def user_ids(self) -> Sequence[str]:
        """See IPermissions."""
        ids: Sequence[str] = await self._keys.user_ids()
        return ids

    def watch(
        self,
        blob: bytes | None,
        address: str,
        owner: KeyOwner,
        revoked: Callable[[str], None],
        unchecked: Callable[[float | None], None],
    ) -> Watch:
        """See IPermissions."""
        since = self._clock.seconds() if owner.answered is None else owner.answered
        watch = Watch(
            blob,
            address,
            owner.user,
            since,
            owner.answered,
            revoked,
            unchecked,
            self._watches.discard,
        )
        self._watches.add(watch)
        return watch

    def startService(self) -> None:
        """See IService."""
        super().startService()
        for look in (self._key_look, self._console_look):
            look.start(self._recheck)
        # So that the first user need not wait for it, and that what is wrong shows at once.
        Deferred.fromCoroutine(self._ask_first())

    def stopService(self) -> None:
        """See IService."""
        super().stopService()
        for look in (self._key_look, self._console_look):
            look.stop()

    async def _ask_first(self) -> None:
        try:
            index = await self._keys.fresh()
        except EngineError as error:
            self._log.warn("The engine is not of use yet: {error}", error=str(error))
        else:
            self._log.info("The engine knows {count} keys", count=len(index.users))

    async def _look_at_keys(self) -> None:
        if not self._watches:
            return
        began = self._clock.seconds()
        try:
            index = await self._keys.fresh()
        except EngineError as error:
            self._failed("key", self._watches, error)
            return
        for watch in list(self._watches):
            with self._log.failuresHandled("Looking at the key of a login"):
                watch.look_at_key(index, began, posix_now(self._clock))

    async def _look_at_consoles(self) -> None:
        users = {watch.user.id for watch in self._watches if watch.consoles}
        self._asked = {user_id: when for user_id, when in self._asked.items() if user_id in users}
        # First those who were not asked about for longest: an outage may end this early.
        order = sorted(users, key=lambda user_id: (self._asked.get(user_id, 0.0), user_id))
        began = self._clock.seconds()
        outage = _InARow()
        questions = []
        try:
            for number, user_id in enumerate(order):
                due = began + self._recheck * _SPREAD * number / len(order)
                await deferLater(self._clock, max(0.0, due - self._clock.seconds()))
                question = self._at_once.run(self._ask_for, user_id, outage)
                question.addErrback(self._broken)
                questions.append(question)
            await DeferredList(questions)
        finally:
            for question in questions:
                question.cancel()

    def _broken(self, failure: Failure) -> None:
        if not failure.check(CancelledError):
            self._log.failure("Looking at the consoles of a user", failure)

    async def _ask_for(self, user_id: str, outage: _InARow) -> None:
        if outage.failures >= _AT_ONCE:
            self._failed("consoles", self._of(user_id))
            return
        began = self._asked[user_id] = self._clock.seconds()
        try:
            consoles = await self._consoles.fresh(user_id)
        except EngineError as error:
            outage.failures += isinstance(error, EngineUnreachable)
            self._failed("consoles", self._of(user_id), error)
            return
        outage.failures = 0
        for watch in self._of(user_id):
            with self._log.failuresHandled("Looking at the consoles of a login"):
                watch.look_at_consoles(consoles, began)

    def _of(self, user_id: str) -> Sequence[Watch]:
        return [watch for watch in self._watches if watch.user.id == user_id]

    def _failed(
        self, look: Look, watches: Iterable[Watch], error: EngineError | None = None
    ) -> None:
        new = [watch for watch in list(watches) if watch.failed(look)]
        if error is None:
            return
        now = self._clock.seconds()
        # A new kind of trouble is news, too; some have numbers in them that always change.
        if new or (str(error) != self._trouble and now - self._troubled > self._recheck / 2):
            self._trouble, self._troubled = str(error), now
            self._log.warn(
                "Open sessions go on, and cannot be checked ({names}): {error}",
                names=_names(new) or "as before",
                error=str(error),
            )


def _names(watches: Iterable[Watch]) -> str:
    names = sorted({printable(watch.user.name) for watch in watches})
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


class _InARow:
    """How many questions in a row, about different users, got no answer."""

    failures = 0


class _Look:
    """Does something every so many seconds; what takes longer than that is not begun again, but
    told."""

    _log = Logger()

    def __init__(
        self,
        what: str,
        clock: IReactorTime,
        look: Callable[[], Coroutine[Deferred[Any], Any, None]],
    ) -> None:
        self._what = what
        self._clock = clock
        self._look = look
        self._loop = LoopingCall(self._begin)
        self._loop.clock = clock
        self._looking: Deferred[None] | None = None
        self._began = 0.0

    def start(self, interval: float) -> None:
        """Begin, with the first look after ``interval`` seconds."""
        self._loop.start(interval, now=False)

    def stop(self) -> None:
        """Look no more; a look that is under way is given up."""
        self._loop.stop()
        if self._looking is not None:
            self._looking.cancel()

    def _begin(self) -> None:
        now = self._clock.seconds()
        if self._looking is not None:
            self._log.warn(
                "The look at {what} of open sessions lags: one that began {seconds:.0f} s ago is "
                "not done. Is the engine slow?",
                what=self._what,
                seconds=now - self._began,
            )
            return
        self._began = now
        looking = Deferred.fromCoroutine(self._look())
        self._looking = looking
        looking.addErrback(self._failed)
        looking.addCallback(self._done)

    def _failed(self, failure: Failure) -> None:
        if not failure.check(CancelledError):
            # The next period is a new try.
            self._log.failure("Looking at {what} of open sessions", failure, what=self._what)

    def _done(self, _: None) -> None:
        self._looking = None
