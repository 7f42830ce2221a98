"""A remote engine: what it grants and takes back, and what holds while it fails."""

from __future__ import annotations

import time

from twisted.internet.threads import deferToThread

from tests.functional.process import Child
from tests.functional.remote import RemoteTestCase, make_key, public_line
from tests.functional.site import log_in

_NO_ANSWER = (
    rb"\[vmconsole: the engine, which knows your key, does not answer\. It is not your key's "
    rb"fault: try again later\.\]"
)
_NO_USE = (
    rb"\[vmconsole: the engine, which knows your key, gave no usable answer\. It is not your "
    rb"key's fault: tell who runs this proxy\.\]"
)
_STALE = (
    rb"\[engine unreachable: using its answer from "
    rb"(?:1 (?:second|minute)|\d+ (?:seconds|minutes)) ago\]"
)
_REFUSED = rb"(?s)%s.*Permission denied \(publickey\)"
_MEBIBYTE = 1024 * 1024


def is_refused(ssh: Child) -> bool:
    return ssh.status == 255


def is_stale(ssh: Child) -> bool:
    return ssh.status == 0 and b"engine unreachable" in ssh.errors


def is_well(ssh: Child) -> bool:
    return ssh.status == 0 and not ssh.errors


class PermissionTests(RemoteTestCase):
    """What the engine says is what counts, also of sessions that are open."""

    settings = "recheck = 1.0\ncache_ttl = 0.5\ntimeout = 10.0\n"

    async def test_main_job(self) -> None:
        """The menu with the user's VMs, the console of a Linux with its login, keystrokes; the
        engine is asked by signed commands alone."""
        ssh = self.site.ssh(self.alice)
        await ssh.expect(rb"1\. light1 \[.*2\. light2 \[.*3\. linux1 \[.*> ")
        ssh.type(b"linux1\r")
        await ssh.expect(rb"\[vmconsole: linux1 on node1\. To leave")
        await log_in(ssh, "linux1")
        ssh.type(b"echo six times seven is $((6 * 7))\r")
        await ssh.expect(rb"\nsix times seven is 42\r")
        ssh.type(b"\x1d.")
        self.assertEqual(await ssh.ended(), 0)
        await self.opened(self.bob, "light1")
        self.assertEqual({each.status for each in self.engine.requests}, {200})

    async def test_not_listed(self) -> None:
        """A VM that the engine does not list, because it is not placed on a host, not granted, or
        unknown: told in one line that covers all three."""
        self.engine.unplace(self.vms["light2"])
        for key, name in (
            (self.alice, "light2"),
            (self.bob, "linux1"),
            (self.alice, "nonesuch"),
        ):
            ssh = self.site.ssh(key, name)
            self.assertEqual(await ssh.ended(), 1)
            self.assertRegex(
                ssh.seen,
                b"ERROR: %s is not there: not running, unknown, or not yours" % name.encode(),
            )
        self.engine.place(self.vms["light2"], "node2")
        await self.opened(self.alice, "light2")

    async def test_migrated(self) -> None:
        """An open session does not mind that the VM is on another host, or on none for a
        moment; it does mind when the VM is on none for long."""
        ssh = await self.opened(self.bob, "light1")
        self.engine.place(self.vms["light1"], "node2")
        for _ in range(3):
            await self.engine.next("available_consoles")
        await self.works(ssh)
        self.engine.unplace(self.vms["light1"])
        await ssh.expect(rb"\[vmconsole: You no longer have access to light1\.\]")
        await ssh.ended()

    async def test_grant_removed(self) -> None:
        """The session on that VM ends with a line that says why; the user's other session, and
        another user, do not notice."""
        others = [await self.opened(self.bob, "light1"), self.site.ssh(self.alice, "linux1")]
        await others[1].expect(rb"\[vmconsole: linux1 on node1[^\n]*\n")
        ssh = await self.opened(self.alice, "light2")
        self.engine.revoke("alice", self.vms["light2"])
        await ssh.expect(rb"\[vmconsole: You no longer have access to light2\.\]\r\n")
        self.assertEqual(await ssh.ended(), 0)
        await self.site.log(rb"detached [^\n]*vm='light2'[^\n]*reason='You no longer have access")
        await self.works(others[0])
        others[1].type(b"\x1d?")
        await others[1].expect(rb"leave")

    async def test_key_removed(self) -> None:
        """All of the user's sessions end, with a line that says why, and so does the connection;
        another user, and the same user with another key, go on."""
        other_key = self.site.folder / "other.key"
        self.engine.add_key("alice", await deferToThread(make_key, other_key))
        # A key that was not in the last answer is looked for at most once a second.
        await self.until(other_key, is_well)
        bob = await self.opened(self.bob, "light1")
        other = await self.opened(other_key, "light2")
        ssh = self.site.ssh(self.alice, "linux1")
        await ssh.expect(rb"\[vmconsole: linux1 on node1")
        menu = self.site.ssh(self.alice)
        await menu.expect(rb"> $")
        self.engine.remove_key("alice", public_line(self.alice))
        # 0 is what every console's end has.
        for each, status in ((ssh, 0), (menu, 1)):
            await each.expect(rb"\[vmconsole: Your key no longer lets you in: [^\]]*\]\r\n")
            self.assertEqual(await each.ended(), status)
        await self.site.log(
            rb"revoked session=\w+ user='alice@internal'[^\n]*reason='Your key no longer lets"
        )
        await self.works(bob)
        await self.works(other)
        refused = await self.listed(self.alice)
        self.assertRegex(refused.errors, rb"Permission denied \(publickey\)")

    async def test_user_removed(self) -> None:
        """The user's sessions end, with a line that says why; another user goes on."""
        bob = await self.opened(self.bob, "light1")
        ssh = await self.opened(self.alice, "light2")
        self.engine.remove_user("alice")
        await ssh.expect(rb"\[vmconsole: Your key no longer lets you in: [^\]]*\]\r\n")
        self.assertEqual(await ssh.ended(), 0)
        await self.works(bob)


