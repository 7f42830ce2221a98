"""The main job: the real ssh, through the proxy, to the consoles of real guests."""

from __future__ import annotations

import os
import termios

from twisted.internet.threads import deferToThread

from tests.functional.case import FunctionalTestCase
from tests.functional.site import log_in


class ConsoleTests(FunctionalTestCase):
    """Ways in, on, and out."""

    async def test_menu(self) -> None:
        """The menu, a wrong answer, a filter, the right one, the console, ``^] .``, and 0; the
        terminal is as it was before."""
        ssh = self.site.ssh(self.alice)
        before = termios.tcgetattr(ssh.transport.fileno())
        menu = await ssh.expect(rb"1\. light1 \[[0-9a-f-]{36}\]\r\n2\. light2 .*\r\n> ")
        self.assertIn(b"4. none1 [", menu[0])
        ssh.type(b"99\r")
        await ssh.expect(rb"There is no 99: choose 1 to 6\.\r\n> ")
        ssh.type(b"/T2\r")
        await ssh.expect(rb"1\. light2 \[\S+\]\r\n1-1 of 1 matching T2\..*/: all.*\r\n> ")
        ssh.type(b"light1\r")
        await ssh.expect(rb"\[vmconsole: light1 on node1\. To leave: \^\] \. ")
        ssh.type(b"hello")
        await ssh.expect(rb"hello")
        during = termios.tcgetattr(ssh.transport.fileno())
        self.assertNotEqual(before, during)
        ssh.type(b"\x1d.")
        await ssh.expect(rb"\[vmconsole: You left light1\.\]")
        self.assertEqual(await ssh.ended(), 0)

    async def test_implicit(self) -> None:
        """With one VM there is no menu."""
        ssh = self.site.ssh(self.bob)
        await ssh.expect(rb"^\r\n\[vmconsole: light1 on node1")
        ssh.type(b"\x1d.")
        self.assertEqual(await ssh.ended(), 0)

    async def test_explicit(self) -> None:
        """By name, by id, by a beginning, and as ovirt-vmconsole's users say it."""
        vm_id = (await deferToThread(self.lab.node2.uuid, "light2")).strip()
        for words in (
            ("light2",),
            (vm_id,),
            (vm_id[:13],),
            ("connect", "--vm-name", "light2"),
            ("connect", f"--vm-id={vm_id}"),
        ):
            ssh = self.site.ssh(self.alice, *words)
            await ssh.expect(rb"\[vmconsole: light2 on node2")
            ssh.type(b"\x1d.")
            self.assertEqual(await ssh.ended(), 0, words)

    async def test_every_byte(self) -> None:
        """All 256 values reach the guest, and what it prints comes back, byte for byte."""
        ssh = self.site.ssh(self.bob)
        await ssh.expect(rb"To leave.*\r\n")
        ssh.type(b"<")
        await ssh.expect(rb"<")
        every = bytes(range(256)) + bytes(range(255, -1, -1))
        ssh.type(every.replace(b"\x1d", b"\x1d\x1d") + b"<end>")
        match = await ssh.expect(rb"(.*)<end>")
        self.assertEqual(match[1], every)

    async def test_without_a_terminal(self) -> None:
        """-tt from a pipe: typed at once, end of input, and everything arrives before it ends."""
        ssh = self.site.ssh(self.bob, terminal=False, options=("RequestTTY=force",))
        ssh.type(b"early words")
        ssh.end_input()
        self.assertEqual(await ssh.ended(), 0)
        self.assertIn(b"early words", ssh.seen)
        self.assertIn(b"The input ended; you left light1.", ssh.seen)

    async def test_keys_reach_linux(self) -> None:
        """Ctrl-C, Ctrl-Z, Ctrl-\\ and arrow keys do in the guest what they do there."""
        ssh = self.site.ssh(self.alice, "linux1")
        await ssh.expect(rb"To leave")
        await log_in(ssh, "linux1")
        for keys, after in ((b"\x03", rb"\^C.*"), (b"\x1a", rb"\^Z.*Stopped.*")):
            # Until cat answers, the keys would be the shell's; its line editor reads ahead.
            ssh.type(b"echo run$((40 + 2)); cat\r")
            await ssh.expect(rb"run42\r\n")
            ssh.type(b"ready\r")
            await ssh.expect(rb"ready\r\nready\r\n")
            ssh.type(keys)
            await ssh.expect(after + rb"linux1:\S+ ")
        ssh.type(b"kill -9 %1; wait; echo $((6*7))\r")
        await ssh.expect(rb"\r\n42\r\n.*linux1:\S+ ")
        ssh.type(b"stty -isig -icanon; echo run$((3)); head -c 1 | od -An -tx1; stty sane\r")
        await ssh.expect(rb"run3\r\n")
        ssh.type(b"\x1c")
        await ssh.expect(rb" 1c\r\n.*linux1:\S+ ")
        ssh.type(b"echo arrow $((7*8))\r")
        await ssh.expect(rb"arrow 56\r\n.*linux1:\S+ ")
        ssh.type(b"\x1b[A\r")
        await ssh.expect(rb"arrow 56\r\n.*linux1:\S+ ")
        ssh.type(b"exit\r")
        await ssh.expect(rb"linux1 login: ")
        ssh.type(b"\x1d.")
        self.assertEqual(await ssh.ended(), 0)

    async def test_escape_help(self) -> None:
        """A lone ``^]`` shows the help; ``^] ^]`` is one ``^]`` for the guest."""
        ssh = self.site.ssh(self.bob)
        await ssh.expect(rb"To leave.*\r\n")
        ssh.type(b"\x1d")
        await ssh.expect(rb"\[vmconsole: \^\] and then: \. leave, ", 5)
        ssh.type(b"\x1d")
        await ssh.expect(rb"\x1d")
        ssh.type(b"\x1d?")
        await ssh.expect(rb"\^\] and then: \. leave, .*\? this help\]\r\n")

    async def test_list_info_help(self) -> None:
        """``list`` in both formats, ``info`` and ``help`` need no terminal, and end with 0."""
        ssh = self.site.ssh(self.bob, "list", terminal=False)
        self.assertEqual(await ssh.ended(), 0)
        self.assertRegex(ssh.seen, rb"^[0-9a-f-]{36}\tlight1\n$")
        for words, pattern in (
            (("list", "--format", "json"), rb'"vmname": "light1"'),
            (("info",), rb"user: bob@internal"),
            (("help",), rb"connect \[--vm-id"),
        ):
            ssh = self.site.ssh(self.bob, *words, terminal=False)
            self.assertEqual(await ssh.ended(), 0)
            self.assertRegex(ssh.seen, pattern)

    async def test_two_sessions_of_one_connection(self) -> None:
        """ssh's ControlMaster: a second session on the same connection, and one may leave."""
        control = ("ControlMaster=auto", f"ControlPath={self.site.folder}/c", "ControlPersist=no")
        first = self.site.ssh(self.alice, "light1", options=control)
        await first.expect(rb"light1 on node1")
        second = self.site.ssh(self.alice, "light2", options=control)
        await second.expect(rb"light2 on node2")
        second.type(b"\x1d.")
        self.assertEqual(await second.ended(), 0)
        first.type(b"still here")
        await first.expect(rb"still here")

    async def test_audit(self) -> None:
        """The log has who, from where, which VM, and the bytes both ways."""
        ssh = self.site.ssh(self.bob)
        await ssh.expect(rb"To leave.*\r\n")
        ssh.type(b"12345")
        await ssh.expect(rb"12345")
        ssh.type(b"\x1d.")
        await ssh.ended()
        await self.site.log(
            rb"login accepted session=(\w+) user='bob@internal' .*fingerprint=SHA256:\S+ "
            rb"certificate='' "
            rb"address=127\.0\.0\.1.*attached session=\1 .*vm='light1' .*host='node1'.*"
            rb"detached session=\1 .*bytes_in=5 bytes_out=\d+ .*reason='You left light1\.'"
        )

    async def test_closed_channel(self) -> None:
        """A client that closes its channel and keeps its connection, as ssh's ControlMaster does
        when a session's own ssh is killed, frees the console."""
        control = ("ControlMaster=auto", f"ControlPath={self.site.folder}/c", "ControlPersist=no")
        first = self.site.ssh(self.alice, "light2", options=control)
        await first.expect(rb"light2 on node2")
        second = self.site.ssh(self.alice, "light1", options=control)
        await second.expect(rb"light1 on node1")
        await second.kill()
        await self.site.log(rb"detached .*vm='light1' .*reason='The ssh connection ended\.'")
        third = self.site.ssh(self.bob)
        await third.expect(rb"light1 on node1")
        first.type(b"still here")
        await first.expect(rb"still here")

    async def test_left_console_is_free(self) -> None:
        """Leaving, also by killing ssh, frees the console for the next one at once."""
        for _ in range(5):
            ssh = self.site.ssh(self.bob)
            await ssh.expect(rb"light1 on node1")
            os.kill(ssh.transport.pid, 9)
            await ssh.ended()
            await self.site.log(rb"detached ")
        out = await deferToThread(self.lab.node1.virsh, "domstate", "light1")
        self.assertIn("running", out)
