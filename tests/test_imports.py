"""Imports run one way: tap/cli -> ssh, engine, hypervisor -> console -> interfaces, errors."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

PACKAGE = Path(__file__).parent.parent / "vmconsole"
# What each part may import of the others; the rest of vmconsole is the common ground.
PARTS = {
    "ssh": {"console"},
    "engine": set(),
    "hypervisor": set(),
    "console": set(),
    "check": {"ssh", "engine", "hypervisor"},
    "cli": {"check", "engine", "hypervisor"},
    "tap": {"ssh", "engine", "hypervisor", "console", "signals"},
}
COMMON = {
    "",
    "audit",
    "clocks",
    "config",
    "endpoints",
    "errors",
    "flight",
    "interfaces",
    "keyoptions",
    "pki",
    "publickeys",
    "refusals",
    "text",
    "threads",
    "watched",
}


def imports(path: Path, top_level: bool = False) -> Iterator[str]:
    """The dotted names that a module imports, types left out; ``top_level``: at its import."""
    tree = ast.parse(path.read_text())
    skipped = {
        child
        for node in ast.walk(tree)
        if (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
        or (top_level and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part_of(dotted: str) -> str:
    """``ssh`` for ``vmconsole.ssh.auth.Checker``."""
    return dotted.removeprefix("vmconsole").lstrip(".").split(".")[0]


class ImportTests(SynchronousTestCase):
    """The direction, and what nobody does."""

    def test_direction(self) -> None:
        """No part imports what is above or beside it."""
        wrong = []
        for path in sorted(PACKAGE.rglob("*.py")):
            part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
            allowed = COMMON | {part} | PARTS.get(part, set())
            for name in imports(path):
                if name.startswith("vmconsole") and name != "vmconsole.__version__":
                    if part_of(name) not in allowed:
                        wrong.append(f"{path.relative_to(PACKAGE)} imports {name}")
        self.assertEqual(wrong, [])

    def test_who_knows_whom(self) -> None:
        """Only ssh knows Conch, only the engine treq and SQLAlchemy; nobody imports libvirt or
        the reactor when imported himself."""
        owners = {"twisted.conch": "ssh", "treq": "engine", "sqlalchemy": "engine"}
        wrong = []
        for path in sorted(PACKAGE.rglob("*.py")):
            part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
            for name in imports(path):
                for package, owner in owners.items():
                    if name.startswith(package) and part != owner:
                        wrong.append(f"{path.relative_to(PACKAGE)} imports {name}")
            for name in imports(path, top_level=True):
                if name.startswith("libvirt") or name == "twisted.internet.reactor":
                    wrong.append(f"{path.relative_to(PACKAGE)} imports {name} at import")
        self.assertEqual(wrong, [])

    def test_nothing_is_a_toy(self) -> None:
        """No class under vmconsole is a fake, a stub or a dummy."""
        wrong = [
            f"{path.relative_to(PACKAGE)}: {node.name}"
            for path in sorted(PACKAGE.rglob("*.py"))
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ClassDef)
            and any(word in node.name for word in ("Fake", "Stub", "Dummy"))
        ]
        self.assertEqual(wrong, [])
