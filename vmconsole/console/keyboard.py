"""Who of those on a console may type: one has the keyboard, others may ask for it or take it."""

from __future__ import annotations

from typing import Protocol

from twisted.internet.interfaces import IDelayedCall, IReactorTime

from vmconsole.text import lasting


class Typist(Protocol):
    """Somebody on the console, as far as the keyboard goes."""

    name: str
    """Who, and from where."""
    wants_keyboard: bool
    """Whether they did not ask to watch only."""
    typed_at: float
    """When they typed last, or got the keyboard (seconds of the clock)."""

    @property
    def may_type(self) -> bool:
        """Whether the engine lets them type."""

    def keyboard_moved(self) -> None:
        """They got the keyboard, or lost it; it is told after this."""

    def tell(self, text: str, hint: str = "") -> None:
        """Show a sentence; the hint has ``{key}`` where the escape character is meant."""


class Keyboard:
    """The keyboard of one console.

    Whoever has it and is asked for it may give it or keep it; after ``handover_idle`` seconds
    without a key it passes by itself. With ``takeover`` who asked may also take it. Several may
    ask; the first of them is served first.
    """

    def __init__(
        self, clock: IReactorTime, console: str, takeover: bool, handover_idle: float
    ) -> None:
        self.holder: Typist | None = None
        self._held_since = 0.0
        self._askers: list[Typist] = []
        self._refused: list[Typist] = []
        self._everybody: list[Typist] = []
        self._clock = clock
        self._console = console
        self._takeover = takeover
        self._handover_idle = handover_idle
        self._timer: IDelayedCall | None = None

    def join(self, who: Typist) -> None:
        """Somebody attached. The keyboard is theirs when it is free and they want it."""
        self._everybody.append(who)
        if self.holder is None and who.may_type and who.wants_keyboard:
            self._hand_to(who)
            if len(self._everybody) > 1:
                who.tell("You have the keyboard; others watch.", "{key} w lists them.")
                self._tell_others(f"{who.name} has the keyboard now.", who)
            return
        watching = "You watch." if who.may_type else f"You may only watch {self._console}."
        hint = "{key} t asks for the keyboard." if who.may_type else ""
        if self.holder is None:
            who.tell(f"{watching} Nobody has the keyboard.", hint.replace("asks for", "takes"))
        else:
            who.tell(f"{watching} {self._holder_and_idleness()}", hint)

    def leave(self, who: Typist) -> None:
        """Somebody left. The keyboard goes to who asked for it, else to who waited longest."""
        if who not in self._everybody:
            return
        self._everybody.remove(who)
        self._withdraw(who, f"{who.name} left; you keep the keyboard.")
        if who is self.holder:
            self._pass_on(f"{who.name} left.")

    def close(self) -> None:
        """The console has ended: nobody is told anything more."""
        self._everybody.clear()
        self._forget_requests()
        self.holder = None

    def may_type_changed(self, who: Typist) -> None:
        """The engine has changed the role of somebody who is here, and has been told so."""
        if not who.may_type:
            self._withdraw(who, f"{who.name} may only watch now; you keep the keyboard.")
            if who is self.holder:
                self._pass_on(f"{who.name} may only watch now.")
        elif self.holder is None and who.wants_keyboard:
            self._pass_to(who, "")
        elif self.holder is None:
            who.tell("Nobody has the keyboard.", "{key} t takes it.")
        elif self.holder is not who:
            who.tell(self._holder_and_idleness(), "{key} t asks for it.")

    def ask(self, who: Typist) -> None:
        """Somebody pressed the key that takes, asks for, or gives the keyboard."""
        if not who.may_type:
            who.tell(f"You may only watch {self._console}.")
        elif self.holder is None:
            self._pass_to(who, "")
        elif who is self.holder:
            self._give(who)
        elif who in self._askers or who in self._refused:
            self._take(who)
        elif self._idle() >= self._handover_idle:
            self._pass_to(who, f"{self.holder.name} was idle for {lasting(self._idle())}.")
        else:
            self._request(who)

    def refuse(self, who: Typist) -> None:
        """Somebody typed who does not have it: say why nothing happens."""
        if not who.may_type:
            who.tell(f"You may only watch {self._console}; what you type goes nowhere.")
        elif self.holder is None:
            who.tell("Nobody has the keyboard.", "{key} t takes it.")
        else:
            who.tell(f"You watch. {self._holder_and_idleness()}", "{key} t asks for it.")

    def keep(self, who: Typist) -> None:
        """Somebody pressed the key that keeps the keyboard."""
        if who is not self.holder:
            who.tell("You do not have the keyboard.")
        elif not self._askers:
            who.tell("Nobody has asked for the keyboard.")
        else:
            askers = list(self._askers)
            self._forget_requests()
            told = "is told" if len(askers) == 1 else "are told"
            who.tell(f"You keep the keyboard; {_names(askers)} {told}.")
            for asker in askers:
                asker.tell(f"{who.name} keeps the keyboard.", self._how_to_take())
            if self._takeover:
                self._refused = askers

    def _give(self, holder: Typist) -> None:
        if self._askers:
            self._pass_to(self._askers[0], f"{holder.name} gave it.")
        else:
            holder.tell("You have the keyboard.")

    def _take(self, who: Typist) -> None:
        if self._takeover:
            self._pass_to(who, f"{who.name} took it.")
        else:
            assert self.holder is not None
            who.tell(f"{self.holder.name} has been asked.")

    def _request(self, who: Typist) -> None:
        assert self.holder is not None
        self._askers.append(who)
        after = lasting(self._handover_idle)
        self.holder.tell(
            f"{who.name} asks for the keyboard; {after} after your last key it passes.",
            "{key} t gives it, {key} n keeps it.",
        )
        who.tell(
            f"{self._holder_and_idleness()} They were asked; {after} after their last key it "
            "passes.",
            self._how_to_take(),
        )
        if self._timer is None:
            self._wait()

    def _withdraw(self, who: Typist, why: str) -> None:
        """Somebody asks for it no longer."""
        if who in self._refused:
            self._refused.remove(who)
        if who in self._askers:
            self._askers.remove(who)
            if not self._askers and self.holder is not None:
                self._stop_waiting()
                self.holder.tell(why)

    def _how_to_take(self) -> str:
        return "{key} t again takes it." if self._takeover else ""

    def _wait(self) -> None:
        left = self._handover_idle - self._idle()
        # Less than a millisecond may be none at all for a clock that counts in floats.
        self._timer = self._clock.callLater(max(left, 0.001), self._look)

    def _look(self) -> None:
        self._timer = None
        assert self.holder is not None
        if self._idle() >= self._handover_idle:
            idle = lasting(self._idle())
            self._pass_to(self._askers[0], f"{self.holder.name} was idle for {idle}.")
        else:
            self._wait()

    def _pass_on(self, why: str) -> None:
        """Who had it may not, or is gone: whose turn it is gets it; everybody is told."""
        before, self.holder = self.holder, None
        if before in self._everybody:
            before.keyboard_moved()
        waiting = [each for each in self._everybody if each.may_type and each.wants_keyboard]
        heir = next(iter(self._askers + waiting), None)
        self._forget_requests()
        if heir is None:
            self._tell_others(f"{why} Nobody has the keyboard.", None, "{key} t takes it.", before)
            has = "Nobody has the keyboard."
        else:
            self._hand_to(heir)
            heir.tell(f"{why} You have the keyboard.")
            self._tell_others(f"{why} {heir.name} has the keyboard.", heir, but=before)
            has = f"{heir.name} has the keyboard."
        if before in self._everybody:
            before.tell(has)

    def _pass_to(self, heir: Typist, why: str) -> None:
        """Hand it over; everybody is told, and who had it, too."""
        before = self.holder
        self._forget_requests()
        self._hand_to(heir)
        if before is not None:
            before.keyboard_moved()
        heir.tell(f"{why} You have the keyboard.".lstrip())
        if before is not None:
            before.tell(
                f"{why} {heir.name} has the keyboard now; you watch.".lstrip(),
                "{key} t asks for it.",
            )
        self._tell_others(f"{why} {heir.name} has the keyboard now.".lstrip(), heir, but=before)

    def _hand_to(self, heir: Typist) -> None:
        self.holder = heir
        heir.wants_keyboard = True
        heir.typed_at = self._held_since = self._clock.seconds()
        heir.keyboard_moved()

    def _forget_requests(self) -> None:
        self._askers = []
        self._refused = []
        self._stop_waiting()

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _idle(self) -> float:
        assert self.holder is not None
        return max(0.0, self._clock.seconds() - self.holder.typed_at)

    def _holder_and_idleness(self) -> str:
        assert self.holder is not None
        held = lasting(self._clock.seconds() - self._held_since)
        return (
            f"{self.holder.name} has the keyboard, held for {held}, idle for "
            f"{lasting(self._idle())}."
        )

    def _tell_others(
        self, text: str, heir: Typist | None, hint: str = "", but: Typist | None = None
    ) -> None:
        for each in list(self._everybody):
            if each is not heir and each is not but:
                each.tell(text, hint if each.may_type else "")


def _names(several: list[Typist]) -> str:
    return ", ".join(each.name for each in several)
