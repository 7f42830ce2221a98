"""Kills a writer of the embedded engine's store in the middle, again and again. A program.

    python -m tests.store_crashes URL KILLS SEED

It forks writers off itself, all imports done, and has one thread: a forked process with more of
them could hang in a lock that nobody gives back. It ends with exit status 0 when nothing that was
confirmed is lost, and nothing is there in part.
"""

from __future__ import annotations

import gc
import itertools
import os
import random
import signal
import sys
from collections.abc import Iterator
from typing import NamedTuple

from sqlalchemy import create_engine

from tests.store_kit import ed25519_line, one
from vmconsole.engine.embedded.records import ChangeRecord
from vmconsole.engine.embedded.store import Store

# Confirmations that are waited for before a kill, at most.
_MOST = 6
# How long it is waited then, in steps of some 50 ns: more than a write takes.
_SPIN = 60_000
# All of a database is looked through after so many kills.
_THOROUGH = 50


class Write(NamedTuple):
    """One transaction: what its record says."""

    action: str
    user: str


def plan(number: int) -> Iterator[Write]:
    """What the writer of this number does, without end. Some users stay."""
    count = 0
    while True:
        count += 1
        user = f"u{number}-{count}"
        yield from (Write("user.add", user), Write("key.add", user), Write("grant", user))
        if count % 8:
            yield Write("user.remove", user)


def write(store: Store, what: Write) -> None:
    """Do it."""
    if what.action == "user.add":
        store.add_user(what.user)
    elif what.action == "key.add":
        first, _, second = what.user[1:].partition("-")
        key = ed25519_line(int(first) << 64 | int(second), what.user)
        store.add_keys(what.user, key)
    elif what.action == "grant":
        store.grant(what.user, "*")
    else:
        store.remove_user(what.user)


def write_on(store: Store, number: int, confirm: int) -> None:
    """Write, and confirm each transaction by a byte, until somebody ends us."""
    store.open()
    for what in plan(number):
        write(store, what)
        os.write(confirm, b".")


class Model:
    """What has to be there."""

    def __init__(self) -> None:
        self.users: set[str] = set()
        self.keys: set[str] = set()
        self.grants: set[str] = set()
        self.last = 0
        self.count = 0

    def see(self, store: Store, number: int, confirmed: int) -> None:
        """Compare the store with it, after a writer's end. Raises AssertionError."""
        new = store.changes_after(self.last, 10**6)
        # What was under way may be there: all of it.
        assert len(new) - confirmed in (0, 1), (number, confirmed, new)
        for change, what in zip(new, plan(number), strict=False):
            assert (change.action, change.subject.split()[0]) == what, (number, new)
            self._apply(change, what.user)
        assert {user.name for user in store.users()} == self.users
        assert {key.comment for key in store.keys()} == self.keys
        assert {key.user for key in store.keys()} == self.keys
        assert {grant.subject for grant in store.grants()} == self.grants
        assert store.revisions().all == self.count

    def _apply(self, change: ChangeRecord, user: str) -> None:
        self.last = change.id
        self.count += 1
        if change.action == "user.remove":
            for kind in (self.users, self.keys, self.grants):
                kind.discard(user)
        else:
            kinds = {"user.add": self.users, "key.add": self.keys, "grant": self.grants}
            kinds[change.action].add(user)


def kill_one(store: Store, number: int, chance: random.Random) -> int:
    """Kill a writer at some moment; how many transactions it had confirmed."""
    confirmations, confirm = os.pipe()
    writer = os.fork()
    if not writer:
        try:
            os.close(confirmations)
            write_on(store, number, confirm)
        finally:
            os._exit(1)
    os.close(confirm)
    confirmed = 0
    for _ in range(chance.randint(0, _MOST)):
        confirmed += len(os.read(confirmations, 1))
    for _ in range(chance.randrange(_SPIN)):
        pass
    os.kill(writer, signal.SIGKILL)
    _, status = os.waitpid(writer, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL, "the writer ended by itself"
    while got := os.read(confirmations, 4096):
        confirmed += len(got)
    os.close(confirmations)
    return confirmed


def wait_for_server(store: Store) -> None:
    """Until no server works at what a writer has left: it would hold this row."""
    try:
        with store._database.writing():
            raise InterruptedError
    except InterruptedError:
        pass


def look_through(url: str) -> None:
    """SQLite's own check of all pages."""
    engine = create_engine(url)
    with engine.connect() as connection:
        for pragma, good in (("integrity_check", [("ok",)]), ("foreign_key_check", [])):
            assert connection.exec_driver_sql(f"PRAGMA {pragma}").all() == good
    engine.dispose()


def main(url: str, kills: int, seed: int) -> None:
    """All of it. Raises AssertionError."""
    chance = random.Random(seed)
    store = Store(url, step=one)
    store.open()
    model = Model()
    # From here on SQLAlchemy knows the statements, and writers need not compile them.
    confirmed = len([write(store, what) for what in itertools.islice(plan(0), 4)])
    model.see(store, 0, confirmed)
    store.close()
    # Who looks at all objects has their pages copied.
    gc.disable()
    for number in range(1, kills + 1):
        before = confirmed
        confirmed += kill_one(store, number, chance)
        if not url.startswith("sqlite:"):
            wait_for_server(store)
        model.see(store, number, confirmed - before)
        # No connection may be open when we fork.
        store.close()
        if url.startswith("sqlite:") and number % _THOROUGH == 0:
            look_through(url)
    print(f"{kills} kills, {confirmed} confirmed, {model.count - confirmed} more")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
