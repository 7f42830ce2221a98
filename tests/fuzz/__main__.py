"""``python -m tests.fuzz``: fuzz the ssh server; docs/fuzzing.md tells how."""

from __future__ import annotations

import sys

from tests.fuzz.measure import covered, measured


def main(arguments: list[str]) -> int:
    """Run the command; its coverage begins before what it runs is imported."""
    with measured("--coverage" in arguments) as measuring:
        from tests.fuzz import command

        status = command.main(arguments)
    if measuring is not None:
        print(covered(measuring))
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
