"""What the documentation names is there: files, headings, commands, settings."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from pathlib import Path

import click
import msgspec
from twisted.trial.unittest import SynchronousTestCase

from vmconsole import cli
from vmconsole.config import Config

ROOT = Path(__file__).parent.parent
DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
CODE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def prose(document: Path) -> str:
    """The text without its blocks of code."""
    return CODE.sub("", document.read_text())


def anchors(document: Path) -> set[str]:
    """The headings as links name them."""
    headings = re.findall(r"^#+ (.+)$", prose(document), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


class DocumentTests(SynchronousTestCase):
    """README.md and docs/."""

    def test_links(self) -> None:
        """Links inside the project lead to a file that is there, and to a heading in it."""
        for document in DOCUMENTS:
            for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", prose(document)):
                path, _, anchor = link.partition("#")
                target = document.parent / path if path else document
                self.assertTrue(target.exists(), f"{document.name}: {link}")
                if anchor:
                    self.assertIn(anchor, anchors(target), f"{document.name}: {link}")

    def test_files(self) -> None:
        """What looks like a file of the project is one."""
        for document in DOCUMENTS:
            for name in re.findall(
                r"`((?:bin|docs|etc|tests|vmconsole|twisted)/[\w./-]+)`", prose(document)
            ):
                self.assertTrue((ROOT / name).exists(), f"{document.name}: {name}")

    def test_commands(self) -> None:
        """Every `vmconsole` command that is shown exists, and takes what is shown."""
        Path("id_ed25519.pub").touch()  # one names this; a test's folder is a temporary one
        shown = 0
        for document in DOCUMENTS:
            for language, code in CODE.findall(document.read_text()):
                if language != "sh":
                    continue
                for line in re.findall(r"(?:^|[ (])vmconsole ([^>)\n]+)", code, re.MULTILINE):
                    words = shlex.split(line, comments=True)
                    self.takes(cli.main, words, f"{document.name}: vmconsole {line}")
                    shown += 1
        self.assertGreater(shown, 5)

    def takes(self, command: click.Command, words: list[str], where: str) -> None:
        """Fail unless click would parse ``words``."""
        try:
            context = command.make_context("vmconsole", words)
            if isinstance(command, click.Group):
                _, subcommand, rest = command.resolve_command(context, words)
                assert subcommand is not None
                self.takes(subcommand, rest, where)
        except click.UsageError as error:
            self.fail(f"{where}: {error.format_message()}")

    def test_settings(self) -> None:
        """Every piece of configuration that is shown is a valid one."""
        for document in DOCUMENTS:
            for language, code in CODE.findall(document.read_text()):
                if language == "toml":
                    msgspec.convert(tomllib.loads(code), Config)

    def test_sample_configuration(self) -> None:
        """etc/vmconsole.toml has all settings, commented out, with their defaults."""
        lines = (ROOT / "etc/vmconsole.toml").read_text().replace("#node1 =", "# node1 =")
        raw = tomllib.loads(re.sub(r"^#(?=\w+ = )", "", lines, flags=re.MULTILINE))
        self.assertEqual(raw, json.loads(msgspec.json.encode(Config())))
