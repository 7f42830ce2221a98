"""The account of a crowd: who may be let in, made to wait, refused or put out, by the
documentation's word (docs/security.md, Limits)."""

from __future__ import annotations

import socket
from collections import deque
from typing import Any

from tests.fuzz.channels import Wrong
from vmconsole.config import Limits

PIECE = 0.05
"""Seconds in which time passes while somebody waits: so late a timer may be seen to be."""
# Connections of an address without a login: so many at once, and so many a second.
_BURST, _A_SECOND = 10.0, 5.0
_SLACK = 0.1
_OLD = 2.0
# Seconds in which it is somebody's turn who waits in the kernel's backlog, and has so many before
# them: a twentieth of the places change hands in that time at least.
_PATIENCE = 6.0


class Visitor:
    """One connection of the crowd."""

    def __init__(self, number: int, address: str, now: float) -> None:
        self.number = number
        self.address = address
        self.source = source_of(address)
        self.came = now
        self.ahead = 0
        """So many were in the backlog before it."""
        self.state = "backlog"
        """Then ``waiting``, ``served``, ``in`` (logged in), ``refused``, or ``gone``."""
        self.dropped = False
        self.play: Any = None

    @property
    def placed(self) -> bool:
        """It counts for ``limits.connections``."""
        return self.state in ("waiting", "served", "in")


def source_of(address: str) -> str:
    """Whom an address is counted for; empty: nobody."""
    if ":" not in address:
        return address
    packed = socket.inet_pton(socket.AF_INET6, address)
    if packed[:12] == bytes(10) + b"\xff\xff":
        return socket.inet_ntop(socket.AF_INET, packed[12:])
    return packed[:8].hex()


class Account:
    """One source."""

    def __init__(self, now: float) -> None:
        self.present = 0
        self.waiting: deque[Visitor] = deque()
        self.turn = now
        """When somebody of it was let in last."""
        self._level, self._at = 0.0, now
        # Failures in a row: those that the server must remember, and those that it may.
        self._sure = self._perhaps = 0
        self._failed = now
        self.banned_until = self.perhaps_until = now

    def level(self, now: float) -> float:
        """Connections that it has without a login, less those that time has forgiven."""
        self._level = max(0.0, self._level - (now - self._at) * _A_SECOND)
        self._at = now
        return self._level

    def served(self, now: float) -> None:
        """One was let in."""
        self._level = self.level(now) + 1
        self.turn = now
        if self._level > _BURST + 1 + _SLACK:
            raise Wrong("rate", f"{self._level:.1f} connections without a login are let in")

    def logged_in(self, now: float) -> None:
        """One logged in."""
        self._level = max(0.0, self.level(now) - 1)
        self._sure = self._perhaps = 0

    def failed(self, now: float, limits: Limits) -> None:
        """One ended without a login."""
        if not limits.ban_after:
            return
        kept = now - self._failed < limits.ban_seconds - _SLACK
        self._sure = self._sure + 1 if kept else 1
        self._perhaps += 1
        self._failed = now
        if self._perhaps >= limits.ban_after:
            self.perhaps_until = now + limits.ban_seconds
            self._perhaps = limits.ban_after - 1
        if self._sure >= limits.ban_after:
            self.banned_until = now + limits.ban_seconds
            self._sure = self._perhaps = 0


