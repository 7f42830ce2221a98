"""Becomes a command that has to wait for all that its children leave behind.

python bench/subreaper.py COMMAND...

OpenSSH's sshd has two processes for each connection. When that ends without a login, nobody waits
for the second one, which has computed the key exchange: what it cost would be nobody's. So it is
handed to the listener, which waits for whatever is there (PR_SET_CHILD_SUBREAPER, see prctl(2)).
"""

from __future__ import annotations

import ctypes
import os
import sys

_PR_SET_CHILD_SUBREAPER = 36


def main(command: list[str]) -> None:
    """Does not return. Raises OSError."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
