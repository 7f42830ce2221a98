"""What the tests of the ``vmconsole`` command share."""

from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner, Result
from twisted.trial.unittest import SynchronousTestCase

from tests.engine_kit import short_directory
from vmconsole import cli

ROOT = Path(__file__).parent.parent
# As a process of its own, where its own stdout matters.
PROCESS = "from vmconsole.cli import main; main()"


class CliTestCase(SynchronousTestCase):
    """Runs the command with a configuration of its own."""

    def setUp(self) -> None:
        self.directory = short_directory(self)
        self.state = self.directory / "state"
        self.config = self.directory / "vmconsole.toml"
        self.configure()

    def configure(self, more: str = "") -> None:
        self.config.write_text(f'{more}\n[state]\ndirectory = "{self.state}"\n')

    def run_it(self, *arguments: str, input: str = "") -> Result:
        environment = {"VMCONSOLE_CONFIG": str(self.config)}
        return CliRunner().invoke(cli.main, arguments, input=input, env=environment)

    def good(self, *arguments: str, input: str = "") -> str:
        """What it wrote; it exited with 0."""
        result = self.run_it(*arguments, input=input)
        self.assertEqual((result.exit_code, result.stderr), (0, ""), arguments)
        return result.stdout

    def bad(self, *arguments: str, input: str = "", status: int = 1) -> str:
        """What it wrote on stderr; it exited with ``status``, and wrote nothing else."""
        result = self.run_it(*arguments, input=input)
        self.assertEqual((result.exit_code, result.stdout), (status, ""), arguments)
        if status == 1:
            self.assertTrue(result.stderr.startswith("ERROR: "), result.stderr)
            self.assertEqual(result.stderr.count("\n"), 1)
        return result.stderr

    def lines(self, *arguments: str) -> list[list[str]]:
        """The table's lines, as words."""
        return [line.split() for line in self.good(*arguments).splitlines()]
