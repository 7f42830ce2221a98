"""Several users on one console, what it printed before, and what else its keys do; for real."""

from __future__ import annotations

import re
from pathlib import Path

from twisted.internet import reactor
from twisted.internet.threads import deferToThread

from tests import lab
from tests.functional.case import FunctionalTestCase
from tests.functional.process import Child
from tests.functional.remote import RemoteTestCase
from tests.functional.site import booted, log_in

ALICE, BOB = rb"alice@internal from 127\.0\.0\.1", rb"bob@internal from 127\.0\.0\.1"
# A query that a terminal answers as if it had been typed: which one it is.
QUERY = b"\x1b[c"
# Tries of something that comes within a second or so.
_TRIES = 100


def said(text: bytes) -> bytes:
    """The pattern of a line of the proxy's own; ``text`` is a pattern, too."""
    # A terminal that ssh has not yet set to raw adds a return of its own.
    return rb"\[vmconsole: " + text + rb"\]\r+\n"


class SharedCase(FunctionalTestCase):
    """Ways to attach."""

    async def attach(self, key: Path, *words: str, options: tuple[str, ...] = ()) -> Child:
        """An ssh on a console, light1's unless ``words`` say another."""
        ssh = self.site.ssh(key, *(words or ("light1",)), options=options)
        await ssh.expect(said(rb"\w+ on node1\. To leave: \^\] \. \(help: \^\] \?\)"))
        return ssh

    async def both(self) -> tuple[Child, Child]:
        """Alice, who has the keyboard, and Bob, who watches."""
        alice = await self.attach(self.alice)
        await self.types(alice, b"<a>")
        bob = await self.attach(self.bob)
        await bob.expect(
            said(
                rb"You watch\. " + ALICE + rb" has the keyboard, [^\]]*idle for \d+ seconds?\. "
                rb"\^\] t asks for the keyboard\."
            )
        )
        return alice, bob

    async def types(self, who: Child, text: bytes, *seen_by: Child) -> None:
        """``who`` types into light1, which echoes; everybody sees it."""
        who.type(text)
        for ssh in (who, *seen_by):
            await ssh.expect(re.escape(text))

    async def leave(self, *everybody: Child) -> None:
        """They leave, one after the other."""
        for ssh in everybody:
            ssh.type(b"\x1d.")
            self.assertEqual(await ssh.ended(), 0)

    async def command(self, key: Path, *words: str, status: int = 0) -> bytes:
        """What a command without a terminal prints."""
        ssh = self.site.ssh(key, *words, terminal=False)
        self.assertEqual(await ssh.ended(), status, (words, ssh.errors))
        return ssh.seen if status == 0 else ssh.errors


