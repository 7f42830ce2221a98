"""Recordings on the disk: what they are called, and which are deleted."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from threading import Thread

from hypothesis import example, given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from tests.fakes import console
from vmconsole.console.castfiles import CastDirectory, CastFile, Parts, safe_name
from vmconsole.interfaces import ConsoleInfo

NOW = 1_700_000_000.0
HEADER = b"{}\n"


class Disk:
    """Takes so many bytes and is full then; ``write`` is an os.write."""

    def __init__(self, free: int) -> None:
        self.free = free

    def write(self, descriptor: int, data: bytes) -> int:
        if not self.free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = os.write(descriptor, data[: self.free])
        self.free -= taken
        return taken


class NameTests(SynchronousTestCase):
    """Names that anybody may have chosen."""

    def test_usual(self) -> None:
        """The usual ones stay as they are."""
        for name in ("web1", "db-02.example_org", "3f2a9c01-7f0e-4a53-9a0e-2b6a3c1de001"):
            self.assertEqual(safe_name(name), name)

    @given(st.text())
    @example("")
    @example(".")
    @example("../../etc/passwd")
    @example("a\x00b")
    @example("-rf")
    @example("x" * 300)
    @example("é" * 300)
    @example("\ud800")
    @example("a\n")
    def test_any(self, name: str) -> None:
        """Any other becomes a short one that a shell and every file system take."""
        self.assertRegex(safe_name(name), r"\A[A-Za-z0-9_][A-Za-z0-9._~-]{0,76}\Z")

    @given(st.lists(st.text("ab_~./ é", max_size=5), unique=True))
    @example(["x" * 64, "x" * 65, "x" * 66])
    def test_apart(self, names: list[str]) -> None:
        """Two different ones stay different."""
        self.assertEqual(len({safe_name(name) for name in names}), len(names))


class DirectoryTestCase(SynchronousTestCase):
    """Has a directory of recordings."""

    def setUp(self) -> None:
        self.path = Path(self.mktemp()).absolute()

    def directory(self, retain_age: float = 0, retain_bytes: int = 0) -> CastDirectory:
        """The directory, with limits."""
        directory = CastDirectory(self.path, retain_age, retain_bytes)
        directory.make()
        return directory

    def shown(self) -> list[str]:
        """All files, and folders that are empty."""
        return sorted(
            str(path.relative_to(self.path))
            for path in self.path.rglob("*")
            if not path.is_dir() or path.is_symlink() or not any(path.iterdir())
        )


class CreateTests(DirectoryTestCase):
    """Making files."""

    def test_name(self) -> None:
        """A folder for each VM, in it the files by time, with the VM's name and the part."""
        directory = self.directory()
        file = directory.create(console("web1", "id-1"), NOW + 0.1234, 2, HEADER)
        self.assertEqual(file.path, self.path / "web1,id-1/20231114T221320.123Z-web1-0002.cast")
        self.assertEqual(file.path.read_bytes(), HEADER)

    def test_private(self) -> None:
        """Whatever the umask is, files and folders are for their owner alone."""
        for umask in (0, 0o22, 0o77):
            self.addCleanup(os.umask, os.umask(umask))
            self.path = Path(self.mktemp()).absolute()
            file = self.directory().create(console("web1"), NOW, 1, HEADER)
            for path, mode in ((file.path, 0o600), (file.path.parent, 0o700), (self.path, 0o700)):
                self.assertEqual(path.stat().st_mode & 0o7777, mode, path)

    def test_readable_for_us(self) -> None:
        """A umask that takes everything does not take the mode of a file."""
        directory = self.directory()
        directory.create(console("web1"), NOW, 1, HEADER)
        self.addCleanup(os.umask, os.umask(0o777))
        file = directory.create(console("web1"), NOW, 1, HEADER)
        self.assertEqual(file.path.stat().st_mode & 0o7777, 0o600)

    def test_unique(self) -> None:
        """No file is ever opened twice, or written over: the next millisecond is free."""
        directory = self.directory(retain_bytes=1)
        first = directory.create(console("web1"), NOW, 1, b"first\n")
        second = directory.create(console("web1"), NOW, 1, b"second\n")
        self.assertEqual(directory.prune(NOW, lambda: False).files, 0)
        directory.close(first)
        third = directory.create(console("web1"), NOW, 1, b"third\n")
        self.assertEqual(
            [file.path.read_bytes() for file in (first, second, third)],
            [b"first\n", b"second\n", b"third\n"],
        )
        self.assertLess(first.path.name, second.path.name)

    def test_hostile(self) -> None:
        """Whatever a VM is called, its files are below the directory."""
        directory = self.directory(retain_bytes=1)
        for text in (
            "..",
            "../x",
            "/etc",
            "",
            "a\x00b",
            "é" * 300,
            "a\nb",
            "-rf ~",
            "x,y",
            "\ud800",
        ):
            info = ConsoleInfo(vm_id=text, vm_name=text, host="h")
            file = directory.create(info, NOW, 12345, HEADER)
            self.assertEqual(file.path.parent.parent, self.path)
            directory.close(file)
        self.assertEqual(directory.prune(NOW, lambda: False).files, 10)
        self.assertEqual(self.shown(), [])

    def test_symbolic_links(self) -> None:
        """A link in the place of a folder or a file is not followed."""
        directory = self.directory()
        elsewhere = Path(self.mktemp()).absolute()
        elsewhere.mkdir()
        (self.path / "web1,id-web1").symlink_to(elsewhere)
        self.assertRaises(OSError, directory.create, console("web1"), NOW, 1, HEADER)
        folder = self.path / "web2,id-web2"
        folder.mkdir()
        (folder / "20231114T221320.000Z-web2-0001.cast").symlink_to(elsewhere / "new")
        file = directory.create(console("web2"), NOW, 1, HEADER)
        self.assertEqual(file.path.name, "20231114T221320.001Z-web2-0001.cast")
        self.assertEqual(list(elsewhere.iterdir()), [])

    def test_linked_directory(self) -> None:
        """The directory itself may be one: where it is, is the operator's choice."""
        target = Path(self.mktemp()).absolute()
        target.mkdir()
        self.path.symlink_to(target)
        file = self.directory(retain_bytes=1).create(console("web1"), NOW, 1, HEADER)
        self.assertEqual(file.path.read_bytes(), HEADER)

    def test_full(self) -> None:
        """A file whose header cannot be written is removed again, and not thought to be open."""
        directory = CastDirectory(self.path, 0, 1, write=Disk(2).write)
        error = self.assertRaises(OSError, directory.create, console("web1"), NOW, 1, HEADER)
        self.assertEqual(error.errno, errno.ENOSPC)
        self.assertEqual(self.shown(), ["web1,id-web1"])
        self.assertEqual(directory._open, set())

    def test_not_a_directory(self) -> None:
        """When no file can be made, none is thought to be open."""
        directory = self.directory()
        (self.path / "web1,id-web1").write_text("")
        self.assertRaises(OSError, directory.create, console("web1"), NOW, 1, HEADER)
        self.assertEqual(directory._open, set())

    def test_no_file(self) -> None:
        """The same when only the file itself cannot be made."""
        directory = self.directory()
        opened = os.open

        def refuse(path: str, flags: int, mode: int = 0, *, dir_fd: int | None = None) -> int:
            if flags & os.O_CREAT:
                raise OSError(errno.EROFS, os.strerror(errno.EROFS))
            return opened(path, flags, dir_fd=dir_fd)

        self.patch(os, "open", refuse)
        self.assertRaises(OSError, directory.create, console("web1"), NOW, 1, HEADER)
        self.assertEqual(directory._open, set())