class Rules:
    """All of them."""

    def __init__(self, limits: Limits, now: float) -> None:
        self.limits = limits
        self.accounts: dict[str, Account] = {}
        self.visitors: dict[int, Visitor] = {}
        """Those that are not gone, by number, in the order in which they came."""
        self.paused = False
        self._paused_at = now

    def account(self, visitor: Visitor, now: float) -> Account:
        """Of its source."""
        return self.accounts.setdefault(visitor.source, Account(now))

    @property
    def strangers(self) -> int:
        """Those that were accepted, and have not logged in."""
        return sum(each.state not in ("backlog", "in") for each in self.visitors.values())

    @property
    def total(self) -> int:
        """Those that were let in, or wait for that."""
        return sum(each.placed for each in self.visitors.values())

    def pause(self, paused: bool, now: float) -> None:
        """The ports are paused, or resumed."""
        self.paused, self._paused_at = paused, now

    # --- what is seen of a visitor

    def waits(self, visitor: Visitor, now: float) -> None:
        """It was accepted, and hears nothing."""
        account = self.account(visitor, now)
        self._admissible(visitor, account, now)
        if not visitor.source:
            raise Wrong("slowed", "who has no address has to wait")
        if not account.waiting:
            if account.level(now) <= _BURST - 1 - _SLACK:
                raise Wrong("slowed", f"{visitor.address} waits, with {account.level(now):.1f}")
            account.turn = now
        self._place(visitor, account, "waiting")
        account.waiting.append(visitor)

    def served(self, visitor: Visitor, now: float) -> None:
        """The server speaks to it."""
        account = self.account(visitor, now)
        if visitor.state == "waiting":
            if account.waiting[0] is not visitor:
                raise Wrong("order", f"{visitor.address}: the next is another one")
            account.waiting.popleft()
            visitor.state = "served"
        else:
            self._admissible(visitor, account, now)
            if account.waiting:
                raise Wrong("order", f"{visitor.address} overtakes {len(account.waiting)}")
            self._place(visitor, account, "served")
        if visitor.source:
            account.served(now)

    def refused(self, visitor: Visitor, reason: str, now: float) -> None:
        """It is turned away with a word."""
        account, limits = self.account(visitor, now), self.limits
        before, visitor.state = visitor.state, "refused"
        if before == "waiting":
            self._left_queue(visitor, account)
            account.present -= 1
        if "ended without a login" in reason:
            right = visitor.source and now < account.perhaps_until + _SLACK
        elif "from your address" in reason:
            right = before == "backlog" and account.present >= limits.per_address
        else:
            right = before == "backlog" and self.total >= limits.connections
        if not right:
            raise Wrong("refused", f"{visitor.address} ({before}): {reason}")

    def put_out(self, visitor: Visitor, reason: str, now: float) -> None:
        """The server ends it."""
        if visitor.state == "in":
            raise Wrong("put-out", f"a user is put out: {reason}")
        if "do not log in" in reason:
            visitor.dropped = True
            paused = self.paused or now <= self._paused_at + PIECE
            if not paused or now - visitor.came < _OLD - _SLACK:
                raise Wrong("put-out", f"dropped after {now - visitor.came:.1f} s: {reason}")

    def logged_in(self, visitor: Visitor, now: float) -> None:
        """It proved who it is."""
        visitor.state = "in"
        if visitor.source:
            self.account(visitor, now).logged_in(now)

    def left(self, visitor: Visitor, now: float) -> None:
        """Its connection is gone."""
        account, before = self.account(visitor, now), visitor.state
        if visitor.placed:
            account.present -= 1
        visitor.state = "gone"
        del self.visitors[visitor.number]
        if before == "waiting":
            self._left_queue(visitor, account)
            # It may have been its turn just when it was put out.
            account.turn = now
        if before == "served" and visitor.source and not visitor.dropped:
            account.failed(now, self.limits)

    def _admissible(self, visitor: Visitor, account: Account, now: float) -> None:
        limits = self.limits
        if visitor.source and now < account.banned_until - _SLACK:
            raise Wrong("ban", f"{visitor.address} is banned, and let in")
        if visitor.source and account.present >= limits.per_address:
            raise Wrong("limits", f"{account.present + 1} connections of {visitor.address}")
        if self.total >= limits.connections:
            raise Wrong("limits", f"{self.total + 1} connections")

    def _place(self, visitor: Visitor, account: Account, state: str) -> None:
        visitor.state = state
        account.present += 1

    def _left_queue(self, visitor: Visitor, account: Account) -> None:
        if visitor in account.waiting:
            account.waiting.remove(visitor)

    # --- after each step

    def look(self, now: float) -> None:
        """Nobody is forgotten, and there are no more than there may be. Raises Wrong."""
        most = self.limits.unauthenticated
        if self.strangers > most:
            raise Wrong("limits", f"{self.strangers} connections have not logged in")
        if self.paused and self.strangers <= most // 2 and now > self._paused_at + PIECE:
            raise Wrong("paused", f"nothing is accepted, with {self.strangers} without a login")
        for account in self.accounts.values():
            if account.waiting and now - account.turn > 1 / _A_SECOND + PIECE + _SLACK:
                first, since = account.waiting[0], now - account.turn
                raise Wrong("forgotten", f"{first.address} waits, for {since:.2f} s after the last")
        for visitor in self.visitors.values():
            if visitor.state == "backlog":
                patience = _PATIENCE * (1 + 20 * (visitor.ahead + 1) / most)
                if now - visitor.came > patience:
                    raise Wrong("stuck", f"for {now - visitor.came:.0f} s in the backlog")
                # The others came later.
                break
