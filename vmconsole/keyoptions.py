"""What a line of authorized_keys asks of whoever uses its key: the options, as sshd(8) has them."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

import msgspec

from vmconsole.text import printable

# sshd knows this one escape: any other backslash stands for itself. The alternatives exclude each
# other, so that no text takes long; possessive quantifiers are broken in Python 3.11.2.
QUOTED = r'"(?:\\"|[^"\\]|\\(?!"))*"'

# They ask for less than what holds here for everybody.
_HARMLESS = frozenset(
    {
        "restrict",
        "no-agent-forwarding",
        "no-port-forwarding",
        "no-user-rc",
        "no-x11-forwarding",
    }
)
_OPTIONS = re.compile(rf'(?:[^\s"]|{QUOTED})*')
_OPTION = re.compile(rf'([^,="]*)((?:[^,"]|{QUOTED})*)')
_VALUE = re.compile(f"=({QUOTED})")
_VISIBLE = re.compile("[!-~]+")
_WILDCARDS = re.compile("[0-9a-f:.*?]+")
# Characters. What users write here is matched on the reactor's thread.
_LONGEST = 4096
# Patterns in a line. Each is looked at whenever its key is offered.
_MOST = 128
_LAST_MOMENT = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC).timestamp()
_TIME = re.compile("([0-9]{4})([0-9]{2})([0-9]{2})(?:([0-9]{2})([0-9]{2})([0-9]{2})?)?([Zz]?)")


class KeyOptions(msgspec.Struct, frozen=True):
    """When, from where and how a key may be used. Raises ValueError for a bad pattern."""

    sources: tuple[str, ...] = ()
    """The patterns of ``from=``, in order; none: from anywhere."""
    expires: float | None = None
    """Seconds since the epoch. Up to then, and at that moment, the key may be used."""
    verify_required: bool = False
    """The token must have verified its user, by PIN or fingerprint; presence is not enough."""

    def __post_init__(self) -> None:
        if len(self.sources) > _MOST:
            raise ValueError(f"its option from has more than {_MOST} patterns")
        for pattern in self.sources:
            _read(pattern)

    @property
    def names(self) -> list[str]:
        """The names of the options that are set."""
        values = {
            "from": self.sources,
            "expiry-time": self.expires is not None,
            "verify-required": self.verify_required,
        }
        return [name for name, value in values.items() if value]

    def __str__(self) -> str:
        """As a line of authorized_keys has them, for ``parse_key_options``; "" when none."""
        texts = []
        if self.sources:
            escaped = ",".join(self.sources).replace('"', '\\"')
            texts.append(f'from="{escaped}"')
        if self.expires is not None:
            # Some zone's last day may be in the year 10000 of others.
            moment = datetime.fromtimestamp(min(self.expires, _LAST_MOMENT), UTC)
            texts.append(f'expiry-time="{moment.year:04}{moment:%m%d%H%M%S}Z"')
        if self.verify_required:
            texts.append("verify-required")
        return ",".join(texts)

    def refusal(self, address: str, now: float) -> str:
        """Why the key may not be used from ``address`` at ``now`` (seconds); "" when it may.

        ``from=`` is about IP addresses, since no DNS is asked: an ``address`` that is none is
        refused by every ``from=``, even ``*``.
        """
        if self.expires is not None and now > self.expires:
            return "the key has expired"
        if self.sources and not _admits(self.sources, address):
            return f"the key may not be used from {printable(address, 60)}"
        return ""


NO_OPTIONS = KeyOptions()


def parse_key_options(text: str) -> KeyOptions:
    """Read the options of a line, which stand before the key's type.

    Raises ValueError for what is unknown or malformed: it may be a restriction, so that the key
    must not be used. The text of the error never holds what was read, except for an option's name.
    """
    if len(text) > _LONGEST:
        raise ValueError(f"its options have more than {_LONGEST} characters")
    if not _OPTIONS.fullmatch(text):
        raise ValueError("its options are malformed")
    sources: tuple[str, ...] = ()
    times = []
    verify_required = False
    for name, rest in _OPTION.findall(text):
        option = name.lower()
        if option == "from":
            if sources:
                raise ValueError("its option from is there twice")
            sources = tuple(_value(option, rest).split(","))
        elif option == "expiry-time":
            times.append(_time(_value(option, rest)))
        elif option == "verify-required" and not rest:
            verify_required = True
        elif rest or (option and option not in _HARMLESS):
            raise ValueError(f"its option {printable(name, 40) or '(no name)'} is not supported")
    return KeyOptions(sources, min(times, default=None), verify_required)


def _value(option: str, rest: str) -> str:
    quoted = _VALUE.fullmatch(rest)
    if quoted is None:
        raise ValueError(f"its option {option} needs a value in quotes")
    return quoted[1][1:-1].replace('\\"', '"')


def _time(text: str) -> float:
    found = _TIME.fullmatch(text)
    try:
        if found is None:
            raise ValueError
        year, month, day, hour, minute, second = (int(part or 0) for part in found.groups()[:6])
        moment = datetime(year, month, day, hour, minute, second, tzinfo=UTC if found[7] else None)
        # Without a zone it is the system's; of an hour that comes twice, the earlier one.
        return moment.timestamp()
    except ValueError:
        raise ValueError("its option expiry-time is no time") from None


@lru_cache(4096)
def _read(pattern: str) -> tuple[bool, IPv4Network | IPv6Network | str]:
    """Whether it is negated, and the network or wildcards that it is about."""
    text = pattern.removeprefix("!").lower()
    negated = text != pattern.lower()
    if not _VISIBLE.fullmatch(text):
        raise ValueError("its option from has an empty pattern, or strange characters in one")
    network = _network(text)
    if network is not None:
        return negated, network
    # As a host name it could match nobody, and would let in whom it should keep out.
    if negated and not (_WILDCARDS.fullmatch(text) and ("*" in text or "?" in text)):
        raise ValueError("its option from excludes what is no IP address")
    return negated, text


def _network(text: str) -> IPv4Network | IPv6Network | None:
    _, slash, mask = text.partition("/")
    try:
        # ipaddress knows masks such as /255.0.0.0, too, and zones; sshd's CIDR does not.
        if "%" in text or (slash and not mask.isdigit()):
            raise ValueError
        network = ip_network(text)
    except ValueError:
        if slash:
            raise ValueError("its option from has a malformed network") from None
        return None
    if isinstance(network, IPv6Network) and network.network_address.ipv4_mapped is not None:
        return IPv4Network((network.network_address.ipv4_mapped, network.prefixlen - 96))
    return network


def _admits(patterns: tuple[str, ...], address: str) -> bool:
    try:
        ip = _plain(ip_address(address))
    except ValueError:
        return False
    matching = set()
    for pattern in patterns:
        negated, wanted = _read(pattern)
        if _matches(wanted, str(ip)) if isinstance(wanted, str) else ip in wanted:
            matching.add(negated)
    return matching == {False}


def _plain(ip: IPv4Address | IPv6Address) -> IPv4Address | IPv6Address:
    """Without a zone, and IPv4 where it is mapped into IPv6."""
    if isinstance(ip, IPv4Address):
        return ip
    return ip.ipv4_mapped or IPv6Address(int(ip))


def _matches(pattern: str, text: str) -> bool:
    """Whether ``*`` and ``?`` cover ``text``, in steps no more than the product of both sizes."""
    pattern = re.sub(r"\*+", "*", pattern)
    if len(pattern.replace("*", "")) > len(text):
        return False
    reached = {0}
    for char in pattern:
        if char == "*":
            reached = set(range(min(reached), len(text) + 1))
        else:
            reached = {at + 1 for at in reached if at < len(text) and char in ("?", text[at])}
        if not reached:
            return False
    return len(text) in reached
