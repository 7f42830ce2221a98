"""``vmconsole completion``: what TAB offers."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

from click.testing import CliRunner

from tests.cli_kit import ROOT, CliTestCase
from tests.engine_kit import public_line
from vmconsole import cli
from vmconsole.cli import complete
from vmconsole.engine.embedded.database import Database


class CompletionTestCase(CliTestCase):
    """There is something to offer."""

    def setUp(self) -> None:
        super().setUp()
        self.raised: list[object] = []

    def fill(self) -> None:
        """Users, groups, keys, hosts, grants."""
        for name in ("alice", "albert", "bob"):
            self.good("user", "add", name)
        for name in ("ops", "qa"):
            self.good("group", "add", name)
        self.good("group", "member", "add", "ops", "bob")
        self.good("grant", "alice", "web*")
        self.good("grant", "alice", "db 1")
        self.good("grant", "@ops", "mail1")
        self.good("grant", "bob", "a@b:c@d:e")
        self.good("host", "add", "node1")
        self.good("host", "add", "other", "qemu:///system")
        self.good("key", "add", "alice", "-", input=public_line("alice"))
        [key] = json.loads(self.good("key", "list", "--json"))
        self.fingerprint = key["fingerprint"]

    def ask(self, shell: str, **environment: str) -> str:
        """What the command tells the shell; it tells nothing else."""
        # A process of its own would write what a thread raises to stderr.
        self.patch(threading, "excepthook", lambda raised: self.raised.append(raised))
        result = CliRunner().invoke(
            cli.main,
            [],
            prog_name="vmconsole",
            env={
                "VMCONSOLE_CONFIG": str(self.config),
                "_VMCONSOLE_COMPLETE": f"{shell}_complete",
                **environment,
            },
        )
        self.assertEqual((result.exit_code, result.stderr, self.raised), (0, "", []))
        return result.stdout


class OfferTests(CompletionTestCase):
    """What is offered where, by the variables that zsh and fish set."""

    def offered(self, *words: str) -> Sequence[str]:
        """What may stand in the place of the last word."""
        said = self.ask(
            "zsh",
            COMP_WORDS=" ".join(["vmconsole", *map(shlex.quote, words)]),
            COMP_CWORD=str(len(words)),
        )
        lines = said.splitlines()
        self.assertTrue(all(kind in ("plain", "file") for kind in lines[::3] if kind))
        return [value for value in lines[1::3] if value]

    def test_names(self) -> None:
        """Users, groups, hosts, fingerprints, where such a one is wanted."""
        self.fill()
        everybody = ["albert", "alice", "bob"]
        for line, offers in (
            (["user", "remove", ""], everybody),
            (["user", "remove", "al"], ["albert", "alice"]),
            (["user", "add", ""], []),
            (["key", "add", ""], everybody),
            (["key", "generate", "--type", "rsa", "b"], ["bob"]),
            (["key", "list", "b"], ["bob"]),
            (["key", "remove", "SHA"], [self.fingerprint]),
            (["group", "remove", ""], ["ops", "qa"]),
            (["group", "member", "add", "o"], ["ops"]),
            (["group", "member", "add", "ops", ""], everybody),
            (["group", "member", "remove", "ops", ""], ["bob"]),
            (["group", "member", "remove", "qa", ""], []),
            (["host", "remove", ""], ["node1", "other"]),
            (["grant", ""], [*everybody, "@ops", "@qa"]),
            (["grant", "@"], ["@ops", "@qa"]),
            (["grant", "alice", "web1", "--role", "v"], ["viewer"]),
            (["grants", "@o"], ["@ops"]),
            (["revoke", ""], ["@ops", "alice", "bob"]),
            (["revoke", "alice", ""], ["db 1", "web*"]),
            (["revoke", "@ops", "m"], ["mail1"]),
            (["revoke", "albert", ""], []),
            (["pki", "host", "node1", ""], ["other"]),
            (["completion", ""], ["bash", "zsh", "fish"]),
        ):
            self.assertEqual(self.offered(*line), offers, line)

    def test_commands(self) -> None:
        """Commands, and options."""
        self.assertIn("member", self.offered("group", ""))
        self.assertEqual(self.offered("group", "member", "r"), ["remove"])
        self.assertEqual(self.offered("user", "list", "--j"), ["--json"])

    def test_configuration(self) -> None:
        """The database is that of the configuration which is named on the line."""
        self.fill()
        other = self.directory / "other.toml"
        other.write_text(f'[state]\ndirectory = "{self.directory / "elsewhere"}"\n')
        self.good("user", "add", "carol", "--config", str(other))
        self.assertEqual(self.offered("user", "remove", "--config", str(other), ""), ["carol"])
        self.assertEqual(len(self.offered("user", "remove", "")), 3)

    def test_nothing_is_made(self) -> None:
        """Without a database nothing is offered, and none is made."""
        self.assertEqual(self.offered("user", "remove", ""), [])
        self.assertFalse(self.state.exists())
        self.state.mkdir()
        self.assertEqual(self.offered("user", "remove", ""), [])
        self.assertEqual(list(self.state.iterdir()), [])

    def test_trouble(self) -> None:
        """Whatever is wrong, nothing is offered, and nothing is said."""
        self.state.mkdir()
        (self.state / "engine.db").write_bytes(b"garbage" * 1000)
        self.assertEqual(self.offered("user", "remove", ""), [])
        (self.state / "engine.db").write_bytes(b"")
        self.assertEqual(self.offered("user", "remove", ""), [])
        self.assertEqual((self.state / "engine.db").stat().st_size, 0)
        self.configure("[engine]\nfrobnicate = 1")
        self.assertEqual(self.offered("user", "remove", ""), [])
        self.configure('[engine]\nurl = "https://e.example.com"\ncertificate = "c"\nkey = "k"')
        self.assertEqual(self.offered("user", "remove", ""), [])
        missing = str(self.directory / "missing.toml")
        self.assertEqual(self.offered("user", "remove", "--config", missing, ""), [])

    def test_silent_database(self) -> None:
        """A database that does not answer is not waited for."""
        self.fill()
        release = threading.Event()
        self.addCleanup(release.set)
        self.patch(complete, "_SECONDS", 0.2)
        self.patch(Database, "reading", lambda _: release.wait(20))
        started = time.monotonic()
        self.assertEqual(self.offered("user", "remove", ""), [])
        self.assertLess(time.monotonic() - started, 5)

    def test_fish(self) -> None:
        """fish gives the word itself instead of its number."""
        self.fill()
        said = self.ask("fish", COMP_WORDS="vmconsole user remove al", COMP_CWORD="al")
        self.assertEqual(said.splitlines(), ["plain,albert", "plain,alice"])


class BashTests(CompletionTestCase):
    """bash: its words end at ``@`` and ``:``, and it expands what is not quoted."""

    BREAKS = " \t\n\"'@><=;|&(:"

    def offered(self, line: str, breaks: str = BREAKS) -> Sequence[str]:
        """What is put in the place of the last word, as bash sees that."""
        said = self.ask("bash", _VMCONSOLE_COMPLETE_LINE=line, _VMCONSOLE_COMPLETE_BREAKS=breaks)
        return [value.removeprefix("plain,") for value in said.splitlines() if value]

    def test_words(self) -> None:
        """What bash takes for the word is replaced, and what it would expand has backslashes."""
        self.fill()
        digest = self.fingerprint.removeprefix("SHA256:")
        for line, offers in (
            ("vmconsole user remove al", ["albert", "alice"]),
            ("vmconsole user remove ", ["albert", "alice", "bob"]),
            ("vmconsole user remove 'al", ["albert", "alice"]),
            ("vmconsole grant @", ["@ops", "@qa"]),
            ("vmconsole grant @o", ["@ops"]),
            ("vmconsole grant '@o", ["@ops"]),
            ("vmconsole key remove SHA", [self.fingerprint]),
            ("vmconsole key remove SHA256:", [digest]),
            (f"vmconsole key remove SHA256:{digest[:4]}", [digest]),
            (f"vmconsole key remove 'SHA256:{digest[:4]}", [self.fingerprint]),
            ("vmconsole revoke alice ", [r"db\ 1", r"web\*"]),
            ("vmconsole revoke alice w", [r"web\*"]),
            (r"vmconsole revoke alice db\ ", [r"db\ 1"]),
            ("vmconsole revoke alice 'w", ["web*"]),
            ('vmconsole revoke alice "db 1', ["db 1"]),
            ("vmconsole revoke 'alice' w", [r"web\*"]),
            ("vmconsole grant alice web1 --role=v", ["viewer"]),
            ("vmconsole revoke bob a@b:c@", ["@d:e"]),
            ("vmconsole revoke bob a@b:c@d:", ["e"]),
            ("vmconsole us", ["user"]),
        ):
            self.assertEqual(self.offered(line), offers, line)
        none = " \t\n"
        self.assertEqual(self.offered("vmconsole grant @o", none), ["@ops"])
        self.assertEqual(self.offered("vmconsole key remove SHA256:", none), [self.fingerprint])

    def test_script(self) -> None:
        """The script is the same as by click's own way, and needs no configuration."""
        script = self.good("completion", "bash")
        self.assertIn("complete -o nosort -F _vmconsole_completion vmconsole", script)
        result = CliRunner().invoke(
            cli.main, [], prog_name="vmconsole", env={"_VMCONSOLE_COMPLETE": "bash_source"}
        )
        self.assertEqual(result.stdout, script)
        self.assertIn("#compdef vmconsole", self.good("completion", "zsh"))
        self.assertIn("--command vmconsole", self.good("completion", "fish"))
        self.assertIn("/etc/bash_completion.d/vmconsole", self.good("completion", "--help"))
        self.assertFalse(self.state.exists())

    def test_real_bash(self) -> None:
        """The real bash, with its own idea of words, ends up with lines that do what they say."""
        self.fill()
        (self.directory / "web.txt").touch()
        # One line each; readline's own keys complete it and show what came of it.
        lines = (
            "user remove bo",
            "grant @o",
            f"key remove {self.fingerprint[:12]}",
            "revoke alice we",
            "revoke alice 'we",
            "revoke bob a@b",
            "revoke bob a@b:c",
        )
        typed = "".join(f"vmconsole {line}\t\n" for line in lines)
        shown = self.in_bash(typed)
        self.assertEqual(
            shown,
            [
                ["user", "remove", "bob"],
                ["grant", "@ops"],
                ["key", "remove", self.fingerprint],
                ["revoke", "alice", "web*"],
                ["revoke", "alice", "web*"],
                ["revoke", "bob", "a@b:c@d:e"],
                ["revoke", "bob", "a@b:c@d:e"],
            ],
        )

    def in_bash(self, typed: str) -> list[list[str]]:
        """The words of each command line, as they are when Enter is pressed."""
        record = self.directory / "record"
        program = self.directory / "bin" / "vmconsole"
        program.parent.mkdir()
        # It answers TAB, and writes down all else.
        program.write_text(
            "#!/bin/sh\n"
            f'[ -n "$_VMCONSOLE_COMPLETE" ] && exec {shlex.quote(str(program))}-python\n'
            f"printf '%s\\0' \"$@\" end >> {shlex.quote(str(record))}\n"
        )
        script = program.with_name("vmconsole-python")
        script.write_text(
            f"#!{sys.executable}\nfrom vmconsole.cli import main\nmain(prog_name='vmconsole')\n"
        )
        for file in (program, script):
            file.chmod(0o755)
        rc = self.directory / "rc"
        rc.write_text(
            f"PATH={shlex.quote(str(program.parent))}:$PATH\n{self.good('completion', 'bash')}"
        )
        done = subprocess.run(
            ["script", "-qec", f"bash --rcfile {rc} -i", "/dev/null"],
            input=typed + "exit\n'\nexit\n",
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "VMCONSOLE_CONFIG": str(self.config),
                "TERM": "dumb",
            },
            cwd=self.directory,
            capture_output=True,
            text=True,
            # Each key that completes starts a Python.
            timeout=300,
            check=False,
        )
        self.assertTrue(record.exists(), done.stdout)
        words = record.read_text().split("\0")[:-1]
        lines: list[list[str]] = [[]]
        for word in words:
            if word == "end":
                lines.append([])
            else:
                lines[-1].append(word)
        return lines[:-1]
