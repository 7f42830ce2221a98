"""A user's commands, over a real ssh connection in memory."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import msgspec
from twisted.internet.defer import Deferred
from twisted.trial.unittest import SynchronousTestCase

from tests.fakes import console
from tests.sshpair import ALICE, PTY, SSHPair
from vmconsole.config import Console as ConsoleSettings
from vmconsole.errors import ConsoleBusy, ConsoleGone, ConsoleUnavailable, EngineUnreachable
from vmconsole.ssh.session import SessionChannel


class SessionTestCase(SynchronousTestCase):
    """Alice is logged in; she may open vm1 and vm2."""

    def setUp(self) -> None:
        self.pair = SSHPair()
        self.pair.engine.vms[ALICE.id] = [console("vm1"), console("vm2")]
        self.pair.login()

    def only_vm1(self) -> None:
        """Alice may open vm1 alone."""
        self.pair.engine.vms[ALICE.id] = [console("vm1")]

    def no_console_on_vm2(self) -> None:
        """The engine says that vm2's console cannot be opened."""
        stuck = msgspec.structs.replace(console("vm2"), problem="no \x1b console")
        self.pair.engine.vms[ALICE.id] = [console("vm1"), stuck]

    def connected_anew(self) -> Any:
        """A channel on vm1, whatever was before."""
        channel = self.pair.run(b"vm1", pty=True)
        self.assertTrue(self.pair.guests.guest.open)
        return channel

    def connected(self, **options: Any) -> Any:
        """A channel that is attached to vm1."""
        channel = self.pair.run(b"vm1", pty=True, **options)
        self.assertEqual(len(self.pair.guests.opened), 1, channel.output + channel.error)
        return channel


