"""Proxies of the environment, as companies set them: gRPC takes them for every address, its own machine's
too, and then asks a proxy for what is on this machine. Here loopback never goes through one, and an
error elsewhere names the variable that chose the proxy.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping

VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy")
"""The library's own, in its order: the first that is set counts."""
EXCEPTIONS = ("no_grpc_proxy", "no_proxy")
_BY_ADDRESS = "GRPC_ADDRESS_HTTP_PROXY"
_SCHEMES = ("dns", "ipv4", "ipv6")
_DIRECT: tuple[tuple[str, int | str], ...] = (
    ("grpc.enable_http_proxy", 0),
    # The library's proxy of addresses, which the option above does not turn off.
    ("grpc.address_http_proxy_enabled_addresses", ""),
)


def host_of(address: str) -> str | None:
    """The host of a gRPC address; None of a socket that has none, such as unix:/path."""
    scheme, colon, rest = address.partition(":")
    if colon and scheme in _SCHEMES:
        address = rest.rpartition("/")[2]
    elif colon and (scheme.startswith("unix") or scheme == "vsock"):
        return None
    if address.startswith("["):
        return address[1:].partition("]")[0]
    return address.rpartition(":")[0] or address


def is_loopback(address: str) -> bool:
    """Whether an address is on this machine, by its looks: no name is resolved."""
    host = host_of(address)
    if host is None or host.lower().rstrip(".") in ("localhost", "ip6-localhost"):
        return True
    try:
        found = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host.lower().rstrip(".").endswith(".localhost")
    mapped = getattr(found, "ipv4_mapped", None) or found
    return bool(mapped.is_loopback or mapped.is_unspecified)


def channel_options(address: str) -> tuple[tuple[str, int | str], ...]:
    """Channel arguments by which loopback is reached without a proxy; none for other addresses."""
    return _DIRECT if is_loopback(address) else ()


def variable_for(address: str, environment: Mapping[str, str] | None = None) -> str | None:
    """The variable of the environment by which calls to an address go through a proxy, if one does."""
    environment = os.environ if environment is None else environment
    host = host_of(address)
    if host is None or is_loopback(address):
        return None
    if environment.get(_BY_ADDRESS):
        return _BY_ADDRESS
    variable = next((name for name in VARIABLES if environment.get(name)), None)
    exceptions = next((environment[name] for name in EXCEPTIONS if environment.get(name)), "")
    if variable is None or any(_covers(entry.strip(), host) for entry in exceptions.split(",")):
        return None
    return variable


def _covers(entry: str, host: str) -> bool:
    """Whether an entry of no_proxy, the end of a name or a network, is of a host."""
    if not entry:
        return False
    if "/" in entry:
        try:
            return ipaddress.ip_address(host) in ipaddress.ip_network(entry, strict=False)
        except ValueError:
            return False
    return host.lower().endswith(entry.lower())
