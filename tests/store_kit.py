"""What the tests of the embedded engine's store share: the same tests on both databases."""

from __future__ import annotations

import sqlite3
import subprocess
import threading
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from sqlalchemy import create_engine, text
from twisted.trial.unittest import SynchronousTestCase

from tests import postgres
from tests.engine_kit import NOW
from vmconsole.engine.embedded.records import Revisions
from vmconsole.engine.embedded.store import Store
from vmconsole.errors import StoreError

SECONDS = int(NOW.timestamp())


def one() -> int:
    """A revision's step with which it counts."""
    return 1


class StoreTestCase(SynchronousTestCase):
    """A new store, by default in an SQLite file in a directory of its own."""

    def setUp(self) -> None:
        self.url = self.new_url()
        self.store = self.another()

    def new_url(self) -> str:
        """Of a database that is not there yet, or empty."""
        self.file = Path(self.mktemp()).absolute() / "state" / "engine.db"
        return f"sqlite:///{self.file}"

    def another(self, url: str = "", actor: str = "vmconsole") -> Store:
        """One more store on the same database, as the command beside the service."""
        store = Store(url or self.url, NOW.timestamp, actor, one)
        self.addCleanup(store.close)
        store.open()
        return store

    def closed(self, url: str = "") -> Store:
        """One more store, which is not opened yet."""
        store = Store(url or self.url, NOW.timestamp, step=one)
        self.addCleanup(store.close)
        return store

    @contextmanager
    def refused(self, *words: str, kind: type[StoreError] = StoreError) -> Iterator[None]:
        """Within it, a StoreError is raised that has these words, in one visible line."""
        try:
            yield
        except StoreError as error:
            self.assertIsInstance(error, kind)
            for word in words:
                self.assertIn(word, str(error))
            self.assertTrue(str(error).isprintable(), repr(str(error)))
        else:
            self.fail(f"Nothing was refused: {words}")

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """What is there after it, revisions and changes included, is what was there before."""
        before = contents(self.store)
        yield
        self.assertEqual(contents(self.store), before)

    @contextmanager
    def grows(self, **parts: int) -> Iterator[None]:
        """Within it, revisions grow by so much; those that are not named stay."""
        before = self.store.revisions()
        yield
        after = self.store.revisions()
        for name in Revisions.__struct_fields__:
            grown = getattr(after, name) - getattr(before, name)
            self.assertEqual(grown, parts.get(name, 0), name)

    def query(self, statement: str) -> list[tuple[object, ...]]:
        """The rows, by a connection that has nothing to do with the store."""
        engine = create_engine(self.url)
        try:
            with engine.begin() as connection:
                result = connection.execute(text(statement))
                return [tuple(row) for row in result] if result.returns_rows else []
        finally:
            engine.dispose()


class OnPostgres:
    """Before a StoreTestCase, it is on PostgreSQL instead."""

    skip = postgres.missing() or None

    def new_url(self) -> str:
        """A new database of the server that all tests share."""
        self.server = postgres.get()
        url = self.server.database()
        # Cleanups run in the reverse order: the server runs, the stores are closed.
        self.addCleanup(self.server.drop, url)  # type: ignore[attr-defined]
        self.addCleanup(self.server.start)  # type: ignore[attr-defined]
        return url


def contents(store: Store) -> list[object]:
    """All that a store tells."""
    parts: list[object] = [store.users(), store.groups(), store.keys(), store.hosts()]
    return [*parts, store.grants(), store.last_changes(), store.revisions()]


def string(value: bytes) -> bytes:
    """As RFC 4251 has it."""
    return len(value).to_bytes(4, "big") + value


def ed25519_line(number: int, comment: str = "") -> str:
    """A public key, another for each number: to store it, nobody needs the private one."""
    blob = string(b"ssh-ed25519") + string(number.to_bytes(32, "big"))
    return f"ssh-ed25519 {b64encode(blob).decode()} {comment}".rstrip()


def sk_line(number: int = 1) -> str:
    """The same, for a key in hardware."""
    kind = b"sk-ssh-ed25519@openssh.com"
    blob = string(kind) + string(number.to_bytes(32, "big")) + string(b"ssh:")
    return f"{kind.decode()} {b64encode(blob).decode()} token"


def at_once(*calls: Callable[[], object]) -> Sequence[BaseException]:
    """Call all of them in threads, which start together; what was raised."""
    errors: list[BaseException] = []
    barrier = threading.Barrier(len(calls))

    def run(call: Callable[[], object]) -> None:
        try:
            barrier.wait()
            call()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=[call]) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def sqlite_script(file: Path, script: str) -> None:
    """Run SQL in a file of SQLite, behind the store's back."""
    with closing(sqlite3.connect(file)) as connection:
        connection.executescript(script)


# The last argument is the directory.
MOUNT = (
    *("unshare", "-m", "sh", "-c"),
    'for last; do :; done; mount -t tmpfs -o size=2m none "$last" && exec "$@"',
    "sh",
)


def may_mount() -> bool:
    """Whether we may have a file system of our own."""
    try:
        probe = subprocess.run([*MOUNT, "true", "/mnt"], capture_output=True)
    except OSError:
        return False
    return probe.returncode == 0