class OutageTests(RemoteTestCase):
    """No answer: the last one serves for a while, and open sessions go on."""

    settings = "recheck = 1.0\ncache_ttl = 0.5\ntimeout = 1.0\nstale_grace = 300.0\n"

    async def test_killed_while_connected(self) -> None:
        """The session goes on, and the log says since when nobody vouches for it; when the engine
        is back it is looked at again, and its permission may be taken."""
        ssh = await self.opened(self.bob, "light1")
        await self.engine.next("available_consoles")
        await self.engine.stop()
        await self.site.log(
            rb"unchecked session=\w+ user='bob@internal'[^\n]* "
            rb"since='?\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d"
        )
        await self.works(ssh)
        await self.engine.start()
        await self.site.log(rb"checked again session=\w+ user='bob@internal'")
        await self.works(ssh)
        self.assertTrue(is_well(await self.until(self.alice, is_well)))
        self.engine.revoke("bob", self.vms["light1"])
        await ssh.expect(rb"\[vmconsole: You no longer have access to light1\.\]")

    async def test_killed_before_a_login(self) -> None:
        """Within the grace a user gets in, to consoles too, and is told how old the answer is in
        one line; a key that was not in that answer is refused, with a banner."""
        self.assertTrue(is_well(await self.listed(self.alice)))
        new_key = self.site.folder / "new.key"
        line = await deferToThread(make_key, new_key)
        await self.engine.stop()
        self.engine.add_key("alice", line)
        listed = await self.until(self.alice, is_stale)
        self.assertRegex(listed.errors, rb"^" + _STALE + rb"\r?\n$")
        self.assertIn(b"\tlight1\n", listed.seen)
        ssh = self.site.ssh(self.alice, "light1")
        await ssh.expect(_STALE + rb"\r\n")
        await ssh.expect(rb"\[vmconsole: light1 on node1")
        await self.works(ssh)
        self.assertEqual(ssh.seen.count(b"engine unreachable"), 1)
        await self.site.log(rb"the engine does not answer; alice@internal is let in by its answer")
        refused = await self.listed(new_key)
        self.assertRegex(refused.errors, _REFUSED % _NO_ANSWER)
        await self.engine.start()
        await self.until(new_key, is_well)
        await self.works(ssh)

    async def test_hanging(self) -> None:
        """It takes requests and answers none: a login ends in time, let in by the last answer or
        refused, and open sessions are not held up."""
        self.assertTrue(is_well(await self.listed(self.alice)))
        bob = await self.opened(self.bob, "light1")
        self.engine.fault = "hang"
        await self.site.log(rb"unchecked session=\w+ user='bob@internal'")
        unknown = self.site.folder / "unknown.key"
        await deferToThread(make_key, unknown)
        began = time.monotonic()
        both = [self.site.ssh(key, "list", terminal=False) for key in (self.alice, unknown)]
        while None in (each.status for each in both):
            await self.works(bob, 2.0)
        # Two requests at the most, one second each; the rest is for a busy machine.
        self.assertLess(time.monotonic() - began, 10.0)
        self.assertTrue(is_stale(both[0]), both[0].errors)
        self.assertRegex(both[1].errors, _REFUSED % _NO_ANSWER)
        self.engine.fault = None
        await self.site.log(rb"checked again session=\w+ user='bob@internal'")
        await self.until(self.alice, is_well)

    async def test_no_whole_answer(self) -> None:
        """Half a reply, a reset, 502, 503: no answer, and all is as if it was killed."""
        bob = await self.opened(self.bob, "light1")
        for fault, words in (
            ("half", rb"gave no whole answer"),
            ("reset", rb"does not answer"),
            ("502", rb"does not answer \(HTTP status 502\)"),
            ("503", rb"does not answer \(HTTP status 503\)"),
        ):
            await self.until(self.alice, is_well)
            self.engine.fault = fault
            await self.site.log(
                rb"Open sessions go on, and cannot be checked \(bob@internal\): [^\n]*" + words
            )
            listed = await self.until(self.alice, lambda ssh: not is_well(ssh))
            self.assertTrue(is_stale(listed), (fault, listed.errors))
            await self.works(bob)
            self.engine.fault = None
            await self.site.log(rb"checked again session=\w+ user='bob@internal'")


