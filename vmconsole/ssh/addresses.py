"""Whom an address stands for, where clients are counted by it."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address

_IPV6_PREFIX = 64


def source_of(address: str) -> str | None:
    """Who is counted for ``address``: an IPv4 address, or the /64 of an IPv6 address, since
    whoever has one of those has all of its addresses.

    None: it is no IP address, as with a unix socket.
    """
    try:
        parsed: IPv4Address | IPv6Address = ip_address(address)
    except ValueError:
        return None
    if isinstance(parsed, IPv4Address):
        return str(parsed)
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(IPv6Network((parsed, _IPV6_PREFIX), strict=False))
