"""Recording consoles, on a disk that works, stalls, or is full."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from twisted.internet.task import Clock, deferLater, react
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase, TestCase

from tests.fakes import Events, console
from tests.test_castfiles import Disk
from vmconsole.console import recording as recording_module
from vmconsole.console.recording import Recording, Recordings
from vmconsole.errors import ConsoleUnavailable

START = 1_700_000_000.0
# More than what waits is written in.
SOON = 0.5


class Reactor(Clock):
    """A clock that threads may hand calls to."""

    def callFromThread(self, call: Callable[..., object], *args: Any) -> None:
        call(*args)


class Pool:
    """Runs calls at once; while ``held``, when they are released."""

    def __init__(self, *_: object) -> None:
        self.held = False
        self.waiting: list[Callable[[], None]] = []
        self.running = False
        self.calls = 0

    def start(self) -> None:
        self.running = True

    def stop(self) -> None:
        assert not self.waiting, "it would wait for them"
        self.running = False

    def callInThreadWithCallback(
        self, done: Callable[[bool, Any], None], call: Callable[..., object], *args: Any
    ) -> None:
        assert self.running
        self.calls += 1

        def run() -> None:
            try:
                result, succeeded = call(*args), True
            except BaseException:
                result, succeeded = Failure(), False
            done(succeeded, result)

        if self.held:
            self.waiting.append(run)
        else:
            run()

    def release(self) -> None:
        """Hold no more."""
        self.held = False
        waiting, self.waiting = self.waiting, []
        for run in waiting:
            run()


class RecordingTestCase(SynchronousTestCase):
    """Has recordings in a directory, and a log."""

    def setUp(self) -> None:
        self.reactor = Reactor()
        self.reactor.rightNow = START
        self.path = Path(self.mktemp()).absolute()
        self.pool = Pool()
        self.events = Events()
        self.patch(Recordings, "_log", Logger(observer=self.events))

    def recordings(self, **settings: Any) -> Recordings:
        """Running."""
        recordings = Recordings(self.reactor, self.path, make_pool=lambda *_: self.pool, **settings)
        recordings.startService()
        self.addCleanup(recordings.stopService)
        return recordings

    def opened(self, recordings: Recordings, name: str = "web1") -> Recording:
        """A recording that has begun."""
        return self.successResultOf(recordings.open(console(name)))

    def files(self) -> list[Path]:
        """All recordings, by VM and time."""
        return sorted(self.path.rglob("*.cast"))

    def logged(self, level: str) -> list[str]:
        """The lines of this level."""
        return [
            event["log_format"].format(**event)
            for event in self.events.seen
            if event["log_level"].name == level
        ]


def read(path: Path) -> tuple[dict[str, Any], list[list[Any]]]:
    """The header of a recording and its events; each line is whole, and is JSON."""
    lines = path.read_text("utf-8").split("\n")
    assert lines.pop() == ""
    return json.loads(lines[0]), [json.loads(line) for line in lines[1:]]


def printed(*paths: Path) -> str:
    """What is printed in recordings, one after the other."""
    return "".join(event[2] for path in paths for event in read(path)[1] if event[1] == "o")


class RecordTests(RecordingTestCase):
    """What is in a recording."""

    def test_whole(self) -> None:
        """One file, with a header, what was printed, and markers, all at their times."""
        recording = self.opened(self.recordings())
        self.reactor.advance(1.5)
        recording.write(b"login: ")
        self.reactor.advance(1)
        recording.mark("alice attached")
        recording.write("é\r\n".encode())
        recording.close()
        self.reactor.advance(SOON)
        (file,) = self.files()
        header, events = read(file)
        self.assertEqual(header["timestamp"], START)
        self.assertEqual(header["title"], "web1")
        self.assertEqual(
            events, [[1.5, "o", "login: "], [2.5, "m", "alice attached"], [2.5, "o", "é\r\n"]]
        )
        self.assertEqual(file.parent.name, "web1,id-web1")
        self.assertEqual(file.stat().st_mode & 0o7777, 0o600)

    def test_soon(self) -> None:
        """Within half a second it is in the file; and much that comes in that time is written at
        once."""
        recording = self.opened(self.recordings())
        calls = self.pool.calls
        for _ in range(100):
            recording.write(b"x")
            self.reactor.advance(0.002)
        self.assertEqual(printed(*self.files()), "")
        self.reactor.advance(SOON)
        self.assertEqual(printed(*self.files()), "x" * 100)
        self.assertEqual(self.pool.calls, calls + 1)

    def test_much(self) -> None:
        """A lot of output is written before more of it has come."""
        recording = self.opened(self.recordings())
        for _ in range(300):
            recording.write(b"x" * 1024)
        self.assertGreater(len(printed(*self.files())), 200_000)
        self.assertLess(recording.waiting, 100_000)
        self.reactor.advance(SOON)
        self.assertEqual(len(printed(*self.files())), 300 * 1024)
        self.assertEqual(recording.waiting, 0)
        calls = self.pool.calls
        recording.write(b"a little")
        self.assertEqual(self.pool.calls, calls)

    def test_very_much(self) -> None:
        """What has gathered while the disk was busy is written in pieces."""
        sizes = []

        def write(descriptor: int, data: bytes) -> int:
            sizes.append(len(data))
            return os.write(descriptor, data)

        recording = self.opened(self.recordings(write=write))
        self.pool.held = True
        for _ in range(30):
            recording.write(b"x" * 100_000)
            self.reactor.advance(0.02)
        self.pool.release()
        self.reactor.advance(SOON)
        self.assertEqual(len(printed(*self.files())), 3_000_000)
        self.assertLess(max(sizes), 500_000)

    def test_events(self) -> None:
        """What comes within a frame is one event, and never longer than a frame."""
        recording = self.opened(self.recordings())
        for _ in range(100):
            recording.write(b"x")
            self.reactor.advance(0.001)
        self.reactor.advance(SOON)
        events = read(self.files()[0])[1]
        times = [event[0] for event in events]
        self.assertGreater(len(events), 5)
        self.assertLess(len(events), 8)
        self.assertEqual(times, sorted(times))
        self.assertEqual(times[0], 0)

    def test_split_character(self) -> None:
        """A character whose bytes come apart is whole, also when they are written apart; one that
        never is, is shown as such at the end."""
        recording = self.opened(self.recordings())
        recording.write(b"\xe2\x94")
        self.reactor.advance(SOON)
        recording.write(b"\x9c\xe2")
        recording.close()
        self.reactor.advance(SOON)
        self.assertEqual(printed(*self.files()), "├\N{REPLACEMENT CHARACTER}")

    def test_closed(self) -> None:
        """After the end nothing is recorded, and to end again does nothing."""
        recording = self.opened(self.recordings())
        recording.write(b"x")
        recording.close()
        before = recording.waiting
        recording.close()
        recording.write(b"y")
        recording.mark("late")
        self.assertEqual(recording.waiting, before)
        self.reactor.advance(SOON)
        recording.write(b"z")
        self.reactor.advance(SOON)
        self.assertEqual(read(self.files()[0])[1], [[0, "o", "x"]])
        self.assertEqual(open_files(self.path), [])
        self.assertNoResult(recording.failed)

    def test_each_opening(self) -> None:
        """Each opening has a file of its own, and so has each VM."""
        recordings = self.recordings()
        for name in ("web1", "web1", "db"):
            recording = self.opened(recordings, name)
            recording.write(name.encode())
            recording.close()
        self.reactor.advance(SOON)
        self.assertEqual([printed(file) for file in self.files()], ["db", "web1", "web1"])

    def test_while_writing(self) -> None:
        """What comes while the disk is busy is written after that, in order."""
        recordings = self.recordings()
        recording = self.opened(recordings)
        self.pool.held = True
        recording.write(b"1")
        self.reactor.advance(SOON)
        recording.write(b"2")
        self.reactor.advance(SOON)
        recording.write(b"3")
        recording.close()
        self.assertEqual(len(self.pool.waiting), 1)
        self.pool.release()
        recording.write(b"4")
        self.reactor.advance(SOON)
        self.assertEqual(printed(*self.files()), "123")
        self.assertEqual(open_files(self.path), [])

    def test_asciinema(self) -> None:
        """asciinema plays it, markers and all."""
        recording = self.opened(self.recordings(max_size=300))
        output = "".join(map(chr, range(0x100))) + "\u2028├─┐\x1b[31m😀\r\n"
        for at in range(30):
            recording.write(output.encode()[at * 10 :][:10])
            recording.mark(f"marker {at}")
            self.reactor.advance(0.1)
        recording.write(output.encode()[300:])
        recording.close()
        self.reactor.advance(SOON)
        self.assertGreater(len(self.files()), 3)
        played = "".join(asciinema("cat", str(file)) for file in self.files())
        self.assertEqual(played, output)
        for file in self.files():
            header, *events = (
                json.loads(line)
                for line in asciinema("play", "-s", "1e9", "--out-fmt", "asciicast", str(file))
                .removesuffix("\r\n")
                .split("\r\n")
            )
            self.assertEqual(header["title"], "web1")
            self.assertEqual([event[1:] for event in events], [e[1:] for e in read(file)[1]])


def asciinema(*arguments: str) -> str:
    """What it prints."""
    # In a session of its own it finds no terminal to read keys from.
    done = subprocess.run(
        [sys.executable, "-m", "asciinema", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        start_new_session=True,
        env=os.environ | {"LC_ALL": "C.UTF-8", "PYTHONIOENCODING": "utf-8"},
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.decode()


def open_files(directory: Path) -> list[str]:
    """Files below it that this process has open."""
    found = []
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            found.append(os.readlink(descriptor))
        except OSError:
            pass
    return [path for path in found if path.startswith(str(directory))]


class RotationTests(RecordingTestCase):
    """The next file."""

    def test_size(self) -> None:
        """A file that has reached its size ends, and the next goes on where it ended."""
        recording = self.opened(self.recordings(max_size=1000))
        text = "".join(f"{number}\n" for number in range(1000))
        for line in text.splitlines(keepends=True):
            recording.write(line.encode())
            self.reactor.advance(0.1)
        recording.close()
        self.reactor.advance(SOON)
        files = self.files()
        self.assertEqual(printed(*files), text)
        self.assertGreater(len(files), 10)
        for number, file in enumerate(files, 1):
            self.assertIn(f"-{number:04}.cast", file.name)
            header, events = read(file)
            self.assertEqual(header["title"], "web1")
            self.assertLess(abs(header["timestamp"] + events[0][0] - begun(file)), 1)
            self.assertLess(file.stat().st_size, 1050)
        for file in files[:-1]:
            self.assertGreaterEqual(file.stat().st_size, 1000)

    def test_batch(self) -> None:
        """Also among what is written at once."""
        recording = self.opened(self.recordings(max_size=1000))
        self.pool.held = True
        for _ in range(100):
            recording.write(b"x" * 99)
            self.reactor.advance(0.02)
        self.pool.release()
        self.reactor.advance(SOON)
        self.assertEqual(len(printed(*self.files())), 9900)
        self.assertLess(max(file.stat().st_size for file in self.files()), 1200)

    def test_age(self) -> None:
        """A file covers so many seconds; the next begins with what comes after that."""
        recording = self.opened(self.recordings(max_age=60))
        for text in (b"a", b"b", b"c", b"d"):
            recording.write(text)
            self.reactor.advance(40)
        self.assertEqual([printed(file) for file in self.files()], ["ab", "cd"])
        self.assertEqual(read(self.files()[1])[0]["timestamp"], START + 80)
        self.assertEqual(read(self.files()[1])[1][0][0], 0)

    def test_quiet(self) -> None:
        """Of a guest that prints nothing there is no other file."""
        recording = self.opened(self.recordings(max_age=60))
        recording.mark("alice attached")
        self.reactor.pump([30] * 10)
        recording.close()
        self.reactor.advance(SOON)
        self.assertEqual(len(self.files()), 1)

    def test_nothing(self) -> None:
        """A recording in which nothing happened, as when a console could not be opened, leaves
        neither a file nor a folder."""
        recording = self.opened(self.recordings())
        self.reactor.advance(SOON)
        self.assertEqual(len(self.files()), 1)
        recording.close()
        self.reactor.advance(SOON)
        self.assertEqual(list(self.path.iterdir()), [])

    def test_no_limits(self) -> None:
        """Without limits it is one file."""
        recording = self.opened(self.recordings())
        for _ in range(100):
            recording.write(b"x" * 100_000)
            self.reactor.advance(10_000)
        self.assertEqual(len(self.files()), 1)

    def test_split_character(self) -> None:
        """A character over two files is in the second one."""
        recording = self.opened(self.recordings(max_age=60))
        recording.write(b"a\xe2\x94")
        self.reactor.advance(100)
        recording.write(b"\x9cb")
        recording.close()
        self.reactor.advance(SOON)
        self.assertEqual([printed(file) for file in self.files()], ["a", "├b"])

    def test_marker(self) -> None:
        """A marker begins the next file, too."""
        recording = self.opened(self.recordings(max_age=60))
        self.reactor.advance(100)
        recording.mark("bob attached")
        self.reactor.advance(SOON)
        self.assertEqual(read(self.files()[1])[1], [[0, "m", "bob attached"]])

    def test_full(self) -> None:
        """When the next file cannot be made, the recording failed, and all files are whole."""
        recordings = self.recordings(max_age=60, write=(disk := Disk(1000)).write)
        recording = self.opened(recordings)
        recording.write(b"a")
        self.reactor.advance(100)
        disk.free = 0
        recording.write(b"b")
        self.reactor.advance(SOON)
        self.assertIn("No space left on device", self.successResultOf(recording.failed))
        self.assertEqual([printed(file) for file in self.files()], ["a"])


def begun(file: Path) -> float:
    """When a file was begun, as its name says."""
    moment = datetime.strptime(file.name.partition("Z")[0], "%Y%m%dT%H%M%S.%f")
    return moment.replace(tzinfo=UTC).timestamp()


class FailureTests(RecordingTestCase):
    """Disks that do not do what they should."""

    def test_full(self) -> None:
        """The log says it loudly, with what to do; who waits for it is told, once; and the file
        has whole lines."""
        disk = Disk(200)
        recording = self.opened(self.recordings(write=disk.write))
        self.reactor.advance(1)
        recording.write(b"first")
        self.reactor.advance(1)
        self.assertNoResult(recording.failed)
        recording.write(b"x" * 1000)
        self.reactor.advance(1)
        self.assertEqual(
            self.successResultOf(recording.failed),
            "This console is not recorded any more: No space left on device.",
        )
        self.assertEqual(printed(*self.files()), "first")
        (line,) = self.logged("critical")
        self.assertIn(str(self.files()[0]), line)
        self.assertIn("No space left on device. Free space", line)
        disk.free = 1000
        recording.write(b"more")
        recording.close()
        self.reactor.advance(1)
        self.assertEqual(printed(*self.files()), "first")
        self.assertEqual(len(self.logged("critical")), 1)
        self.assertEqual(open_files(self.path), [])

    def test_again(self) -> None:
        """After that, what is opened later is tried anew."""
        disk = Disk(100)
        recordings = self.recordings(write=disk.write)
        recording = self.opened(recordings)
        recording.write(b"x" * 1000)
        self.reactor.advance(1)
        error = self.failureResultOf(recordings.open(console("web1")), ConsoleUnavailable)
        self.assertEqual(
            str(error.value),
            "This console cannot be recorded: No space left on device. "
            "Ask the administrator to see to it.",
        )
        self.assertEqual(len(self.logged("critical")), 2)
        disk.free = 1000
        recording = self.opened(recordings)
        recording.write(b"y")
        self.reactor.advance(1)
        self.assertEqual([printed(file) for file in self.files()], ["", "y"])

    def test_others(self) -> None:
        """One that fails is no reason for the others to."""
        recordings = self.recordings()
        bad, good = self.opened(recordings, "bad"), self.opened(recordings, "good")
        (self.path / "bad,id-bad").rename(self.path / "gone")
        next((self.path / "gone").iterdir()).unlink()
        bad.write(b"x")
        good.write(b"y")
        self.reactor.advance(SOON)
        self.assertIn("The file was deleted", self.successResultOf(bad.failed))
        self.assertNoResult(good.failed)
        self.assertEqual(printed(*self.files()), "y")

    def test_no_directory(self) -> None:
        """Where the directory cannot be made, the log says so at the start, and openings fail."""
        self.path.write_text("a file")
        recordings = self.recordings()
        (line,) = self.logged("critical")
        self.assertIn(f"recording.directory ({self.path})", line)
        self.failureResultOf(recordings.open(console("web1")), ConsoleUnavailable)

    def test_made_again(self) -> None:
        """A directory that was removed is made again for the next opening."""
        recordings = self.recordings()
        self.path.rmdir()
        self.opened(recordings)
        self.assertEqual(len(self.files()), 1)

    def test_bug(self) -> None:
        """Whatever goes wrong in a recording, it is told."""
        recording = self.opened(self.recordings())
        recording.write("no bytes")  # type: ignore[arg-type]
        self.patch(recording._parts._encoder, "marker", lambda *_: 1 / 0)
        self.reactor.advance(SOON)
        self.assertIn("division by zero", self.successResultOf(recording.failed))
        self.assertEqual(open_files(self.path), [])

    def test_close(self) -> None:
        """A disk that tells only at the end that it is full is heard."""
        recording = self.opened(self.recordings())
        recording.write(b"x")
        self.reactor.advance(SOON)
        close = os.close

        def full(descriptor: int) -> None:
            close(descriptor)
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

        recording.close()
        self.patch(os, "close", full)
        self.reactor.advance(SOON)
        self.patch(os, "close", close)
        self.assertIn(os.strerror(errno.EDQUOT), self.successResultOf(recording.failed))
        self.assertIn("Free space", self.logged("critical")[0])


class StallTests(RecordingTestCase):
    """A disk that does not answer."""

    def test_bounded(self) -> None:
        """What waits is bounded: the recording that has a lot of it fails, its memory is given
        back, and its file is closed once the disk answers."""
        self.patch(recording_module, "_LIMIT", 1_000_000)
        recordings = self.recordings()
        loud, quiet = self.opened(recordings, "loud"), self.opened(recordings, "quiet")
        self.pool.held = True
        quiet.write(b"q" * 100_000)
        told: list[str] = []
        loud.failed.addCallback(told.append)
        written = 0
        while not loud._dropped:
            loud.write(b"x" * 1000)
            written += 1
        self.assertLess(written, 1000)
        self.assertGreater(written, 600)
        # Not while it writes.
        self.assertEqual(told, [])
        self.reactor.advance(0)
        self.assertEqual(len(told), 1)
        self.assertEqual(loud.waiting, 0)
        for _ in range(1000):
            loud.write(b"x" * 1000)
        self.assertLess(len(loud._pieces), 2)
        self.assertIn("The disk is too slow", self.logged("critical")[0])
        quiet.write(b"q" * 100_000)
        self.reactor.advance(SOON)
        self.assertNoResult(quiet.failed)
        self.pool.release()
        self.reactor.advance(SOON)
        loud.write(b"x" * 1000)
        self.reactor.advance(SOON)
        self.assertEqual([len(printed(file)) for file in self.files()], [200_000])
        self.assertEqual(len(open_files(self.path)), 1)
        self.assertEqual(len(self.logged("critical")), 1)

    def test_shared(self) -> None:
        """The bound is on all recordings together; and small pieces count with all that they
        take."""
        self.patch(recording_module, "_LIMIT", 1_000_000)
        recordings = self.recordings()
        loud = [self.opened(recordings, f"vm{number}") for number in range(3)]
        self.pool.held = True
        for _ in range(2200):
            for recording in loud:
                recording.write(b"x")
        self.assertEqual([recording._dropped for recording in loud], [False] * 3)
        for _ in range(2200):
            loud[0].write(b"x")
        self.assertEqual([recording._dropped for recording in loud], [True, False, False])

    def test_opening(self) -> None:
        """Who opens is told after some seconds; the file is finished when it comes after all."""
        recordings = self.recordings()
        self.pool.held = True
        opening = recordings.open(console("web1"))
        self.reactor.advance(9.9)
        self.assertNoResult(opening)
        self.reactor.advance(0.2)
        error = self.failureResultOf(opening, ConsoleUnavailable)
        self.assertIn("did not answer within 10 s", str(error.value))
        self.assertIn("did not answer", self.logged("critical")[0])
        self.pool.release()
        self.reactor.advance(SOON)
        self.assertEqual(open_files(self.path), [])

    def test_many_small(self) -> None:
        """Many recordings with a little each are bounded, too."""
        self.patch(recording_module, "_LIMIT", 1_000_000)
        recordings = self.recordings()
        each = [self.opened(recordings, f"vm{number}") for number in range(20)]
        self.pool.held = True
        for recording in each:
            recording.write(b"x" * 100_000)
        dropped = [recording._dropped for recording in each]
        self.assertLess(sum(recording.waiting for recording in each), 1_100_000)
        self.assertTrue(9 <= dropped.count(True) <= 11, dropped)

    def test_overdue(self) -> None:
        """While the disk has not answered an opening, the next ones fail at once, and the log is
        told once; when it has, all is as before."""
        recordings = self.recordings()
        self.pool.held = True
        first = recordings.open(console("web1"))
        self.reactor.advance(10.1)
        self.failureResultOf(first, ConsoleUnavailable)
        for _ in range(3):
            error = self.failureResultOf(recordings.open(console("web2")), ConsoleUnavailable)
            self.assertIn("did not answer within 10 s", str(error.value))
        self.assertEqual(len(self.logged("critical")), 1)
        self.pool.release()
        self.reactor.advance(SOON)
        self.opened(recordings, "web2").close()
        self.reactor.advance(SOON)
        self.pool.held = True
        again = recordings.open(console("web1"))
        self.reactor.advance(10.1)
        self.failureResultOf(again, ConsoleUnavailable)
        self.assertEqual(len(self.logged("critical")), 2)

    def test_given_up(self) -> None:
        """An opening that is cancelled leaves nothing open."""
        recordings = self.recordings()
        self.pool.held = True
        opening = recordings.open(console("web1"))
        opening.cancel()
        self.failureResultOf(opening)
        self.pool.release()
        self.reactor.advance(SOON)
        self.assertEqual(open_files(self.path), [])

    def test_given_up_and_failed(self) -> None:
        """One that could not have been made is logged all the same."""
        recordings = self.recordings(write=Disk(0).write)
        self.pool.held = True
        opening = recordings.open(console("web1"))
        opening.cancel()
        self.failureResultOf(opening)
        self.pool.release()
        self.assertEqual(len(self.logged("critical")), 1)

    def test_stop(self) -> None:
        """To stop takes no more than some seconds; then the log says what may be missing, and
        threads that hang are left alone."""
        recordings = self.recordings()
        self.opened(recordings, "finished").close()
        self.reactor.advance(SOON)
        recording = self.opened(recordings)
        self.pool.held = True
        recording.write(b"x")
        stopped = recordings.stopService()
        self.reactor.advance(4.9)
        self.assertNoResult(stopped)
        self.reactor.advance(0.2)
        self.successResultOf(stopped)
        self.assertIn("1 recordings", self.logged("error")[0])
        self.assertTrue(self.pool.running)
        self.pool.release()
        self.assertEqual(printed(*self.files()), "x")

    def test_slow_and_full(self) -> None:
        """One that was too slow, and then is full, fails once."""
        self.patch(recording_module, "_LIMIT", 1_000_000)
        disk = Disk(100)
        recording = self.opened(self.recordings(write=disk.write))
        self.pool.held = True
        recording.write(b"x" * 1_000_000)
        self.assertFalse(recording._dropped)
        recording.write(b"x" * 1_000_000)
        self.assertTrue(recording._dropped)
        # What has been taken by then does not fit.
        recording._pieces.appendleft((START, b"x" * 1_000_000))
        self.pool.release()
        self.reactor.advance(SOON)
        self.successResultOf(recording.failed)
        self.assertEqual(len(self.logged("critical")), 1)
        self.assertEqual(open_files(self.path), [])


class ServiceTests(RecordingTestCase):
    """Start, stop, and what is done in between."""

    def old(self, age: float) -> Path:
        """A recording that was last written so long ago."""
        path = self.path / "old,1/20200101T000000.000Z-old-0001.cast"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
        os.utime(path, (self.reactor.seconds() - age,) * 2)
        return path

    def test_directory(self) -> None:
        """The directory is made, for us alone."""
        self.recordings()
        self.assertEqual(self.path.stat().st_mode & 0o7777, 0o700)

    def test_composed(self) -> None:
        """Until the start nothing is touched; nothing can be opened before that, or after."""
        recordings = Recordings(self.reactor, self.path, required=True)
        self.assertTrue(recordings.required)
        self.assertFalse(self.path.exists())
        self.failureResultOf(recordings.open(console("web1")), ConsoleUnavailable)
        self.successResultOf(recordings.stopService())
        recordings = self.recordings()
        self.assertFalse(recordings.required)
        self.successResultOf(recordings.stopService())
        self.failureResultOf(recordings.open(console("web1")), ConsoleUnavailable)

    def test_stop(self) -> None:
        """All that is recorded is written, all files are finished, and the threads are gone."""
        recordings = self.recordings()
        one, other = self.opened(recordings), self.opened(recordings)
        one.write(b"1\xe2")
        other.write(b"2")
        self.pool.held = True
        self.reactor.advance(SOON)
        one.write(b"3")
        stopped = recordings.stopService()
        self.assertEqual(len(self.pool.waiting), 1)
        self.pool.release()
        self.reactor.advance(0)
        self.successResultOf(stopped)
        self.assertEqual(
            [printed(file) for file in self.files()], ["1\N{REPLACEMENT CHARACTER}3", "2"]
        )
        self.assertEqual(open_files(self.path), [])
        self.assertFalse(self.pool.running)
        self.assertEqual(self.reactor.getDelayedCalls(), [])

    def test_stop_opening(self) -> None:
        """What is being opened is finished, too."""
        recordings = self.recordings()
        self.pool.held = True
        opening = recordings.open(console("web1"))
        stopped = recordings.stopService()
        self.pool.release()
        self.reactor.advance(0)
        self.successResultOf(stopped)
        self.successResultOf(opening).write(b"x")
        self.assertEqual(open_files(self.path), [])
        self.assertFalse(self.pool.running)

    def test_again(self) -> None:
        """Stopped, it can be started again."""
        recordings = self.recordings()
        self.successResultOf(recordings.stopService())
        recordings.startService()
        recording = self.opened(recordings)
        recording.write(b"x")
        self.successResultOf(recordings.stopService())
        self.assertEqual(printed(*self.files()), "x")

    def test_retention(self) -> None:
        """What is too old is deleted at the start, and from then on every few minutes."""
        old = self.old(age=101)
        self.recordings(retain_age=100)
        self.assertFalse(old.exists())
        self.assertEqual(self.logged("info"), ["1 old recordings deleted, 0 bytes"])
        for _ in range(2):
            old = self.old(age=0)
            self.reactor.pump([100] * 4)
            self.assertFalse(old.exists())

    def test_clock_is_set(self) -> None:
        """What is too old is so by the time of day, as are the times in a file."""
        day = START + 1000
        self.reactor.time_of_day = lambda: day
        old = self.old(age=-899)
        recordings = self.recordings(retain_age=100)
        self.assertFalse(old.exists())
        recording = self.opened(recordings)
        day += 1.5
        recording.write(b"x")
        self.successResultOf(recordings.stopService())
        header, events = read(*self.files())
        self.assertEqual((header["timestamp"], events[0][0]), (START + 1000, 1.5))

    def test_finished(self) -> None:
        """A file that is finished makes room for itself within seconds, by age of the others."""
        recordings = self.recordings(retain_bytes=2000, max_size=1500)
        old = self.old(age=1000)
        old.write_text("x" * 1000)
        os.utime(old, (0, 0))
        recording = self.opened(recordings)
        recording.write(b"x" * 1500)
        self.reactor.advance(1)
        recording.write(b"next file")
        self.reactor.pump([1] * 10)
        self.assertFalse(old.exists())
        old = self.old(age=1000)
        old.write_text("x" * 1000)
        os.utime(old, (0, 0))
        recording.close()
        self.reactor.pump([1] * 10)
        self.assertFalse(old.exists())

    def test_finished_meanwhile(self) -> None:
        """Also one that is finished while old ones are being deleted."""
        recordings = self.recordings(retain_age=100)
        recording = self.opened(recordings)
        self.pool.held = True
        self.reactor.advance(300)
        recording.close()
        self.reactor.advance(SOON)
        self.pool.waiting.reverse()
        self.pool.release()
        old = self.old(age=200)
        self.reactor.pump([1] * 10)
        self.assertFalse(old.exists())
        calls = self.pool.calls
        self.reactor.pump([1] * 200)
        self.assertEqual(self.pool.calls, calls)

    def test_full(self) -> None:
        """A full disk is reason enough to look at once what may be deleted."""
        recording = self.opened(self.recordings(retain_age=100, write=Disk(100).write))
        old = self.old(age=200)
        recording.write(b"x" * 1000)
        self.reactor.pump([1] * 10)
        self.assertFalse(old.exists())

    def test_stop_retention(self) -> None:
        """It does not outlive the service."""
        recordings = self.recordings(retain_age=100)
        self.pool.held = True
        self.reactor.advance(300)
        old = self.old(age=200)
        stopped = recordings.stopService()
        self.pool.release()
        self.successResultOf(stopped)
        self.assertTrue(old.exists())
        self.assertEqual(self.reactor.getDelayedCalls(), [])

    def test_trouble(self) -> None:
        """What cannot be deleted is logged, and the next time comes."""
        old = self.old(age=200)
        unlink = os.unlink

        def refuse(*_: object, **__: object) -> None:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

        self.patch(os, "unlink", refuse)
        self.recordings(retain_age=100)
        self.assertIn(str(old), self.logged("error")[0])
        self.patch(os, "unlink", unlink)
        self.reactor.advance(300)
        self.assertFalse(old.exists())


class ThreadTests(TestCase):
    """With threads as they are."""

    async def test_elsewhere(self) -> None:
        """Nothing is written on the reactor's thread, and all of it is written in order."""
        from twisted.internet import reactor

        threads: set[threading.Thread] = set()

        def write(descriptor: int, data: bytes) -> int:
            threads.add(threading.current_thread())
            return os.write(descriptor, data)

        path = Path(self.mktemp()).absolute()
        recordings = Recordings(reactor, path, max_size=100_000, write=write)
        recordings.startService()
        recording = await recordings.open(console("web1"))
        text = "".join(f"{number} ├┤\n" for number in range(100_000))
        data = text.encode()
        for start in range(0, len(data), 1001):
            recording.write(data[start : start + 1001])
            if start % 7 == 0:
                await deferLater(reactor, 0)
        await recordings.stopService()
        self.assertEqual(printed(*sorted(path.rglob("*.cast"))), text)
        self.assertNotIn(threading.current_thread(), threads)
        self.assertTrue(all(thread.daemon for thread in threads))
        self.assertEqual([thread for thread in threads if thread.is_alive()], [])