class NoGraceTests(RemoteTestCase):
    """No answer, and the last one is too old."""

    settings = "recheck = 1.0\ncache_ttl = 0.5\ntimeout = 1.0\nstale_grace = 1.0\n"

    async def test_killed(self) -> None:
        """A login is refused with a banner that says why, the log says how old the answer is,
        open sessions go on, and when the engine is back all is well."""
        await self.until(self.alice, is_well)
        bob = await self.opened(self.bob, "light1")
        await self.engine.stop()
        refused = await self.until(self.alice, is_refused)
        self.assertRegex(refused.errors, _REFUSED % _NO_ANSWER)
        await self.site.log(rb"no login without the engine: [^\n]* ago, is too old\.")
        await self.works(bob)
        await self.engine.start()
        await self.until(self.alice, is_well)
        await self.works(bob)


class UselessAnswerTests(RemoteTestCase):
    """Answers that are no use: no older one serves, and none of them ends a session."""

    settings = "recheck = 1.0\ncache_ttl = 0.5\ntimeout = 30.0\nstale_grace = 300.0\n"

    async def check(self, fault: str, words: bytes) -> None:
        """That a login is refused, and the log says what to look at; that bob goes on."""
        bob = await self.opened(self.bob, "light1")
        await self.until(self.alice, is_well)
        self.engine.fault = fault
        await self.site.log(
            rb"Open sessions go on, and cannot be checked \(bob@internal\): [^\n]*" + words
        )
        refused = await self.until(self.alice, is_refused)
        self.assertRegex(refused.errors, _REFUSED % _NO_USE)
        await self.site.log(rb"no login without the engine: [^\n]*" + words)
        await self.works(bob)
        self.engine.fault = None
        await self.site.log(rb"checked again session=\w+ user='bob@internal'")
        await self.until(self.alice, is_well)
        await self.works(bob)

    async def test_garbage(self) -> None:
        """200, and no JSON."""
        await self.check("garbage", rb"answer cannot be understood")

    async def test_403(self) -> None:
        """The log names the certificate and the clocks."""
        await self.check("403", rb"403\)[^\n]*certificate[^\n]*expired[^\n]*clocks")

    async def test_500(self) -> None:
        """The log points to the engine's own."""
        await self.check("500", rb"500\); its log may say why")

    async def test_clocks(self) -> None:
        """The engine refuses our tickets because the clocks differ; the log says by how much."""
        await self.check("skew", rb"403\)[^\n]*clock is (?:359\d|3600) seconds ahead of ours")

    async def test_huge(self) -> None:
        """Replies of 300 MiB are cut off, and hold up nobody meanwhile; they take the memory of
        one list of keys and one of consoles, however many there are."""
        bob = await self.opened(self.bob, "light1")
        await self.until(self.alice, is_well)
        before = self.memory("VmRSS")
        for _ in range(2):
            self.engine.fault = "huge"
            # By then nothing that was remembered is fresh, so that a login asks for the keys alone.
            await self.site.log(rb"cannot be checked \(bob@internal\): [^\n]*larger than \d+ bytes")
            ssh = self.site.ssh(self.alice, "list", terminal=False)
            while not is_refused(ssh):
                # The last good list of keys may still be a fresh one.
                if ssh.status is not None:
                    ssh = self.site.ssh(self.alice, "list", terminal=False)
                await self.works(bob, 2.0)
            self.assertRegex(ssh.errors, _REFUSED % _NO_USE)
            await self.site.log(rb"no login without the engine: [^\n]*larger than \d+ bytes")
            self.engine.fault = None
            await self.site.log(rb"checked again session=\w+ user='bob@internal'")
            await self.until(self.alice, is_well)
        self.assertLess(self.memory("VmHWM") - before, (256 + 32 + 30) * _MEBIBYTE)
