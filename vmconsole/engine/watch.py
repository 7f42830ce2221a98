"""One login that is looked at again, and its open consoles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from zope.interface import implementer

from vmconsole.engine.authorized_keys import Index
from vmconsole.errors import KeyRefused
from vmconsole.interfaces import ConsoleInfo, IWatch, Role, User
from vmconsole.text import printable

Look = Literal["key", "consoles"]

# Answers running in which a VM has to be missing. While it moves from host to host an engine
# may lose sight of it for a moment.
_MISSING = 2


class _ConsoleWatch:
    def __init__(
        self, info: ConsoleInfo, revoked: Callable[[str], None], role: Callable[[Role], None]
    ) -> None:
        self.info = info
        self.role = info.role
        self.missing = 0
        self.revoked = revoked
        self.role_changed = role


@implementer(IWatch)
class Watch:
    """What Permissions knows of one login. ``stopped`` is called with it when it is over."""

    def __init__(
        self,
        blob: bytes | None,
        address: str,
        user: User,
        since: float,
        answered: float | None,
        revoked: Callable[[str], None],
        unchecked: Callable[[float | None], None],
        stopped: Callable[[Watch], None],
    ) -> None:
        self.user = user
        self.consoles: list[_ConsoleWatch] = []
        self.unconfirmed = answered
        """See IWatch."""
        self._blob = blob
        self._address = address
        self._revoked = revoked
        self._unchecked = unchecked
        self._stopped = stopped
        # When each look was last a good one, and which of them are failing.
        self._checked = {"key": since, "consoles": since}
        self._failing: set[Look] = set()

    def console(
        self, console: ConsoleInfo, revoked: Callable[[str], None], role: Callable[[Role], None]
    ) -> Callable[[], None]:
        """See IWatch."""
        watch = _ConsoleWatch(console, revoked, role)
        self.consoles.append(watch)

        def stop() -> None:
            if watch in self.consoles:
                self.consoles.remove(watch)

        return stop

    def stop(self) -> None:
        """See IWatch."""
        self._stopped(self)

    def look_at_key(self, index: Index, when: float, now: float) -> None:
        """Whether the key, or the name in the certificate, would let its user in at ``now`` (POSIX
        seconds), by what the engine was asked at ``when`` (the clock's)."""
        if self._blob is None:
            try:
                named = index.user_named((self.user.name,))
            except KeyRefused as error:
                self.revoke(f"Your certificate no longer lets you in: {error}.")
                return
            if named is None or named.id != self.user.id:
                self.revoke(
                    "Your certificate no longer lets you in: the engine does not know its user."
                )
            else:
                self.passed("key", when)
            return
        try:
            owner = index.owner(self._blob, self._address, now)
        except KeyRefused as error:
            self.revoke(f"Your key no longer lets you in: {error}.")
            return
        if owner is None or owner.user.id != self.user.id:
            self.revoke("Your key no longer lets you in: the engine does not know it as yours.")
        else:
            self.passed("key", when)

    def look_at_consoles(self, consoles: Sequence[ConsoleInfo], when: float) -> None:
        """Whether the open consoles are still among what the user may open."""
        now_open = {console.vm_id: console for console in consoles}
        for watch in list(self.consoles):
            console = now_open.get(watch.info.vm_id)
            if console is None:
                watch.missing += 1
                if watch.missing == _MISSING:
                    name = printable(watch.info.vm_name)
                    watch.revoked(f"You no longer have access to {name}.")
                continue
            watch.missing = 0
            if console.role != watch.role:
                watch.role = console.role
                watch.role_changed(console.role)
        self.passed("consoles", when)

    def passed(self, look: Look, when: float) -> None:
        """The engine gave a good answer, and all was well."""
        self._checked[look] = when
        self._no_longer_failing(look)
        if look == "key":
            self.unconfirmed = None
            if not self.consoles:
                self._no_longer_failing("consoles")

    def failed(self, look: Look) -> bool:
        """The engine gave no usable answer. Whether that is news."""
        if look in self._failing:
            return False
        if not self._failing:
            self._unchecked(self._checked[look])
        self._failing.add(look)
        return True

    def _no_longer_failing(self, look: Look) -> None:
        if look in self._failing:
            self._failing.remove(look)
            if not self._failing:
                self._unchecked(None)

    def revoke(self, reason: str) -> None:
        """See IWatch."""
        self.stop()
        try:
            for watch in list(self.consoles):
                watch.revoked(reason)
        finally:
            self._revoked(reason)
