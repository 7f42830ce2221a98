"""What each user may open."""

from __future__ import annotations

from collections.abc import Sequence

from twisted.internet.interfaces import IReactorTime

from vmconsole.engine.last_answer import LastAnswer, Lifetimes, Outage
from vmconsole.interfaces import ConsoleInfo, ConsoleList, IEngine

# Consoles in the answers that are remembered, of all users together: some 60 MB.
_CAPACITY = 200_000
# Users, of more than whom it is looked once a second what can be forgotten.
_MANY = 200


class ConsoleLists:
    """The engine's answers, each user's asked for again when older than ``cache_ttl``.

    Old answers are forgotten, and the oldest ones when there are too many.
    """

    def __init__(
        self,
        engine: IEngine,
        clock: IReactorTime,
        lifetimes: Lifetimes,
        outage: Outage,
        capacity: int = _CAPACITY,
    ) -> None:
        self._engine = engine
        self._clock = clock
        self._lifetimes = lifetimes
        self._outage = outage
        self._capacity = capacity
        self._forgot = 0.0
        # The one that was used last stands last.
        self._answers: dict[str, LastAnswer[Sequence[ConsoleInfo]]] = {}

    def __len__(self) -> int:
        return len(self._answers)

    async def consoles(self, user_id: str, fresh: bool = False) -> ConsoleList:
        """See IPermissions. ``fresh`` may share a request that is under way."""
        last = self._use(user_id)
        try:
            answer = await last.get(0.0 if fresh else None, ahead=True)
        finally:
            self._forget()
        return ConsoleList(answer.value, answer.answered)

    async def fresh(self, user_id: str) -> Sequence[ConsoleInfo]:
        """What the engine just said. Raises EngineError."""
        last = self._use(user_id)
        try:
            return await last.fresh()
        finally:
            self._forget()

    def _use(self, user_id: str) -> LastAnswer[Sequence[ConsoleInfo]]:
        last = self._answers.pop(user_id, None)
        if last is None:

            async def ask(_: object) -> Sequence[ConsoleInfo]:
                return await self._engine.consoles(user_id)

            last = LastAnswer(ask, self._clock, self._lifetimes, self._outage)
        self._answers[user_id] = last
        return last

    def _forget(self) -> None:
        now = self._clock.seconds()
        if len(self._answers) > _MANY and 0 <= now - self._forgot < 1.0:
            return
        self._forgot = now
        longest = max(self._lifetimes.cache_ttl, self._lifetimes.stale_grace)
        self._answers = {
            user_id: last
            for user_id, last in self._answers.items()
            if last.in_use or last.is_younger(longest)
        }
        size = sum(len(last.value or ()) for last in self._answers.values())
        for user_id, last in list(self._answers.items()):
            if size <= self._capacity:
                break
            if not last.in_use:
                size -= len(last.value or ())
                del self._answers[user_id]