class AppendTests(DirectoryTestCase):
    """Writing to a file."""

    def file(self, disk: Disk) -> CastFile:
        """A new file on the disk, with a header."""
        directory = CastDirectory(self.path, 0, 0, disk.write)
        return directory.create(console("web1"), NOW, 1, HEADER)

    def test_whole_lines(self) -> None:
        """When the disk is full, the file ends with the last line that it has whole."""
        for free in range(len(b"1\n22\n333\n")):
            file = self.file(Disk(len(HEADER) + free))
            error = self.assertRaises(OSError, file.append, b"1\n22\n333\n")
            self.assertEqual(error.errno, errno.ENOSPC)
            whole = b"1\n22\n333\n"[:free].rpartition(b"\n")
            self.assertEqual(file.path.read_bytes(), HEADER + whole[0] + whole[1])

    def test_earlier_lines(self) -> None:
        """What was written before is left alone."""
        file = self.file(Disk(len(HEADER) + 5))
        file.append(b"1\n")
        self.assertEqual(file.size, len(HEADER) + 2)
        self.assertRaises(OSError, file.append, b"22222\n")
        self.assertEqual(file.path.read_bytes(), HEADER + b"1\n")

    def test_in_pieces(self) -> None:
        """A disk that takes a piece at a time gets all of them."""
        directory = CastDirectory(self.path, 0, 0, lambda to, data: os.write(to, data[:3]))
        file = directory.create(console("web1"), NOW, 1, HEADER)
        file.append(b"12345678\n")
        self.assertEqual(file.path.read_bytes(), HEADER + b"12345678\n")

    def test_deleted(self) -> None:
        """A file that somebody has deleted is no recording any more."""
        file = self.file(Disk(1000))
        file.path.unlink()
        error = self.assertRaises(OSError, file.append, b"1\n")
        self.assertEqual(error.errno, errno.ENOENT)


