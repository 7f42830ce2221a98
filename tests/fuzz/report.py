"""What a run tells of how connections ended."""

from __future__ import annotations

from collections import Counter

_REASONS = {
    "None": "by the client's own DISCONNECT",
    "2": "protocol error",
    "3": "key exchange failed",
    "5": "MAC error",
    "7": "service not available",
    "8": "version not supported",
    "10": "connection lost",
    "11": "by application",
    "12": "too many connections",
    "14": "no more authentication methods",
}


def endings(counted: Counter[str]) -> str:
    """The histogram of how connections ended."""
    lines = []
    for name, count in counted.most_common():
        meaning = _REASONS.get(name.removeprefix("reason "), "")
        lines.append(f"{count:9} {name}{': ' + meaning if meaning else ''}")
    return "\n".join(lines)