class CommandTests(SessionTestCase):
    """What can be said on the command line, and the exit status of each."""

    def test_list_plain(self) -> None:
        """``list`` prints an id, a tab and a name for each VM, and ends with 0."""
        channel = self.pair.run(b"list")
        self.assertEqual(channel.output, b"id-vm1\tvm1\nid-vm2\tvm2\n")
        self.assertEqual(channel.status, 0)
        self.assertTrue(channel.gone)

    def test_list_json(self) -> None:
        """``list --format json`` prints the engine's entries, with ovirt-vmconsole's keys."""
        channel = self.pair.run(b"list --format json")
        self.assertEqual(
            json.loads(channel.output)[0],
            {"vmid": "id-vm1", "vmname": "vm1", "host": "node1", "console": "default"},
        )
        self.assertEqual(channel.status, 0)

    def test_list_problems(self) -> None:
        """Of a VM whose console cannot be opened ``--format json`` tells why, as it came; for
        others there is no such key, and ``list`` alone is what it always is."""
        self.no_console_on_vm2()
        entries = json.loads(self.pair.run(b"list --format json").output)
        self.assertEqual([each.get("problem") for each in entries], [None, "no \x1b console"])
        self.assertNotIn("problem", entries[0])
        self.assertEqual(self.pair.run(b"list").output, b"id-vm1\tvm1\nid-vm2\tvm2\n")

    def test_names_are_escaped(self) -> None:
        """A name with control characters reaches the terminal escaped, never as they are."""
        self.pair.engine.vms[ALICE.id] = [console("evil\x1b[2J\nname")]
        channel = self.pair.run(b"list")
        self.assertNotIn(b"\x1b", channel.output)
        self.assertIn(b"evil\\x1b[2J\\nname\n", channel.output)

    def test_help_and_info(self) -> None:
        """``help`` and ``info`` end with 0, and tell what there is to know."""
        channel = self.pair.run(b"help")
        self.assertIn(b"list [--format plain|json]", channel.output)
        self.assertIn(b"^] . leaves", channel.output)
        self.assertEqual(channel.status, 0)
        for line in (b"--help", b"list --help", b"connect -h", b"help connect"):
            channel = self.pair.run(line)
            self.assertIn(b"list [--format plain|json]", channel.output)
            self.assertEqual(channel.status, 0)
        channel = self.pair.run(b"info")
        self.assertIn(b"user: alice@internal [u-alice]\n", channel.output)
        self.assertIn(b"key: SHA256:", channel.output)
        self.assertEqual(channel.status, 0)

    def test_debug_is_taken(self) -> None:
        """ovirt-vmconsole's ``--debug`` before the command is accepted."""
        self.assertEqual(self.pair.run(b"--debug list").status, 0)

    def test_bad_syntax(self) -> None:
        """A line that makes no sense ends with 2, an ERROR line, and a hint."""
        for line in (
            b"frobnicate vm1",
            b"--nonsense",
            b"list --format xml",
            b"connect --vm-id 1 --vm-name a",
            b"connect vm1 extra",
            b"'unbalanced",
            b"connect --vm-id ''",
            b"connect --vm-name=",
            b"''",
            b"a" * 5000,
        ):
            channel = self.pair.run(line, pty=True)
            self.assertEqual(channel.status, 2, line)
            self.assertTrue(channel.error.startswith(b"ERROR: "), channel.error)
            self.assertEqual(channel.output, b"")

    def test_no_pty(self) -> None:
        """A console without a terminal is an error that says to use ``ssh -t``."""
        for line in (b"", b"vm1", b"connect --vm-id id-vm1"):
            channel = self.pair.run(line)
            self.assertEqual(channel.status, 1)
            self.assertIn(b"ERROR: A console needs a terminal. Run ssh with -t", channel.error)
            self.assertEqual(self.pair.guests.opened, [])

    def test_no_vm(self) -> None:
        """A user without any VM is told so, and what to do; the status is 1."""
        self.pair.engine.vms.clear()
        channel = self.pair.run(pty=True)
        self.assertIn(b"ERROR: There is no console for alice@internal", channel.error)
        self.assertEqual(channel.status, 1)

    def test_unknown_vm(self) -> None:
        """A VM that is unknown, or somebody else's, gets one answer for both; the status is 1."""
        channel = self.pair.run(b"vm9", pty=True)
        self.assertIn(b"ERROR: vm9 is none of your VMs", channel.error)
        self.assertEqual(channel.status, 1)

    def test_new_vm(self) -> None:
        """A VM that came since the engine was asked last is found by asking again."""
        self.pair.run(b"list")
        self.pair.engine.vms[ALICE.id] = [console("vm9")]
        self.pair.run(b"vm9", pty=True)
        self.assertEqual(len(self.pair.guests.opened), 1)

    def test_engine_down(self) -> None:
        """Without an engine the user is told, and the status is 1."""
        self.pair.engine.error = EngineUnreachable("The engine does not answer.")
        channel = self.pair.run(b"list")
        self.assertEqual(channel.error, b"ERROR: The engine does not answer.\n")
        self.assertEqual(channel.status, 1)

    def test_a_bug_is_told(self) -> None:
        """An error of our own is logged with its traceback, and the user gets a clear line."""
        self.pair.engine.vms = None  # type: ignore[assignment]
        channel = self.pair.run(b"list")
        self.assertIn(b"ERROR: Something went wrong in the proxy", channel.error)
        self.assertEqual(channel.status, 1)
        self.assertEqual(len(self.flushLoggedErrors(AttributeError)), 1)

    def test_only_one_command(self) -> None:
        """A second shell or exec on the same channel is refused (RFC 4254, section 6.5)."""
        channel = self.connected()
        second = self.pair.connection.sendRequest(channel, b"shell", b"", wantReply=True)
        self.pair.flush()
        self.failureResultOf(second)
        self.assertEqual(len(self.pair.guests.opened), 1)

    def test_requests(self) -> None:
        """Only the harmless requests are granted: no subsystem, agent or X11, no odd variable."""
        channel = self.pair.open()
        from twisted.conch.ssh.common import NS

        for name, data, granted in (
            (b"env", NS(b"LANG") + NS(b"C"), True),
            (b"env", NS(b"LC_ALL") + NS(b"C"), True),
            (b"env", NS(b"LD_PRELOAD") + NS(b"x"), False),
            (b"subsystem", NS(b"sftp"), False),
            (b"x11-req", b"", False),
            (b"auth-agent-req@openssh.com", b"", False),
            (b"window-change", b"\0" * 16, False),
        ):
            d = self.pair.connection.sendRequest(channel, name, data, wantReply=True)
            self.pair.flush()
            if granted:
                self.successResultOf(d)
            else:
                self.failureResultOf(d)


