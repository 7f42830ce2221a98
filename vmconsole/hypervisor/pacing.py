"""How fast a guest may be typed into; see law 3 in docs/architecture.md."""

from __future__ import annotations

# Bytes.
PIECE = 1024
LIMIT = 4 * PIECE
# A message costs libvirtd and the wire more than the byte that may be in it, so they count too.
_ASK_AFTER_MESSAGES = 64


class Credit:
    """What may be sent past the host's last answer, and when.

    One question at a time is under way, and nothing is sent meanwhile: while one thread waits for
    an answer on a connection, virStreamSend hands its message to that thread, and waits for that in
    turn. Where the thread misses the hint, as in libvirt 9, it is for the answer, or a keepalive.
    """

    def __init__(self) -> None:
        self.unanswered = 0
        """Bytes that were sent and that no answer confirms."""
        self.is_asking = False
        """An answer is awaited."""
        self._messages = 0

    @property
    def room(self) -> int:
        """How many bytes the next message may have."""
        return 0 if self.is_asking else min(PIECE, LIMIT - self.unanswered)

    def sent(self, size: int) -> None:
        """A message of so many bytes went out."""
        self.unanswered += size
        self._messages += 1

    def ask(self, now: bool = False) -> bool:
        """It is time to ask the host, and that is now done by the caller; ``now``: it is as soon
        as anything is unanswered."""
        due = self.unanswered >= PIECE or self._messages >= (1 if now else _ASK_AFTER_MESSAGES)
        if self.is_asking or not due:
            return False
        self.is_asking = True
        return True

    def answered(self) -> None:
        """The host answered: whatever was sent before it was asked has arrived there."""
        self.is_asking = False
        self.unanswered = self._messages = 0
