"""Twisted's endpoint strings, as the configuration has them."""

from __future__ import annotations

from typing import Any

from twisted.internet.endpoints import serverFromString
from twisted.internet.interfaces import IStreamServerEndpoint


def server_endpoint(reactor: Any, description: str) -> IStreamServerEndpoint:
    """What ``description`` names; see twisted.internet.endpoints.serverFromString. Opens nothing.

    Raises ValueError, whatever Twisted raises.
    """
    try:
        endpoint: IStreamServerEndpoint = serverFromString(reactor, description)
    except Exception as error:
        # Each type of endpoint has its own errors: ssl: passes on pyOpenSSL's.
        raise ValueError(str(error)) from error
    return endpoint