class ConsoleTests(SessionTestCase):
    """On a console."""

    def test_straight_in(self) -> None:
        """With one VM and no command the user is on its console, and told how to leave."""
        self.only_vm1()
        channel = self.pair.run(pty=True)
        self.assertEqual(
            channel.output, b"\r\n[vmconsole: vm1 on node1. To leave: ^] . (help: ^] ?)]\r\n"
        )

    def test_bytes_both_ways(self) -> None:
        """All 256 values go both ways unchanged, the escape typed twice."""
        channel = self.connected()
        every = bytes(range(256))
        self.pair.type(channel, every.replace(b"\x1d", b"\x1d\x1d"))
        self.assertEqual(self.pair.guests.guest.typed, every)
        before = len(channel.output)
        self.pair.guests.guest.print(every)
        self.pair.flush()
        self.assertEqual(channel.output[before:], every)

    def test_leave(self) -> None:
        """``^] .`` leaves: the stream is closed, the reason told, the status 0."""
        channel = self.connected()
        self.pair.type(channel, b"\x1d.")
        self.assertFalse(self.pair.guests.guest.open)
        self.assertIn(b"[vmconsole: You left vm1.]", channel.output)
        self.assertEqual(channel.status, 0)
        self.assertTrue(channel.output_ended)
        self.assertTrue(channel.gone)
        self.assertEqual(len(self.pair.pool), 0)

    def test_quiet_guest(self) -> None:
        """Who sees nothing for two seconds is told to press Enter; who sees or types is not."""
        hint = b"[vmconsole: vm1 is quiet; Enter brings its prompt.]"
        channel = self.connected()
        self.pair.advance(2.5)
        self.assertIn(hint, channel.output)
        self.pair.type(channel, b"\x1d.")
        for active in (
            lambda channel: self.pair.guests.guest.print(b"login: "),
            lambda channel: self.pair.type(channel, b"\r"),
        ):
            channel = self.pair.run(b"vm1", pty=True)
            active(channel)
            self.pair.advance(2.5)
            self.assertNotIn(hint, channel.output)
            self.pair.type(channel, b"\x1d.")

    def test_open_shell(self) -> None:
        """Who leaves with a shell's prompt on the line is warned, after they are out; with a login
        prompt, or where ``guard`` is off, they are not."""
        warning = b"[vmconsole: A shell seems to be open on vm1: whoever comes next can use it."
        for prompt, guard, warned in (
            (b"root@vm1:~# ", True, True),
            (b"vm1 login: ", True, False),
            (b"", True, False),
            (b"root@vm1:~# ", False, False),
        ):
            self.pair.pool.settings = ConsoleSettings(linger=0.0, guard=guard)
            for key in (b"\x1d.", b"\x1dq"):
                channel = self.connected_anew()
                self.pair.guests.guest.print(b"motd\r\n" + prompt)
                self.pair.type(channel, key)
                self.assertEqual(warning in channel.output, warned, prompt)
                self.assertEqual(channel.status, 0)

    def test_open_shell_of_somebody_else(self) -> None:
        """Who only watched is not warned, nor is whose console ended."""
        holder, watcher = self.connected_anew(), self.pair.run(b"watch vm1", pty=True)
        self.pair.guests.guest.print(b"root@vm1:~# ")
        self.pair.flush()
        self.pair.type(watcher, b"\x1d.")
        self.pair.guests.guest.end(ConsoleGone("vm1 was shut off."))
        self.pair.flush()
        self.assertNotIn(b"A shell seems", watcher.output + holder.output)

    def test_lone_escape(self) -> None:
        """A lone ``^]`` shows the help within a second, and the next key still counts."""
        channel = self.connected()
        self.pair.type(channel, b"\x1d")
        self.assertNotIn(b"and then", channel.output)
        self.pair.advance(1.0)
        self.assertIn(b"[vmconsole: ^] and then: . leave, m menu, ", channel.output)
        self.pair.type(channel, b".")
        self.assertEqual(channel.status, 0)

    def test_help_key(self) -> None:
        """``^] ?`` shows the help at once, and nothing of it reaches the guest."""
        channel = self.connected()
        self.pair.type(channel, b"\x1d?")
        self.assertIn(b"^] and then: . leave", channel.output)
        self.assertEqual(self.pair.guests.guest.typed, b"")

    def test_guest_ends(self) -> None:
        """When the console ends by itself the user is told why; the status is 0."""
        channel = self.connected()
        self.pair.guests.guest.print(b"last words")
        self.pair.guests.guest.end(ConsoleGone("vm1 was shut off."))
        self.pair.flush()
        self.assertIn(b"last words", channel.output)
        self.assertTrue(channel.output.endswith(b"[vmconsole: vm1 was shut off.]\r\n"))
        self.assertEqual(channel.status, 0)

    def test_refusals(self) -> None:
        """A console that cannot be opened gives its reason as an ERROR, and 1."""
        for error in (ConsoleBusy("In use."), ConsoleUnavailable("Shut off.")):
            self.pair.guests.answer = error
            channel = self.pair.run(b"vm1", pty=True)
            self.assertEqual(channel.error, f"ERROR: {error}\r\n".encode())
            self.assertEqual(channel.status, 1)
            self.assertEqual(len(self.pair.pool), 0)

    def test_typed_early(self) -> None:
        """What is typed before the console is open reaches the guest, in order."""
        gate: Deferred[None] = Deferred()
        self.pair.guests.answer = gate
        channel = self.pair.run(b"vm1", pty=True)
        self.pair.type(channel, b"\x03ro")
        self.pair.type(channel, b"ot\r")
        gate.callback(None)
        self.pair.flush()
        self.assertEqual(self.pair.guests.guest.typed, b"\x03root\r")
        self.pair.type(channel, b"ls\r")
        self.assertEqual(self.pair.guests.guest.typed, b"\x03root\rls\r")

    def test_typed_before_the_command(self) -> None:
        """What is sent before the command was asked for is the guest's, too."""
        self.only_vm1()
        channel = self.pair.open()
        self.pair.type(channel, b"very ")
        self.pair.connection.sendRequest(channel, b"pty-req", PTY)
        self.pair.connection.sendRequest(channel, b"shell", b"")
        self.pair.type(channel, b"early")
        self.assertEqual(self.pair.guests.guest.typed, b"very early")

    def test_typed_early_is_bounded(self) -> None:
        """While a console is being opened the client's window bounds what can be typed; all of
        it arrives once the console is open."""
        gate: Deferred[None] = Deferred()
        self.pair.guests.answer = gate
        channel = self.pair.run(b"vm1", pty=True)
        self.pair.type(channel, b"p" * 1000000)
        session = next(iter(self.pair.server.service.channels.values()))._protocol
        self.assertLessEqual(len(session._early), 2 * 131072)
        gate.callback(None)
        self.pair.flush()
        self.assertEqual(self.pair.guests.guest.typed, b"p" * 1000000)

    def test_input_ended_early(self) -> None:
        """Input that ended before the console was open is typed all the same."""
        gate: Deferred[None] = Deferred()
        self.pair.guests.answer = gate
        channel = self.pair.run(b"vm1", pty=True)
        self.pair.type(channel, b"halt\r")
        self.pair.connection.sendEOF(channel)
        self.pair.flush()
        gate.callback(None)
        self.pair.flush()
        self.assertEqual(self.pair.guests.guest.typed, b"halt\r")
        for _ in range(5):
            self.pair.advance(0.25)
        self.assertEqual(channel.status, 0)

    def test_closed_while_the_engine_thinks(self) -> None:
        """A channel that closes while the engine is asked is done: nothing is opened later."""
        gate: Deferred[None] = Deferred()
        self.pair.engine.consoles_gate = gate
        channel = self.pair.run(b"vm1", pty=True)
        channel.loseConnection()
        self.pair.flush()
        self.assertTrue(channel.gone)
        gate.callback(None)
        self.pair.flush()
        self.assertEqual(self.pair.guests.opened, [])

    def test_give_up(self) -> None:
        """While the host does not answer the user is told, and Ctrl-C or ``^] .`` gives up."""
        for keys in (b"\x03", b"\x1d."):
            self.pair.guests.answer = Deferred()
            channel = self.pair.run(b"vm1", pty=True)
            self.pair.advance(1.5)
            self.assertIn(b"Connecting to vm1 on node1... Ctrl-C gives up.", channel.output)
            self.pair.type(channel, keys)
            self.assertEqual(channel.status, 1)
            self.assertEqual(channel.error, b"ERROR: You gave up vm1.\r\n")
            self.assertEqual(len(self.pair.pool), 0)
        self.assertEqual(self.pair.guests.cancelled, 2)
        self.assertEqual(len(self.pair.events.named("attach_failed")), 2)

    def test_ctrl_c_is_for_the_guest(self) -> None:
        """On an open console Ctrl-C, Ctrl-Z and Ctrl-D are the guest's."""
        channel = self.connected()
        self.pair.type(channel, b"\x03\x1a\x04\x1c")
        self.assertEqual(self.pair.guests.guest.typed, b"\x03\x1a\x04\x1c")

    def test_connection_lost(self) -> None:
        """A client that is gone frees its console at once."""
        self.connected()
        self.pair.client_io.loseConnection()
        self.pair.flush()
        self.assertFalse(self.pair.guests.guest.open)
        self.assertEqual(len(self.pair.pool), 0)

    def test_channel_closed(self) -> None:
        """A client that closes its channel, with or without an end of input before, frees its
        console at once, and the audit has it; so does one that closes while connecting."""
        for end_of_input in (False, True):
            channel = self.connected_anew()
            if end_of_input:
                self.pair.connection.sendEOF(channel)
            self.pair.connection.sendClose(channel)
            self.pair.flush()
            self.assertTrue(channel.gone)
            self.assertFalse(self.pair.guests.guest.open)
            self.assertEqual(len(self.pair.pool), 0)
        reasons = [event["reason"] for event in self.pair.events.named("detached")]
        self.assertEqual(reasons, ["The ssh connection ended."] * 2)
        self.pair.guests.answer = Deferred()
        channel = self.pair.run(b"vm1", pty=True)
        self.pair.connection.sendClose(channel)
        self.pair.flush()
        self.assertEqual(self.pair.guests.cancelled, 1)
        self.assertEqual(len(self.pair.pool), 0)
        (failed,) = self.pair.events.named("attach_failed")
        self.assertEqual(failed["reason"], "The ssh connection ended.")

    def test_lost_while_connecting(self) -> None:
        """A client that is gone while its console is being opened stops that."""
        self.pair.guests.answer = Deferred()
        self.pair.run(b"vm1", pty=True)
        self.pair.client_io.loseConnection()
        self.pair.flush()
        self.assertEqual(self.pair.guests.cancelled, 1)
        self.assertEqual(len(self.pair.pool), 0)

    def test_end_of_input(self) -> None:
        """After the end of the client's input the session goes on while the guest takes what was
        typed, or prints its answer, and ends after a second of silence."""
        channel = self.connected()
        guest = self.pair.guests.guest
        self.pair.type(channel, b"hello")
        self.pair.connection.sendEOF(channel)
        guest.unsent = 50
        for _ in range(50):
            guest.unsent -= 1
            self.pair.advance(0.25)
        for _ in range(4):
            guest.print(b"answer")
            self.pair.advance(0.9)
        self.assertTrue(guest.open)
        self.pair.advance(0.5)
        self.pair.advance(0.5)
        self.assertFalse(guest.open)
        self.assertTrue(channel.output.endswith(b"[vmconsole: The input ended; you left vm1.]\r\n"))
        self.assertEqual(channel.status, 0)

    def test_end_of_input_in_a_flood(self) -> None:
        """A guest that prints without end is not listened to for ever."""
        channel = self.connected()
        self.pair.connection.sendEOF(channel)
        self.pair.flush()
        for _ in range(24):
            self.pair.guests.guest.print(b"more")
            self.pair.advance(0.25)
        self.assertFalse(self.pair.guests.guest.open)

    def test_proxy_stops(self) -> None:
        """A proxy that is stopped tells everybody before it goes."""
        channel = self.connected()
        self.pair.pool.stopService()
        self.pair.flush()
        self.assertIn(b"[vmconsole: The proxy is being stopped.]", channel.output)
        self.assertFalse(self.pair.guests.guest.open)


