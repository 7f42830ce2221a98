"""What a slow party has not taken yet: bounded, the oldest bytes go first, and the gap is said."""

from __future__ import annotations

from collections import deque


class Backlog:
    """A queue of at most ``limit`` bytes of guest output.

    When it overflows, the oldest bytes are dropped; where they were, the reader gets a line that
    says how many, and output resumes at the start of a line with attributes reset.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._pieces: deque[bytes] = deque()
        self._size = 0
        self._dropped = 0

    def __len__(self) -> int:
        return self._size

    def append(self, data: bytes) -> None:
        """Add output at the end; drop what is too much at the front."""
        if len(data) > self._limit:
            self._dropped += len(data) - self._limit
            data = data[-self._limit :]
        self._pieces.append(data)
        self._size += len(data)
        while self._size > self._limit:
            excess = self._size - self._limit
            oldest = self._pieces[0]
            if len(oldest) <= excess:
                self._pieces.popleft()
                self._drop(len(oldest))
            else:
                self._pieces[0] = oldest[excess:]
                self._drop(excess)

    def take(self, size: int) -> bytes:
        """The next ``size`` bytes or fewer, ``b""`` when there are none; after a gap, its line."""
        if self._dropped:
            self._skip_to_line_start()
            notice = f"\r\n\x1b[0m[vmconsole: {self._dropped} bytes dropped]\r\n".encode()
            self._dropped = 0
            return notice
        taken = bytearray()
        while self._pieces and len(taken) < size:
            piece = self._pieces.popleft()
            room = size - len(taken)
            if len(piece) > room:
                self._pieces.appendleft(piece[room:])
                piece = piece[:room]
            taken += piece
        self._size -= len(taken)
        return bytes(taken)

    def _drop(self, count: int) -> None:
        self._size -= count
        self._dropped += count

    def _skip_to_line_start(self) -> None:
        for index, piece in enumerate(self._pieces):
            at = piece.find(b"\n")
            if at < 0:
                continue
            for _ in range(index):
                self._drop(len(self._pieces.popleft()))
            self._pieces[0] = piece[at + 1 :]
            self._drop(at + 1)
            return