def fill(directory: str) -> None:
    """Record until the disk is full; then make room, and record once more. Says how it went."""

    async def run(reactor: Any) -> None:
        path = Path(directory, "recordings")
        recordings = Recordings(reactor, path)
        recordings.startService()
        recording = await recordings.open(console("web1"))
        while not recording.failed.called:
            recording.write(b"0123456789abcdef" * 16)
            await deferLater(reactor, 0.001)
        told = await recording.failed
        (file,) = path.rglob("*.cast")
        first = file.read_text()
        file.unlink()
        recording = await recordings.open(console("web1"))
        recording.write(b"again")
        await recordings.stopService()
        (file,) = path.rglob("*.cast")
        print(json.dumps([told, first, file.read_text()]))

    react(run)


class RealDiskTestCase(SynchronousTestCase):
    """Has disks that are full in earnest."""

    def fills(self, *under: str, limit: int | None = None) -> str:
        """The sentence that it ends with, after files that play."""
        directory = Path(self.mktemp()).absolute()
        directory.mkdir()
        code = (
            f"import sys; sys.path[:] = {sys.path!r}; sys.dont_write_bytecode = True\n"
            f"from tests.test_recording import fill, limited\nlimited({limit}, fill, sys.argv[1])"
        )
        command = [*under, sys.executable, "-c", code, str(directory)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        self.assertEqual(done.returncode, 0, done.stderr)
        told, first, again = json.loads(done.stdout)
        lines = first.split("\n")
        self.assertEqual(lines.pop(), "")
        self.assertGreater(len(lines), 10)
        for line in lines:
            json.loads(line)
        self.assertIn('"again"]\n', again)
        return told


class FileLimitTests(RealDiskTestCase):
    """A file that may not grow."""

    def test_limit(self) -> None:
        """Our own limit of a file's size, which needs no privileges."""
        self.assertIn("File too large", self.fills(limit=65536))


def limited(size: int | None, call: Callable[[str], None], argument: str) -> None:
    """Call it with a limit of a file's size."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size or soft, hard))
    try:
        call(argument)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# The last argument is the directory.
MOUNT = (
    *("unshare", "-m", "sh", "-c"),
    'for last; do :; done; mount -t tmpfs -o size=64k none "$last" && exec "$@"',
    "sh",
)


def may_mount() -> bool:
    """Whether we may have a file system of our own."""
    try:
        probe = subprocess.run([*MOUNT, "true", "/mnt"], capture_output=True)
    except OSError:
        return False
    return probe.returncode == 0


if may_mount():

    class FullDiskTests(RealDiskTestCase):
        """Where we may mount one: a small file system."""

        def test_full(self) -> None:
            """No space is left."""
            self.assertIn("No space left on device", self.fills(*MOUNT))