class SharingTests(SharedCase):
    """One has the keyboard, the others watch."""

    async def test_one_types(self) -> None:
        """All see what the guest prints; only who has the keyboard types, and the others are told
        once, and get the bell, when they try."""
        alice, bob = await self.both()
        await self.types(alice, b"one ", bob)
        bob.type(b"two ")
        await bob.expect(
            rb"\x07.*"
            + said(
                rb"You watch\. " + ALICE + rb" has the keyboard, [^\]]*idle for \d+ seconds?\. "
                rb"\^\] t asks for it\."
            )
        )
        bob.type(b"three ")
        await bob.expect(rb"\x07")
        await self.types(alice, b"four", bob)
        self.assertTrue(alice.seen.endswith(b"<a>one four"), alice.seen)
        await self.leave(bob)
        await self.types(alice, b"five")
        await self.leave(alice)

    async def test_ask_and_give(self) -> None:
        """``^] t`` of who watches asks, and that of the holder gives; both hear each step, and so
        does a third."""
        alice, bob = await self.both()
        third = await self.attach(self.bob)
        bob.type(b"\x1dt")
        await bob.expect(
            said(
                ALICE + rb" has the keyboard, [^\]]*idle for \d+ seconds?\. They were asked; "
                rb"60 seconds after their last key it passes\. \^\] t again takes it\."
            )
        )
        await alice.expect(
            said(
                BOB + rb" asks for the keyboard; 60 seconds after your last key it passes\. "
                rb"\^\] t gives it, \^\] n keeps it\."
            )
        )
        await self.types(alice, b"not yet ", bob, third)
        alice.type(b"\x1dt")
        await alice.expect(
            said(
                ALICE + rb" gave it\. " + BOB + rb" has the keyboard now; you watch\. "
                rb"\^\] t asks for it\."
            )
        )
        await bob.expect(said(ALICE + rb" gave it\. You have the keyboard\."))
        await third.expect(said(ALICE + rb" gave it\. " + BOB + rb" has the keyboard now\."))
        await self.types(bob, b"bob types", alice, third)
        alice.type(b"?")
        await alice.expect(said(rb"You watch\. " + BOB + rb" has the keyboard, .*"))
        await self.leave(alice, bob, third)

    async def test_keep_and_take(self) -> None:
        """``^] n`` keeps it, and who asked is told; others may ask then. ``^] t`` again takes it,
        and who had it is told who did."""
        alice, bob = await self.both()
        bob.type(b"\x1dt")
        await alice.expect(BOB + rb" asks for the keyboard")
        await bob.expect(rb"They were asked")
        alice.type(b"\x1dn")
        await alice.expect(said(rb"You keep the keyboard; " + BOB + rb" is told\."))
        await bob.expect(said(ALICE + rb" keeps the keyboard\. \^\] t again takes it\."))
        await self.types(alice, b"kept", bob)
        third = await self.attach(self.alice)
        third.type(b"\x1dt")
        await alice.expect(ALICE + rb" asks for the keyboard")
        bob.type(b"\x1dt")
        await bob.expect(said(BOB + rb" took it\. You have the keyboard\."))
        await alice.expect(
            said(
                BOB + rb" took it\. " + BOB + rb" has the keyboard now; you watch\. "
                rb"\^\] t asks for it\."
            )
        )
        await self.types(bob, b"taken", alice, third)
        await self.leave(alice, third, bob)

    async def test_queries(self) -> None:
        """A query that the guest prints reaches the terminal of who has the keyboard alone: the
        answers of the others' would go nowhere."""
        alice, bob = await self.both()
        alice.type(b"(" + QUERY + b"\x1b[1m)")
        await alice.expect(rb"\(\x1b\[c\x1b\[1m\)")
        await bob.expect(rb"\(\x1b\[1m\)")
        await self.leave(alice, bob)

    async def test_leaving(self) -> None:
        """Who leaves passes the keyboard to who waited longest, also by a dying ssh; who asked to
        watch only takes it when nobody has it."""
        alice, bob = await self.both()
        watcher = await self.attach(self.alice, "watch light1")
        last = await self.attach(self.alice)
        await self.leave(alice)
        await bob.expect(said(ALICE + rb" left\. You have the keyboard\."))
        for ssh in (watcher, last):
            await ssh.expect(said(ALICE + rb" left\. " + BOB + rb" has the keyboard\."))
        await self.types(bob, b"inherited", watcher, last)
        await bob.kill()
        await last.expect(said(BOB + rb" left\. You have the keyboard\."))
        await self.types(last, b"inherited again", watcher)
        await self.leave(last)
        await watcher.expect(said(ALICE + rb" left\. Nobody has the keyboard\. \^\] t takes it\."))
        watcher.type(b"\x1dt")
        await watcher.expect(said(rb"You have the keyboard\."))
        await self.types(watcher, b"taken")
        await self.leave(watcher)

    async def test_watch(self) -> None:
        """``watch VM`` on a console that nobody has: nobody gets the keyboard until somebody
        comes who wants it."""
        watcher = await self.attach(self.bob, "watch", "light1")
        await watcher.expect(said(rb"You watch\. Nobody has the keyboard\. \^\] t takes .*"))
        watcher.type(b"lost")
        await watcher.expect(said(rb"Nobody has the keyboard\. \^\] t takes it\."))
        alice = await self.attach(self.alice)
        await self.types(alice, b"typed", watcher)
        self.assertNotIn(b"lost", watcher.seen)
        await self.leave(watcher, alice)

    async def test_who(self) -> None:
        """``who`` and ``^] w``: everybody on the console, the holder first; of other people's
        VMs nothing."""
        self.assertEqual(await self.command(self.bob, "who"), b"")
        alice, bob = await self.both()
        there = await self.attach(self.alice, "linux1")
        rows = (
            rb"light1\t" + ALICE + rb": here for \d+ seconds?, has the keyboard, idle for \d+ "
            rb"seconds?\n",
            rb"light1\t" + BOB + rb": here for \d+ seconds?, watches\n",
            rb"linux1\t" + ALICE + rb": here for .*\n",
        )
        self.assertRegex(await self.command(self.bob, "who"), rb"^" + rows[0] + rows[1] + rb"$")
        self.assertRegex(await self.command(self.alice, "who"), rb"^" + b"".join(rows) + rb"$")
        self.assertRegex(await self.command(self.alice, "who linux1"), rb"^" + rows[2] + rb"$")
        bob.type(b"\x1dw")
        await bob.expect(
            said(ALICE + rb": here for .*has the keyboard, idle for .*")
            + rb".*"
            + said(BOB + rb": here for .*watches")
        )
        await self.leave(alice, bob, there)

    async def test_same_connection(self) -> None:
        """Two sessions of one ssh connection share as any others do."""
        control = ("ControlMaster=auto", f"ControlPath={self.site.folder}/c", "ControlPersist=no")
        first = await self.attach(self.alice, options=control)
        second = await self.attach(self.alice, options=control)
        await second.expect(rb"You watch\. " + ALICE + rb" has the keyboard")
        await self.types(first, b"shared", second)
        await self.leave(second, first)

    async def test_back_to_the_menu(self) -> None:
        """``^] m`` leads back to the menu, and from there to another console or out."""
        alice = await self.attach(self.alice)
        alice.type(b"\x1dm")
        await alice.expect(said(rb"You left light1\.") + rb".*1\. light1 \[.*\r\n> $")
        alice.type(b"light2\r")
        await alice.expect(rb"light2 on node2\. To leave")
        await self.types(alice, b"in the other one")
        alice.type(b"\x1dm")
        await alice.expect(said(rb"You left light2\.") + rb".*\r\n> $")
        alice.type(b"q\r")
        self.assertEqual(await alice.ended(), 0)