class MenuTests(SessionTestCase):
    """The menu on a terminal."""

    def test_choose(self) -> None:
        """The list, a prompt, a number, and the console."""
        channel = self.pair.run(pty=True)
        self.assertEqual(channel.output, b"1. vm1 [id-vm1]\r\n2. vm2 [id-vm2]\r\n> ")
        self.pair.type(channel, b"2\r")
        self.assertIn(b"> 2\r\n\r\n[vmconsole: vm2 on node1.", channel.output)

    def test_typed_ahead(self) -> None:
        """What was typed behind the choice is the guest's."""
        channel = self.pair.run(pty=True)
        self.pair.type(channel, b"1\rroot\r\xff\xfe\x80")
        self.assertEqual(self.pair.guests.guest.typed, b"root\r\xff\xfe\x80")

    def test_leave_typed_ahead(self) -> None:
        """Who leaves before the console is even asked for does not open it."""
        channel = self.pair.run(pty=True)
        self.pair.type(channel, b"1\r\x1d.")
        self.assertEqual(self.pair.guests.opened, [])
        self.assertEqual(channel.status, 1)

    def test_wrong_then_right(self) -> None:
        """A wrong answer is told and asked again."""
        channel = self.pair.run(pty=True)
        self.pair.type(channel, b"7\r")
        self.assertTrue(
            channel.output.endswith(b"> 7\r\nThere is no 7: choose 1 to 2.\r\n> "), channel.output
        )
        self.pair.type(channel, b"vm1\r")
        self.assertEqual(len(self.pair.guests.opened), 1)

    def test_known_problem(self) -> None:
        """A VM whose console cannot be opened is marked, and tried for when it is chosen or named:
        its host has the last word, whether that is the reason or the console."""
        self.no_console_on_vm2()
        for line, keys in ((b"", b"2\r"), (b"vm2", b"")):
            self.pair.guests.answer = ConsoleUnavailable("vm2 has no console device.")
            channel = self.pair.run(line, pty=True)
            if keys:
                self.assertEqual(
                    channel.output,
                    b"1. vm1 [id-vm1]\r\n2. vm2 [id-vm2] (no \\x1b console)\r\n> ",
                )
            self.pair.type(channel, keys)
            self.assertEqual(channel.error, b"ERROR: vm2 has no console device.\r\n")
            self.assertEqual(channel.status, 1)
            self.pair.guests.answer = None
            channel = self.pair.run(line, pty=True)
            self.pair.type(channel, keys)
            self.assertIn(b"[vmconsole: vm2 on node1.", channel.output)
            self.pair.type(channel, b"\x1d.")

    def test_leave(self) -> None:
        """q, Ctrl-C, Ctrl-D and the end of input leave with 0; nothing was opened."""
        for keys in (b"q\r", b"\x03", b"\x04"):
            channel = self.pair.run(pty=True)
            self.pair.type(channel, keys)
            self.assertEqual(channel.status, 0)
        channel = self.pair.run(pty=True)
        self.pair.connection.sendEOF(channel)
        self.pair.flush()
        self.assertEqual(channel.status, 0)
        self.assertEqual(self.pair.guests.opened, [])


