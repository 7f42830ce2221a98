"""Holes in how logins and sessions come to their end, and in how they are counted."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from tests.fuzz.holes_trust import avatars, with_world
from tests.fuzz.world import World
from vmconsole.interfaces import User
from vmconsole.ssh.session import SessionChannel
from vmconsole.ssh.session_counts import SessionCounts


class _Sleepless(SessionChannel):
    """A session on a terminal never ends by itself."""

    def _end_idle(self, reason: str) -> None:
        """See SessionChannel."""


class _Unwarned(SessionChannel):
    """Nobody is told that their session will end."""

    def _warn(self, text: str) -> None:
        """See SessionChannel."""


class _Deaf(SessionChannel):
    """What is typed does not count."""

    def _typed(self) -> None:
        """See SessionChannel."""


class _Uncounted(SessionCounts):
    """A user may have as many sessions as anybody likes."""

    def refusal(self, user: User, on_connection: int, per_connection: int) -> str | None:
        """See SessionCounts."""
        return None if on_connection < per_connection else "too many"


class _Unforgetting(SessionCounts):
    """A session that is over counts as long as its user has another one."""

    def closed(self, user: User) -> None:
        """See SessionCounts."""
        if self._open[user.id] == 1:
            super().closed(user)


def _outliving(world: World) -> None:
    # A certificate's end ends nothing.
    realm: Any = world.factory.portal.realm
    realm._look_later = lambda avatar, expires: None


def _inattentive(world: World) -> None:
    # A change of the operator's files ends nothing.
    world.trust._observers.clear()


def _rash(world: World) -> None:
    # When somebody's login is revoked, everybody's is.
    realm: Any = world.factory.portal.realm

    def end_refused(refusal: Callable[..., str]) -> None:
        proofs = [avatar.proof for avatar in realm._avatars]
        reasons = [refusal(proof.blob, proof.certificate) for proof in proofs]
        for avatar in list(realm._avatars) if any(reasons) else ():
            avatar.watch.revoke(next(filter(None, reasons)))

    world.trust._observers[:] = [lambda: end_refused(world.trust.refusal)]


def _curt(avatar: Any) -> None:
    # Sessions are not told why they end.
    def revoke(reason: str) -> None:
        avatar.revoked = reason
        avatar.conn._end(reason)

    avatar.revoke = revoke


def _sessions(kind: type[SessionChannel]) -> Callable[[Any], World]:
    def change(avatar: Any) -> None:
        made = avatar.channelLookup[b"session"]
        avatar.channelLookup[b"session"] = partial(kind, **made.keywords)

    return with_world(avatars(change))


def _counts(kind: type[SessionCounts]) -> Callable[[Any], World]:
    def change(world: World) -> None:
        world.counts_type = kind

    return with_world(change)


HOLES: dict[str, Callable[[Any], World]] = {
    "outliving": with_world(_outliving),
    "inattentive": with_world(_inattentive),
    "rash": with_world(_rash),
    "curt": with_world(avatars(_curt)),
    "sleepless": _sessions(_Sleepless),
    "unwarned": _sessions(_Unwarned),
    "untyped": _sessions(_Deaf),
    "uncounted": _counts(_Uncounted),
    "unforgetting": _counts(_Unforgetting),
}
"""What each is called -> how a server that has it is made."""