class IdleTests(SharedCase):
    """A holder who does not answer."""

    configuration = "[console]\nhandover_idle = 1.0\n"

    async def test_passes_by_itself(self) -> None:
        """A while after the holder's last key it passes to who asked; a holder who has been idle
        for that long is not asked."""
        alice, bob = await self.both()
        for holder, name, asker, heir in ((alice, ALICE, bob, BOB), (bob, BOB, alice, ALICE)):
            asker.type(b"\x1dt")
            await asker.expect(
                said(name + rb" was idle for \d+ seconds?\. You have the keyboard\.")
            )
            await holder.expect(
                said(
                    name + rb" was idle for \d+ seconds?\. " + heir + rb" has the keyboard now; "
                    rb"you watch\. \^\] t asks for it\."
                )
            )
            await self.types(asker, b"mine", holder)
        await self.leave(alice, bob)


class NoTakeoverTests(SharedCase):
    """Where the configuration allows nobody to take a keyboard."""

    configuration = "[console]\ntakeover = false\n"

    async def test_refused(self) -> None:
        """Asking twice is no taking; and who was refused may ask again."""
        alice, bob = await self.both()
        bob.type(b"\x1dt")
        await bob.expect(said(rb".*They were asked; 60 seconds after their last key it passes\."))
        bob.type(b"\x1dt")
        await bob.expect(said(ALICE + rb" has been asked\."))
        alice.type(b"\x1dn")
        await bob.expect(said(ALICE + rb" keeps the keyboard\."))
        await self.types(alice, b"kept", bob)
        bob.type(b"\x1dt")
        await bob.expect(rb"They were asked")
        await self.leave(alice, bob)


class ViewerTests(RemoteTestCase):
    """An engine that knows roles."""

    async def test_viewer(self) -> None:
        """A viewer watches, and can do nothing else; nor do they get a keyboard that is free."""
        self.engine.extras = True
        self.engine.grant("bob", self.vms["light1"], "viewer")
        bob = self.site.ssh(self.bob, "light1")
        await bob.expect(said(rb"You may only watch light1\. Nobody has the keyboard\."))
        for keys in (b"x", b"\x1dt", b"\x1db", b"\x1dsh", b"\x1dz"):
            bob.type(keys)
            await bob.expect(rb"\x07|" + said(rb"You may only watch light1\b.*"))
        alice = self.site.ssh(self.alice, "light1")
        await alice.expect(rb"light1 on node1")
        await self.works(alice)
        await bob.expect(rb"<1>")
        alice.type(b"\x1d.")
        await bob.expect(said(ALICE + rb" left\. Nobody has the keyboard\."))
        bob.type(b"\x1d.")
        self.assertEqual(await bob.ended(), 0)
        self.assertEqual(await alice.ended(), 0)