class FlowTests(SessionTestCase):
    """Who is slow hurts nobody, and nothing grows."""

    def test_slow_reader(self) -> None:
        """A client that takes no output gets what the backlog holds, and is told of the gap."""
        channel = self.connected(window=200, reads_no_more=True)
        line = b"0123456789abcdef\n" * 1000
        for _ in range(200):
            self.pair.guests.guest.print(line)
        self.pair.flush()
        self.assertEqual(len(channel.output), 200)
        shared = self.pair.pool.find("id-vm1")
        assert shared is not None
        [attachment] = shared.attachments
        self.assertLessEqual(len(attachment._backlog), self.pair.config.console.backlog)
        for _ in range(80):
            self.pair.connection.grant(channel, 1 << 16)
            self.pair.flush()
        self.assertIn(b" bytes dropped]\r\n0123456789abcdef\n", channel.output)
        self.assertTrue(channel.output.endswith(line))

    def test_tcp_is_full(self) -> None:
        """A client with a huge window that does not read its socket is held by the socket."""
        channel = self.connected(window=0xFFFFFFFF)
        self.pair.server.pauseProducing()
        self.pair.guests.guest.print(b"x" * 100000)
        self.pair.flush()
        self.assertNotIn(b"x", channel.output)
        self.pair.server.resumeProducing()
        self.pair.flush()
        self.assertEqual(channel.output.count(b"x"), 100000)

    def test_stuck_guest_holds_the_client(self) -> None:
        """While a guest takes no input, the client's window is not opened again."""
        channel = self.connected()
        self.pair.guests.guest.producer.pauseProducing()
        self.pair.type(channel, b"p" * 1000000)
        taken = len(self.pair.guests.guest.typed)
        self.assertLessEqual(taken, 131072)
        self.pair.guests.guest.producer.resumeProducing()
        self.pair.flush()
        self.assertEqual(self.pair.guests.guest.typed, b"p" * 1000000)

    def test_input_without_a_command(self) -> None:
        """A channel that is fed before any command was asked for takes one window, no more."""
        channel = self.pair.open()
        self.pair.type(channel, b"z" * 1000000)
        server = next(iter(self.pair.server.service.channels.values()))
        self.assertLessEqual(len(server._waiting_input), 2 * 131072)

    def test_own_answers_are_bounded(self) -> None:
        """A client that takes no output, but has the menu answer on and on, is held by its window;
        when it reads again, all goes on."""
        window = 8192
        self.pair.server.avatar.channelLookup[b"session"] = partial(
            SessionChannel, clock=self.pair.clock, localWindow=window
        )
        channel = self.pair.run(pty=True, window=10, reads_no_more=True)
        self.pair.type(channel, b"x\r" * 10000)
        server = list(self.pair.server.service.channels.values())[-1]
        self.assertTrue(server.held)
        self.assertLessEqual(20000 - len(channel.buf), 2 * window)
        self.assertLess(len(server._output), 500)
        for _ in range(100):
            self.pair.connection.grant(channel, 1 << 20)
            self.pair.flush()
        self.assertEqual(channel.buf, b"")
        self.assertFalse(server.held)

    def test_help_is_bounded(self) -> None:
        """Somebody who asks for the help on and on gets it for each packet that they sent it in,
        and else the bell; one who takes no output, or is not on the console yet, gets no more."""
        reader = self.connected()
        reader.output = b""
        for _ in range(3):
            self.pair.type(reader, b"\x1d?" * 1000)
        self.assertEqual(reader.output.count(b"and then: . leave"), 3)
        self.assertEqual(reader.output.count(b"\x07"), 3)
        slow = self.pair.run(b"vm1", pty=True, window=100, reads_no_more=True)
        self.pair.guests.answer = Deferred()
        early = self.pair.run(b"vm2", pty=True)
        for channel in (slow, early):
            server = list(self.pair.server.service.channels.values())[-2 if channel is slow else -1]
            before = server._waiting_output + len(channel.output)
            for _ in range(100):
                self.pair.type(channel, b"\x1d?")
            self.assertLess(server._waiting_output + len(channel.output) - before, 500)

    def test_dead_reader_is_closed(self) -> None:
        """A session whose client takes no output ends some seconds after it is over."""
        channel = self.connected(window=100, reads_no_more=True)
        self.pair.guests.guest.print(b"x" * 1000)
        self.pair.guests.guest.end(ConsoleGone("vm1 was shut off."))
        self.pair.flush()
        self.assertFalse(channel.gone)
        self.pair.advance(6)
        self.assertTrue(channel.gone)


