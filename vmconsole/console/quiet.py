"""When a console whose user will type no more may be left."""

from __future__ import annotations

from collections.abc import Callable

from twisted.internet.interfaces import IReactorTime

from vmconsole.console.attachment import Attachment

# After the client's end of input: seconds of silence both ways until the session ends, and how
# long a guest that prints without end is listened to when it takes no more input.
SILENCE = 1.0
LAST_INPUT = 5.0
_LOOK_EVERY = 0.25


def when_quiet(attachment: Attachment, clock: IReactorTime, leave: Callable[[], None]) -> None:
    """Call ``leave`` once the guest took what was typed and had time to answer; never, if the
    attachment ends before that."""
    seen = (-1, -1)
    taken_at = moved_at = clock.seconds()

    def look() -> None:
        nonlocal seen, taken_at, moved_at
        if attachment.disconnecting:
            return
        now = clock.seconds()
        unsent, printed = attachment.unsent, attachment.bytes_out
        if unsent != seen[0]:
            taken_at = now
        if (unsent, printed) != seen:
            moved_at = now
        seen = (unsent, printed)
        if now - moved_at >= SILENCE or now - taken_at >= LAST_INPUT:
            leave()
        else:
            clock.callLater(_LOOK_EVERY, look)

    look()