class ScrollbackTests(SharedCase):
    """What was printed before."""

    async def until(self, pattern: bytes, *words: str) -> None:
        """Run a command until what it prints matches."""
        for _ in range(_TRIES):
            printed = await self.command(self.alice, *words)
            if re.search(pattern, printed):
                return
        self.fail(f"{pattern!r} did not come: {printed!r}")

    async def test_replay(self) -> None:
        """Who attaches sees what was printed before, behind a line that says so, without what
        would make their terminal type; and so does ``^] r``. Who was there saw it as it was."""
        first = await self.attach(self.alice, "linux1")
        await log_in(first, "linux1")
        first.type(b"printf 'mark%d\\033[cend%d\\n' 1 2\r")
        await first.expect(rb"mark1\x1b\[cend2\r\n.*linux1:\S+ ")
        second = await self.attach(self.alice, "linux1")
        replayed = await second.expect(said(rb"What linux1 printed last:") + rb".*mark1end2\r\n")
        self.assertNotIn(QUERY, replayed[0])
        second.type(b"\x1dr")
        replayed = await second.expect(said(rb"What linux1 printed last:") + rb".*mark1end2\r\n")
        self.assertNotIn(QUERY, replayed[0])
        first.type(b"echo live$((1))\r")
        await second.expect(rb"live1\r\n")
        await self.leave(second, first)

    async def test_linger(self) -> None:
        """What is printed while nobody is there is shown to who comes soon; when the last one has
        left, the console is kept for a while."""
        first = await self.attach(self.alice, "linux1")
        await log_in(first, "linux1")
        first.type(
            b"(until [ -e /tmp/go ]; do sleep 0.1; done; echo late$((40 + 2))) & : > /tmp/go\r"
        )
        await self.leave(first)
        await self.until(rb"late42\r\n", "log", "linux1")
        second = await self.attach(self.alice, "linux1")
        await second.expect(said(rb"What linux1 printed last:") + rb".*late42\r\n")
        second.type(b"rm /tmp/go\r")
        await second.expect(rb"linux1:\S+ ")
        await self.leave(second)

    async def test_log(self) -> None:
        """``log VM`` prints what is kept, ``--bytes`` the end of it, ``--raw`` byte for byte; a
        console that is not open has none."""
        error = await self.command(self.bob, "log", "light1", status=1)
        self.assertRegex(error, rb"^ERROR: Nothing is kept of light1: nobody has its console open")
        ssh = await self.attach(self.bob)
        await self.types(ssh, b"kept " + QUERY + b"\x00\xff")
        kept = await self.command(self.alice, "log", "light1", "--raw")
        self.assertTrue(kept.endswith(b"kept " + QUERY + b"\x00\xff"), kept)
        harmless = await self.command(self.alice, "log", "light1")
        self.assertTrue(harmless.endswith(b"kept \xff"), harmless)
        self.assertEqual(await self.command(self.bob, "log light1 --raw --bytes 4"), b"[c\x00\xff")
        self.assertEqual(await self.command(self.bob, "log light1 --bytes 0"), b"")
        await self.leave(ssh)
        self.assertEqual(await self.command(self.bob, "log --bytes=4 light1 --raw"), b"[c\x00\xff")

    async def test_follow(self) -> None:
        """``log --follow`` goes on with what is printed, and nothing else, until Ctrl-C, or until
        its reader is gone; it opens a console that is not open."""
        closed = self.site.ssh(self.bob, "log light1 --follow", terminal=False)
        await self.site.log(rb"login accepted .*'bob@internal'")
        await self.until(rb"bob.*watches", "who")
        ssh = await self.attach(self.alice)
        await self.types(ssh, b"typed ", closed)
        interrupted = self.site.ssh(self.bob, "log light1 --bytes 3 --follow")
        await interrupted.expect(rb"^ed $")
        await self.types(ssh, b"more", closed, interrupted)
        interrupted.type(b"\x03")
        self.assertEqual(await interrupted.ended(), 0)
        await closed.kill("TERM")
        await self.until(rb"^[^\n]*alice[^\n]*\n$", "who")
        await self.types(ssh, b"end")
        self.assertEqual(closed.seen, b"typed more")
        await self.leave(ssh)

    async def test_nothing_is_kept(self) -> None:
        """A console that was closed on its host, here by a VM that went, keeps nothing."""
        await deferToThread(self.lab.node1.run, lab.LightGuest("brief"))
        self.addCleanup(deferToThread, self.lab.node1.remove, "brief")
        ssh = await self.attach(self.alice, "brief")
        await booted(ssh)
        await self.types(ssh, b"words")
        await deferToThread(self.lab.node1.destroy, "brief")
        await ssh.expect(rb"brief was powered off\.")
        await self.leave(ssh)
        await self.command(self.alice, "log", "brief", status=1)


