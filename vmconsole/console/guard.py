"""Whether a guest's last line looks like a shell that somebody left open. Best effort, pure."""

from __future__ import annotations

import re

from vmconsole.console.terminal import Sanitizer

# What a shell's prompt ends with: sh and its kin, root's, zsh's, fish's and PowerShell's.
_PROMPT = re.compile(r"\S.{0,200}[$#%>] ?$|^[$#%>] ?$")
# What asks who somebody is, or waits for a boot loader, ends with none of these as a rule; but a
# banner may.
_NOT_A_SHELL = re.compile(r"(?i)\b(login|user ?name|password|passphrase|passcode)\b[^$#%>]*:?\s*$")
_SEQUENCE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|[()].|[0-~])")
# Bytes that a prompt's line may have, with its colours.
_LONGEST = 1024


def shows_shell_prompt(printed: bytes) -> bool:
    """Whether ``printed``, the end of what a guest printed, ends with a shell's prompt.

    That is a last line that is not finished, ends as prompts do, and does not ask for a login.
    """
    text = Sanitizer().feed(printed[-_LONGEST:]).decode("utf-8", "replace")
    line = re.split(r"[\r\n]", _SEQUENCE.sub("", text))[-1]
    return bool(_PROMPT.search(line)) and not _NOT_A_SHELL.search(line)
