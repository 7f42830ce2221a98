"""The account of the channels of one connection: windows, replies, ends (RFC 4254)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from tests.fuzz.keyring import Reader

OPEN, OPENED, OPEN_FAILED, ADJUST, DATA, EXTENDED = 90, 91, 92, 93, 94, 95
EOF, CLOSE, REQUEST, SUCCESS, FAILURE = 96, 97, 98, 99, 100
_STDERR = 1
_MAX_WINDOW = 2**32 - 1
# Requests on a session that may be granted here, when their data is right.
_SOMETIMES = {b"pty-req", b"env", b"window-change", b"break", b"signal", b"shell", b"exec"}


class Wrong(Exception):
    """The server did what it must not do; ``oracle`` names the rule."""

    def __init__(self, oracle: str, what: str) -> None:
        super().__init__(f"{oracle}: {what}")
        self.oracle = oracle


class Owed(NamedTuple):
    """One reply that is due: which it may be, and whether it must come at all."""

    allowed: frozenset[int]
    required: bool
    starts: bool = False
    """It was asked for a shell or a command."""


def take(queue: deque[Owed], number: int) -> Owed:
    """Strike out what message ``number`` answers. Raises Wrong when it answers nothing."""
    while queue:
        owed = queue.popleft()
        if number in owed.allowed:
            return owed
        if owed.required:
            raise Wrong("reply", f"message {number}, where {sorted(owed.allowed)} is due")
    raise Wrong("reply", f"message {number} answers nothing")


def settle(queue: deque[Owed], vague: bool, what: str) -> None:
    """The server has had its turn. Raises Wrong when a reply did not come."""
    missing = [owed for owed in queue if owed.required]
    queue.clear()
    if missing and not vague:
        raise Wrong("unanswered", f"{what}: no reply of {sorted(missing[0].allowed)}")


class Channel:
    """One channel that the server has confirmed."""

    def __init__(self, client_number: int, window: int, max_packet: int) -> None:
        self.client_number = client_number
        self.window = window
        """Bytes that the server may send."""
        self.max_packet = max(1, max_packet)
        self.credit = 0
        """Bytes that the client may send, of at most ``most_credit``, so many in one packet."""
        self.most_credit = 0
        self.server_max_packet = 0
        self.owed: deque[Owed] = deque()
        self.started = False
        """A shell or a command was granted; ``may_run``: or asked for, and no reply wanted."""
        self.may_run = self.told_status = self.ended = False
        self.closed_here = self.closed_there = False


class Channels:
    """All of them. ``sent`` and ``got`` map a message's number to who keeps account of it."""

    def __init__(self, most: int) -> None:
        self._most = most
        self.lawful = True
        """The client has kept the rules."""
        self.terminals = True
        """Whoever is logged in may have some."""
        self.known: dict[int, Channel] = {}
        """By the server's number, until both sides have closed."""
        self._opening: dict[int, deque[Owed]] = {}
        self._asked: dict[int, deque[tuple[int, int]]] = {}
        # The client has guessed a channel's number: nothing can be said about any of them.
        self._unsure = False
        # Client numbers that were used for two channels at once: nothing can be said about them.
        self._twins: set[int] = set()
        self.sent: dict[int, Callable[[Reader, bool], None]] = {
            OPEN: self._sent_open,
            ADJUST: self._sent_adjust,
            DATA: self._sent_data,
            EXTENDED: self._sent_extended,
            EOF: self._sent_eof,
            CLOSE: self._sent_close,
            REQUEST: self._sent_request,
        }
        self.got: dict[int, Callable[[Reader], None]] = {
            OPENED: self._got_opened,
            OPEN_FAILED: self._got_open_failed,
            ADJUST: self._got_adjust,
            DATA: self._got_data,
            EXTENDED: self._got_extended,
            EOF: self._got_eof,
            CLOSE: self._got_close,
            REQUEST: self._got_request,
            SUCCESS: self._got_success,
            FAILURE: self._got_failure,
        }

    def numbers(self) -> list[int]:
        """The server's numbers of channels that are open on both sides."""
        return [
            number
            for number, channel in self.known.items()
            if not (channel.closed_here or channel.closed_there)
        ]

    def to_close(self) -> list[int]:
        """The server's numbers of channels that it has closed, and the client has not."""
        return [
            number
            for number, channel in self.known.items()
            if channel.closed_there and not channel.closed_here
        ]

    def settle(self, vague: bool) -> None:
        """The server owes nothing any more. Raises Wrong."""
        vague = vague or self._unsure
        for queue in self._opening.values():
            settle(queue, vague, "CHANNEL_OPEN")
        self._opening.clear()
        self._asked.clear()
        for number, channel in list(self.known.items()):
            settle(channel.owed, vague or channel.client_number in self._twins, "a request")
            if channel.closed_here and not channel.closed_there and not vague:
                if channel.client_number not in self._twins:
                    raise Wrong("unanswered", f"CLOSE of channel {number}")

    # --- what the client sent

    def _sent_open(self, reader: Reader, lenient: bool) -> None:
        kind = reader.string()
        sender = reader.uint32()
        # One that is cut behind this may be refused as if it were not.
        window, max_packet = (0, 0) if lenient else (reader.uint32(), reader.uint32())
        allowed = {OPEN_FAILED, OPENED} if kind == b"session" else {OPEN_FAILED}
        self._opening.setdefault(sender, deque()).append(Owed(frozenset(allowed), not lenient))
        self._asked.setdefault(sender, deque()).append((window, max_packet))
        if len(self._asked[sender]) > 1 or any(
            channel.client_number == sender for channel in self.known.values()
        ):
            self._twins.add(sender)
            self.lawful = False

    def _target(self, reader: Reader) -> Channel | None:
        channel = self.known.get(reader.uint32())
        if channel is None or channel.closed_here:
            self.lawful = False
            # It may be one whose confirmation is still on its way.
            self._unsure = self._unsure or any(self._opening.values())
        return channel

    def _sent_adjust(self, reader: Reader, lenient: bool) -> None:
        channel, size = self._target(reader), reader.uint32()
        if channel is not None:
            channel.window += size
            self.lawful = self.lawful and channel.window <= _MAX_WINDOW

    def _sent_data(self, reader: Reader, lenient: bool) -> None:
        channel, size = self._target(reader), reader.uint32()
        if channel is not None:
            # The server may have reopened its window without the client having heard of it.
            self.lawful = self.lawful and size <= min(channel.credit, channel.server_max_packet)
            channel.credit -= size
        reader.take(size)

    def _sent_extended(self, reader: Reader, lenient: bool) -> None:
        number = reader.take(4)
        reader.uint32()
        self._sent_data(Reader(number + reader.rest, lenient), lenient)

    def _sent_eof(self, reader: Reader, lenient: bool) -> None:
        self._target(reader)

    def _sent_close(self, reader: Reader, lenient: bool) -> None:
        number = int.from_bytes(reader.rest[:4], "big")
        channel = self._target(reader)
        if channel is not None:
            channel.closed_here = True
            if channel.closed_there:
                del self.known[number]

    def _sent_request(self, reader: Reader, lenient: bool) -> None:
        channel, name, wanted = self._target(reader), reader.string(), reader.boolean()
        if channel is None:
            return
        allowed = {SUCCESS, FAILURE} if name in _SOMETIMES else {FAILURE}
        if name == b"env" and not _harmless(reader.rest):
            allowed = {FAILURE}
        if name == b"pty-req" and not self.terminals:
            allowed = {FAILURE}
        starts = name in (b"shell", b"exec")
        channel.may_run = channel.may_run or starts
        if wanted:
            required = not (lenient or channel.closed_here or channel.closed_there)
            channel.owed.append(Owed(frozenset(allowed), required, starts))

    # --- what the server sent

    def _got_opened(self, reader: Reader) -> None:
        client_number, server_number, window, most = (reader.uint32() for _ in range(4))
        take(self._opening.get(client_number, deque()), OPENED)
        if server_number in self.known:
            raise Wrong("channel", f"number {server_number} is given twice")
        channel = Channel(client_number, *self._asked[client_number].popleft())
        channel.credit = channel.most_credit = window
        channel.server_max_packet = most
        self.known[server_number] = channel
        if len(self.known) > self._most:
            raise Wrong("sessions", f"{len(self.known)} are open")

    def _got_open_failed(self, reader: Reader) -> None:
        client_number, reason = reader.uint32(), reader.uint32()
        reader.string()
        reader.string()
        take(self._opening.get(client_number, deque()), OPEN_FAILED)
        self._asked[client_number].popleft()
        if not 1 <= reason <= 4:
            raise Wrong("channel", f"OPEN_FAILURE with reason {reason}")

    def _find(self, reader: Reader) -> Channel | None:
        """The channel that is meant; None: one of those about which nothing can be said."""
        number = reader.uint32()
        if self._unsure or number in self._twins:
            return None
        for channel in self.known.values():
            if channel.client_number == number and not channel.closed_there:
                return channel
        raise Wrong("channel", f"channel {number} is not open")

    def _got_adjust(self, reader: Reader) -> None:
        channel, size = self._find(reader), reader.uint32()
        if channel is not None:
            channel.credit += size
            if self.lawful and channel.credit > channel.most_credit:
                raise Wrong("window", f"the client may send {channel.credit} bytes")

    def _got_data(self, reader: Reader) -> None:
        channel, data = self._find(reader), reader.string()
        if channel is None:
            return
        channel.window -= len(data)
        if channel.window < 0:
            raise Wrong("window", f"{-channel.window} bytes more than the client's window")
        if not 0 < len(data) <= channel.max_packet:
            raise Wrong("window", f"{len(data)} bytes in a packet of {channel.max_packet}")
        if channel.ended:
            raise Wrong("channel", "data after EOF")

    def _got_extended(self, reader: Reader) -> None:
        number, kind = reader.take(4), reader.uint32()
        if kind != _STDERR:
            raise Wrong("channel", f"extended data of the kind {kind}")
        self._got_data(Reader(number + reader.rest))

    def _got_eof(self, reader: Reader) -> None:
        channel = self._find(reader)
        if channel is not None:
            if channel.ended:
                raise Wrong("channel", "EOF twice")
            channel.ended = True

    def _got_close(self, reader: Reader) -> None:
        client_number = int.from_bytes(reader.rest[:4], "big")
        channel = self._find(reader)
        if channel is None:
            self._close_twin(client_number)
            return
        channel.closed_there = True
        channel.owed.clear()
        if channel.closed_here:
            self._forget(channel)

    def _close_twin(self, client_number: int) -> None:
        twins = [each for each in self.known.values() if each.client_number == client_number]
        closed = [each for each in twins if each.closed_here]
        for channel in (closed or twins)[:1]:
            channel.closed_there = True
            if channel.closed_here:
                self._forget(channel)

    def _forget(self, channel: Channel) -> None:
        self.known = {number: each for number, each in self.known.items() if each is not channel}

    def _got_request(self, reader: Reader) -> None:
        channel, name, wanted = self._find(reader), reader.string(), reader.boolean()
        if name not in (b"exit-status", b"exit-signal", b"xon-xoff") or wanted:
            raise Wrong("channel", f"the server asks for {name!r}")
        if channel is not None and name.startswith(b"exit-"):
            if channel.told_status or not channel.may_run:
                raise Wrong("channel", f"{name!r} twice, or of nothing")
            channel.told_status = True

    def _got_success(self, reader: Reader) -> None:
        self._got_reply(SUCCESS, reader)

    def _got_failure(self, reader: Reader) -> None:
        self._got_reply(FAILURE, reader)

    def _got_reply(self, number: int, reader: Reader) -> None:
        channel = self._find(reader)
        if channel is None:
            return
        if take(channel.owed, number).starts and number == SUCCESS:
            if channel.started:
                raise Wrong("channel", "two commands were granted on one session")
            channel.started = True


def _harmless(rest: bytes) -> bool:
    # The names of variables that may be taken.
    name = Reader(rest + b"\0\0\0\0", lenient=True).string()
    return name in (b"LANG", b"TERM") or name.startswith(b"LC_")