class AuditTests(SessionTestCase):
    """What the audit has."""

    def test_events(self) -> None:
        """Login, attach and detach have the fields that an auditor asks for."""
        channel = self.connected()
        self.pair.type(channel, b"abc")
        self.pair.guests.guest.print(b"12345")
        self.pair.advance(3)
        self.pair.type(channel, b"\x1d.")
        (login,) = self.pair.events.named("login_accepted")
        (attached,) = self.pair.events.named("attached")
        (detached,) = self.pair.events.named("detached")
        for event in (login, attached, detached):
            self.assertEqual(event["session"], "0001020304050607")
            self.assertEqual(event["user"], "alice@internal")
            self.assertEqual(event["user_id"], "u-alice")
            self.assertEqual(event["address"], "192.0.2.7")
            self.assertTrue(event["fingerprint"].startswith("SHA256:"))
        for event in (attached, detached):
            self.assertEqual(event["vm_id"], "id-vm1")
            self.assertEqual(event["vm_name"], "vm1")
            self.assertEqual(event["host"], "node1")
        self.assertEqual((detached["bytes_in"], detached["bytes_out"]), (3, 5))
        self.assertEqual(detached["reason"], "You left vm1.")
        self.assertAlmostEqual(detached["seconds"], 3, 1)

    def test_failed_attach(self) -> None:
        """A console that could not be opened is audited with the reason."""
        self.pair.guests.answer = ConsoleBusy("In use.")
        self.pair.run(b"vm1", pty=True)
        (event,) = self.pair.events.named("attach_failed")
        self.assertEqual(event["reason"], "In use.")
