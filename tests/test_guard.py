"""Whether a shell was left open."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as some
from twisted.trial.unittest import SynchronousTestCase

from vmconsole.console.guard import shows_shell_prompt


class GuardTests(SynchronousTestCase):
    """``shows_shell_prompt``."""

    def test_prompts(self) -> None:
        """The prompts of usual shells, with colours and a title, and with or without a space."""
        for prompt in (
            b"vm1:/root# ",
            b"# ",
            b"$",
            b"[root@localhost ~]# ",
            b"user@host:~$ ",
            b"host% ",
            b"fish ~> ",
            b"PS C:\\Users\\me> ",
            b"\x1b]0;user@host: ~\x07\x1b[01;32muser@host\x1b[00m:\x1b[01;34m~\x1b[00m$ ",
            b"\x1b[?2004hroot@vm:~# ",
            b"\x1b[1m(venv)\x1b[0m $ \x1b[K",
        ):
            self.assertTrue(shows_shell_prompt(b"last output\r\n" + prompt), prompt)
            self.assertTrue(shows_shell_prompt(prompt), prompt)

    def test_others(self) -> None:
        """Login prompts, questions, output, a finished line, and nothing at all."""
        for line in (
            b"vm1 login: ",
            b"Password: ",
            b"user name: ",
            b"Enter passphrase for key '.ssh/id': ",
            b"[  OK  ] Started thing.",
            b"Continue? [y/N] ",
            b"50%|####    | 3/6",
            b"vm1:/root# \r\n",
            b"",
            b"   ",
        ):
            self.assertFalse(shows_shell_prompt(b"user@host:~$ ls\r\n" + line), line)

    @given(some.binary(max_size=3000))
    def test_anything(self, printed: bytes) -> None:
        """Any bytes have an answer; what came long before has no part in it."""
        self.assertIsInstance(shows_shell_prompt(printed), bool)
        self.assertFalse(shows_shell_prompt(printed + b"\r\n" + b"login: "))