class PruneTests(DirectoryTestCase):
    """What is deleted."""

    def put(self, name: str, age: float = 0, size: int = 10, vm: str = "vm,1") -> str:
        """A file that was last written so many seconds ago."""
        path = self.path / vm / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(size))
        os.utime(path, (NOW - age, NOW - age))
        return f"{vm}/{name}"

    def cast(self, number: int, age: float = 0, size: int = 10, vm: str = "vm,1") -> str:
        """A finished recording."""
        return self.put(f"20231114T221320.123Z-vm-{number:04}.cast", age, size, vm)

    def prune(self, age: float = 0, size: int = 0) -> list[str]:
        """What is left with these limits."""
        pruned = self.directory(age, size).prune(NOW, lambda: False)
        self.assertEqual(pruned.problems, [])
        return self.shown()

    def test_age(self) -> None:
        """What was last written longer ago than that."""
        self.cast(1, age=101)
        kept = [self.cast(2, age=100), self.cast(3, age=0), self.cast(4, age=-50)]
        self.assertEqual(self.prune(age=100), kept)

    def test_size(self) -> None:
        """The oldest, of whatever VM, until the rest is no more than that."""
        self.cast(1, age=30, size=100, vm="b,1")
        self.cast(2, age=20, size=1, vm="a,1")
        kept = [self.cast(3, age=10, size=50, vm="a,1"), self.cast(4, age=5, size=50, vm="b,1")]
        self.assertEqual(self.prune(size=100), kept)

    def test_order(self) -> None:
        """How old one is, its last write says, not its name."""
        self.put("20250101T000000.000Z-vm-0001.cast", age=20)
        kept = self.put("20200101T000000.000Z-vm-0001.cast", age=10)
        self.assertEqual(self.prune(size=10), [kept])

    def test_no_limits(self) -> None:
        """Without limits everything stays."""
        kept = [self.cast(1, age=1e9, size=100_000)]
        self.assertEqual(self.prune(), kept)

    def test_told(self) -> None:
        """It tells how many were deleted, and how much that was."""
        for number in range(3):
            self.cast(number, age=10, size=7)
        pruned = self.directory(5).prune(NOW, lambda: False)
        self.assertEqual((pruned.files, pruned.size), (3, 21))

    def test_not_ours(self) -> None:
        """Files that are called otherwise stay and do not count, and so do links, and folders
        that nothing was deleted from."""
        kept = [
            self.put(name, age=1000)
            for name in (
                "notes.txt",
                "demo.cast",
                "20231114T221320.123Z-vm-0001.cast.gz",
                "x20231114T221320.123Z-vm-0001.cast",
                "20231114T221320.123Z-vm-1.cast",
                "20231114T221320.123Z-v m-0001.cast",
            )
        ]
        kept.append(self.cast(1, age=1000, vm="archive"))
        kept.append(self.cast(1, age=1000, vm="vm,1/deeper,1"))
        kept.append(self.put("20231114T221320.123Z-vm-0001.cast", age=1000, vm=""))
        kept.append("empty,1")
        (self.path / "empty,1").mkdir()
        elsewhere = Path(self.mktemp()).absolute()
        elsewhere.mkdir()
        outside = elsewhere / "20231114T221320.123Z-vm-0001.cast"
        outside.write_text("")
        os.utime(outside, (0, 0))
        (self.path / "link,1").symlink_to(elsewhere)
        linked = self.path / "vm,1" / outside.name
        linked.symlink_to(outside)
        kept += ["link,1", f"vm,1/{outside.name}"]
        self.assertEqual(self.prune(age=1, size=1), sorted(name.lstrip("/") for name in kept))
        self.assertTrue(outside.exists())

    def test_empty_folders(self) -> None:
        """A VM's folder goes with its last recording."""
        self.cast(1, age=10, vm="a,1")
        self.cast(1, age=10, vm="b,1")
        kept = self.put("notes.txt", vm="b,1")
        self.assertEqual(self.prune(age=5), [kept])

    def test_open(self) -> None:
        """What is being recorded stays, and counts; finished, it goes as any other."""
        directory = self.directory(5, 1)
        file = directory.create(console("web1"), NOW, 1, HEADER)
        os.utime(file.path, (NOW - 99, NOW - 99))
        self.cast(1, age=1)
        self.assertEqual(directory.prune(NOW, lambda: False).files, 1)
        self.assertTrue(file.path.exists())
        directory.close(file)
        directory.prune(NOW, lambda: False)
        self.assertEqual(self.shown(), [])

    def test_new_file(self) -> None:
        """A folder that becomes empty stays when a new file is just being made in it."""
        old = self.cast(1, age=10, vm="web1,id-web1")
        directory = self.directory(5)
        pruning = Thread(target=directory.prune, args=(NOW, lambda: False))
        opened = os.open

        def meanwhile(path: str, flags: int, mode: int = 0, *, dir_fd: int | None = None) -> int:
            if flags & os.O_CREAT:
                pruning.start()
                # It waits for us.
                pruning.join(0.1)
            return opened(path, flags, mode, dir_fd=dir_fd)

        self.patch(os, "open", meanwhile)
        file = directory.create(console("web1"), NOW, 1, HEADER)
        pruning.join()
        self.assertEqual(file.path.read_bytes(), HEADER)
        self.assertFalse((self.path / old).exists())

    def test_stopped(self) -> None:
        """It ends in between when it is told to."""
        for number in range(5):
            self.cast(number, age=10)
        calls = iter([False, False, False, True])
        self.assertEqual(self.directory(5).prune(NOW, lambda: next(calls)).files, 2)
        self.assertEqual(self.directory(5).prune(NOW, lambda: True).files, 0)

    def test_trouble(self) -> None:
        """What cannot be deleted is told, and the others are."""
        first = self.cast(1, age=20)
        self.cast(2, age=10)
        directory = self.directory(5)
        unlink = os.unlink

        def refuse(path: str, *, dir_fd: int) -> None:
            if path in first:
                raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
            unlink(path, dir_fd=dir_fd)

        self.patch(os, "unlink", refuse)
        pruned = directory.prune(NOW, lambda: False)
        self.assertEqual(pruned.problems, [f"{self.path / first}: Operation not permitted"])
        self.assertEqual(self.shown(), [first])

    def test_deleted_meanwhile(self) -> None:
        """A file that somebody else deletes counts as deleted: no other one has to go for it."""
        self.cast(1, age=20, size=10)
        kept = self.cast(2, age=10, size=10)
        unlink = os.unlink

        def twice(path: str, *, dir_fd: int) -> None:
            unlink(path, dir_fd=dir_fd)
            unlink(path, dir_fd=dir_fd)

        self.patch(os, "unlink", twice)
        self.assertEqual(self.prune(size=10), [kept])

    def test_missing(self) -> None:
        """A directory that is gone is an error."""
        directory = self.directory(5)
        self.path.rmdir()
        self.assertRaises(OSError, directory.prune, NOW, lambda: False)

    def test_unreadable(self) -> None:
        """A folder that cannot be read is told, unless somebody deleted it meanwhile, and the
        others are looked at."""
        bad = self.cast(1, age=10, vm="bad,1")
        directory = self.directory(5)
        opened = os.open
        codes = [errno.EACCES]

        def refuse(path: str, flags: int, *, dir_fd: int | None = None) -> int:
            if path == "bad,1":
                raise OSError(codes[0], os.strerror(codes[0]))
            return opened(path, flags, dir_fd=dir_fd)

        self.patch(os, "open", refuse)
        told = [f"{self.path}/bad,1: Permission denied"]
        for codes[0], problems in ((errno.EACCES, told), (errno.ENOENT, [])):
            for vm in ("a,1", "z,1"):
                self.cast(1, age=10, vm=vm)
            self.assertEqual(directory.prune(NOW, lambda: False).problems, problems)
            self.assertEqual(self.shown(), [bad])


class PartsTests(DirectoryTestCase):
    """The files of one recording."""

    def test_failed(self) -> None:
        """After a failure nothing is open, and nothing more is written."""
        disk = Disk(100)
        directory = CastDirectory(self.path, 0, 1, disk.write)
        parts = Parts(directory, console("web1"), NOW, 0, 0)
        self.assertRaises(OSError, parts.write, [(NOW, b"x" * 1000)])
        disk.free = 1000
        before = parts.path.read_bytes()
        self.assertFalse(parts.write([(NOW, b"y"), (NOW, None)]))
        self.assertEqual(parts.path.read_bytes(), before)
        self.assertEqual(directory.prune(NOW, lambda: False).files, 1)
