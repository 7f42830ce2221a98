"""Who is on a console, in words."""

from __future__ import annotations

from collections.abc import Iterator

from vmconsole.console.attachment import Attachment
from vmconsole.console.console import Console
from vmconsole.text import lasting


def describe_all(console: Console, now: float) -> Iterator[str]:
    """A line for each who is attached, the one with the keyboard first."""
    people = [each for each in console.attachments if not each.party.hidden]
    attachments = sorted(people, key=lambda each: (not each.has_keyboard, each.since))
    for attachment in attachments:
        yield describe(attachment, now)


def describe(attachment: Attachment, now: float) -> str:
    """Who it is, from where, since when, and what they do."""
    here = lasting(now - attachment.since)
    if attachment.has_begun and not attachment.console.is_open:
        doing = "waits for it to come back"
    elif attachment.has_keyboard:
        doing = f"has the keyboard, idle for {lasting(now - attachment.typed_at)}"
    elif not attachment.has_begun:
        doing = "waits for it to open"
    else:
        doing = "watches" if attachment.may_type else "may only watch"
    return f"{attachment.name}: here for {here}, {doing}"
