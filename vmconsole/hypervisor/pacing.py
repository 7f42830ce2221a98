"""How fast a guest may be typed into; see law 3 in docs/architecture.md."""

from __future__ import annotations

# Bytes.
PIECE = 1024
LIMIT = 4 * PIECE
# A message costs libvirtd and the wire more than the byte that may be in it, so they count too.
_ASK_AFTER_MESSAGES = 64
_LIMIT_MESSAGES = 256


class Credit:
    """What may be sent past the host's last answer. One question at a time is under way."""

    def __init__(self) -> None:
        self.unanswered = 0
        """Bytes that were sent and that no answer confirms."""
        self._messages = 0
        self._asked: tuple[int, int] | None = None

    @property
    def is_asking(self) -> bool:
        """An answer is awaited."""
        return self._asked is not None

    @property
    def room(self) -> int:
        """How many bytes the next message may have."""
        return 0 if self._messages >= _LIMIT_MESSAGES else min(PIECE, LIMIT - self.unanswered)

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
        self._asked = (self.unanswered, self._messages)
        return True

    def answered(self) -> None:
        """The host answered: whatever was sent before it was asked has arrived there."""
        assert self._asked is not None
        size, messages = self._asked
        self._asked = None
        self.unanswered -= size
        self._messages -= messages
