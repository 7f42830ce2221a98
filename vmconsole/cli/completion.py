"""``completion``: the shells' own part of completing names with TAB."""

from __future__ import annotations

import os
import re

import click
from click.shell_completion import (
    BashComplete,
    CompletionItem,
    ShellComplete,
    add_completion_class,
    get_completion_class,
    split_arg_string,
)

_PROGRAM = "vmconsole"
_VARIABLE = "_VMCONSOLE_COMPLETE"
_LINE, _BREAKS = f"{_VARIABLE}_LINE", f"{_VARIABLE}_BREAKS"

_BASH = """\
%(complete_func)s() {
    local type value
    COMPREPLY=()
    while IFS=, read -r type value; do
        case $type in
            dir) compopt -o dirnames ;;
            file) compopt -o default ;;
            plain) COMPREPLY+=("$value") ;;
        esac
    done < <(
        %(complete_var)s_LINE="${COMP_LINE:0:COMP_POINT}" \\
        %(complete_var)s_BREAKS="$COMP_WORDBREAKS" \\
        %(complete_var)s=bash_complete "$1" 2>/dev/null
    )
}
complete -o nosort -F %(complete_func)s %(prog_name)s
"""
_SPECIAL = re.compile(r"([^\w@%+=:,./-])", re.ASCII)


@add_completion_class
class _BashComplete(BashComplete):
    """For bash, whose words end at ``@`` and ``:``, and which expands what is not quoted.

    So it gets the line as it is, and gives what bash takes for its last word, with backslashes.
    """

    source_template = _BASH

    def source(self) -> str:
        """See ShellComplete; asks no bash for its version."""
        return ShellComplete.source(self)

    def get_completion_args(self) -> tuple[list[str], str]:
        """See ShellComplete."""
        line = os.environ[_LINE]
        word, _ = _last_word(line)
        before = line[: len(line) - len(word)]
        return split_arg_string(before)[1:], "".join(split_arg_string(word))

    def format_completion(self, item: CompletionItem[str]) -> str:
        """See ShellComplete."""
        word, is_quoted = _last_word(os.environ[_LINE])
        if item.type != "plain" or is_quoted:
            # Behind an open quote nothing is special, and bash replaces all up to that.
            return super().format_completion(item)
        typed = "".join(split_arg_string(word))
        breaks = set(os.environ.get(_BREAKS, "")) & set("@:=")
        # Of these bash takes @ for the beginning of the next word, and the others for nobody's.
        starts = (at + (char != "@") for at, char in enumerate(typed) if char in breaks)
        kept = typed[: max(starts, default=0)]
        value = _SPECIAL.sub(r"\\\1", item.value.removeprefix(kept))
        return f"{item.type},{value}"


def _last_word(line: str) -> tuple[str, bool]:
    """The word at the end, as it stands there, empty behind a blank; whether its quote is open."""
    start, quote, escaped = 0, "", False
    for at, char in enumerate(line):
        if escaped:
            escaped = False
        elif char == "\\" and quote != "'":
            escaped = True
        elif quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        elif char.isspace():
            start = at + 1
    return line[start:], bool(quote)


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Write the script that lets a shell complete names with TAB.

    
    bash: vmconsole completion bash > /etc/bash_completion.d/vmconsole
    zsh:  vmconsole completion zsh > /usr/share/zsh/site-functions/_vmconsole
    fish: vmconsole completion fish > ~/.config/fish/completions/vmconsole.fish

    For one bash alone: source <(vmconsole completion bash)
    """
    kind = get_completion_class(shell)
    assert kind is not None
    script = kind(context.find_root().command, {}, _PROGRAM, _VARIABLE).source()
    click.echo(script, nl=False)
