"""BREAK and SysRq, for who has the keyboard."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from vmconsole.console.attachment import Attachment
from vmconsole.console.pool import ConsolePool
from vmconsole.errors import ConsoleError
from vmconsole.text import printable


class GuestControl:
    """Sends them by way of the guest's host, for one user, who is told by ``say`` what came of it.

    ``refuse`` rings the bell, and calls what it is given if the user does not know why yet.
    """

    _log = Logger()

    def __init__(
        self,
        pool: ConsolePool,
        clock: IReactorTime,
        say: Callable[[str], None],
        refuse: Callable[[Callable[[], None]], None],
    ) -> None:
        self._pool = pool
        self._clock = clock
        self._say = say
        self._refuse = refuse

    def send_break(self, attachment: Attachment) -> None:
        """Send BREAK."""
        self._control(attachment, "BREAK", partial(self._pool.send_break, attachment.console.info))

    def send_sysrq(self, attachment: Attachment, key: str) -> None:
        """Send SysRq, and a key."""
        send = partial(self._pool.send_sysrq, attachment.console.info, key)
        self._control(attachment, f"SysRq {key}", send)

    def _control(
        self, attachment: Attachment, what: str, send: Callable[[], Awaitable[bytes | None]]
    ) -> None:
        if not attachment.console.is_open:
            name = printable(attachment.console.info.vm_name)
            self._refuse(partial(self._say, f"{name} is away: {what} cannot be sent."))
        elif not attachment.has_keyboard:
            attachment.console.keyboard.refuse(attachment)
        elif attachment.console.is_input_held:
            self._refuse(lambda: None)
        else:
            attachment.typed_at = self._clock.seconds()
            done = Deferred.fromCoroutine(self._send(attachment, what, send))
            done.addErrback(lambda failure: self._log.failure("{what} failed", failure, what=what))

    async def _send(
        self, attachment: Attachment, what: str, send: Callable[[], Awaitable[bytes | None]]
    ) -> None:
        # Between BREAK and the key that completes a SysRq nobody may type anything else.
        typed = None
        held = attachment.console.hold_input()
        try:
            typed = await send()
            told = f"{what} was sent."
        except ConsoleError as error:
            told = str(error)
        finally:
            attachment.console.release_input(held, typed or b"")
        if not attachment.disconnecting:
            self._say(told)