class TerminalTests(SharedCase):
    """The user's own terminal."""

    async def test_set_back(self) -> None:
        """On leaving, what the guest did to the terminal is undone: the alternate screen, the
        mouse, bracketed paste, a hidden cursor."""
        ssh = await self.attach(self.bob)
        await self.types(ssh, b"\x1b[?1049h\x1b[?1000h\x1b[?2004h\x1b[?25l")
        ssh.type(b"\x1d.")
        back = await ssh.expect(rb".*" + said(rb"You left light1\."))
        for mode in (b"?1049l", b"?1000l", b"?2004l", b"?25h"):
            self.assertIn(b"\x1b[" + mode, back[0])
        self.assertEqual(await ssh.ended(), 0)

    async def test_size(self) -> None:
        """``^] z`` types the size of the user's terminal into the guest's shell."""
        ssh = await self.attach(self.alice, "linux1")
        await log_in(ssh, "linux1")
        ssh.type(b"stty rows 5 cols 200\r")
        await ssh.expect(rb"cols 200\r\n.*linux1:\S+ ")
        ssh.type(b"\x1dz")
        await ssh.expect(rb"stty rows 24 cols 80\r\n.*linux1:\S+ ")
        ssh.type(b"stty size\r")
        await ssh.expect(rb"\n24 80\r\n.*linux1:\S+ ")
        await self.leave(ssh)


class BreakTests(SharedCase):
    """Where BREAK is allowed."""

    configuration = "[console]\nbreak = true\n"

    async def test_break(self) -> None:
        """``^] b`` and ssh's own ``~B``, each with a letter, make Linux print SysRq's help; so does
        ``^] s h``. Only who has the keyboard may."""
        ssh = await self.attach(self.alice, "linux1", options=("EscapeChar=~",))
        await log_in(ssh, "linux1")
        for keys in (b"\x1db", b"\r~B"):
            ssh.type(keys)
            await ssh.expect(said(rb"BREAK was sent\."))
            ssh.type(b"h")
            await ssh.expect(rb"sysrq: HELP : ")
        ssh.type(b"\x1dsh")
        await ssh.expect(rb"sysrq: HELP : ")
        watcher = await self.attach(self.alice, "watch linux1")
        for keys in (b"\x1db", b"\x1dsh"):
            watcher.type(keys)
            await watcher.expect(said(rb"You watch\. " + ALICE + rb" has the keyboard, .*"))
        ssh.type(b"\recho end$((1))\r")
        await ssh.expect(rb"end1\r\n")
        await self.leave(watcher, ssh)


class NoBreakTests(SharedCase):
    """Where BREAK is not allowed, as by default."""

    async def test_sysrq(self) -> None:
        """SysRq goes by the guest's keyboard; BREAK is refused with the setting's name, and the
        session goes on."""
        ssh = await self.attach(self.alice, "linux1")
        await log_in(ssh, "linux1")
        ssh.type(b"\x1dsh")
        await ssh.expect(rb"sysrq: HELP : ")
        ssh.type(b"\x1db")
        await ssh.expect(said(rb"BREAK is not allowed here: set console\.break in .*"))
        ssh.type(b"\recho end$((1))\r")
        await ssh.expect(rb"end1\r\n")
        await self.leave(ssh)


class ForceCase(SharedCase):
    """Beside a real virsh on the host."""

    async def virsh(self) -> Child:
        """A virsh that has light1's console."""
        virsh = Child("virsh").spawn(
            reactor,
            ["/usr/bin/virsh", "-c", self.lab.node1.uri, "console", "light1"],
            terminal=True,
        )
        self.addCleanup(virsh.kill)
        await virsh.expect(rb"Escape character is")
        virsh.type(b"theirs")
        await virsh.expect(rb"theirs")
        return virsh


class ForceTests(ForceCase):
    """Where the configuration allows to take a console from another program."""

    configuration = "[console]\nforce = true\n"

    async def test_taken(self) -> None:
        """Without ``--force`` the other program keeps it; with it virsh ends, and the console is
        ours."""
        virsh = await self.virsh()
        error = self.site.ssh(self.bob, "light1")
        self.assertEqual(await error.ended(), 1)
        self.assertRegex(error.seen, rb"ERROR: The console of light1 is in use by another program ")
        virsh.type(b"undisturbed")
        await virsh.expect(rb"undisturbed")
        ssh = await self.attach(self.bob, "connect --vm-name light1 --force")
        await virsh.ended()
        await self.types(ssh, b"ours")
        await self.leave(ssh)


class NoForceTests(ForceCase):
    """Where it does not, as by default."""

    async def test_refused(self) -> None:
        """``--force`` is refused with the setting's name; virsh keeps the console."""
        virsh = await self.virsh()
        ssh = self.site.ssh(self.bob, "connect --vm-name light1 --force")
        self.assertEqual(await ssh.ended(), 1)
        self.assertRegex(ssh.seen, rb"ERROR: .*by force.* set console\.force in ")
        virsh.type(b"undisturbed")
        await virsh.expect(rb"undisturbed")
