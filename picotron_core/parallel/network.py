"""Which network interfaces ranks talk over, checked before torch opens anything on them."""

from __future__ import annotations

import ipaddress
import os
import socket
import struct
from collections.abc import Iterator, Mapping
from contextlib import suppress

from picotron_core.errors import ConfigError, one_line

GLOO, NCCL = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"
_SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of an interface


def interfaces() -> dict[str, list[str]]:
    """The addresses of each network interface of this machine; IPv6 and IPv4 where the system
    tells, without addresses where it does not.
    """
    found: dict[str, list[str]] = {name: [] for _, name in socket.if_nameindex()}
    for name, addresses in found.items():
        with suppress(OSError, ImportError):
            addresses.append(_ipv4(name))
    with suppress(OSError), open("/proc/net/if_inet6") as table:
        for line in table:
            digits, *_, name = line.split()
            found.setdefault(name, []).append(str(ipaddress.IPv6Address(bytes.fromhex(digits))))
    return found


def loopback() -> str:
    """The name of the loopback interface.

    Raises: ConfigError where it is down: ranks of one machine cannot talk then.
    """
    found = interfaces()
    for name, addresses in found.items():
        if any(ipaddress.ip_address(address).is_loopback for address in addresses):
            return name
    for name in ("lo0", "lo"):  # a system that does not tell addresses
        if name in found and not any(found.values()):
            return name
    raise ConfigError(
        "The ranks of one machine talk over its loopback interface, but none has the address "
        f"127.0.0.1. There are: {listed()}. As root: ip link set lo up."
    )


def listed() -> str:
    """All interfaces with their addresses, for an error."""
    return "; ".join(
        f"{one_line(name)} ({', '.join(addresses) or 'no address'})"
        for name, addresses in interfaces().items()
    )


def check_gloo_interfaces(variables: Mapping[str, str]) -> None:
    """Check what GLOO_SOCKET_IFNAME names: gloo's own error does not say what there is, or is an
    abort. An empty value is as none.

    Raises: ConfigError.
    """
    value = variables.get(GLOO, "")
    if not value:
        return
    found = interfaces()
    told = any(found.values())
    for name in value.split(","):
        if name.startswith("^"):
            problem = f"{name[:100]!r}: gloo takes names, and no ^ that excludes some"
        elif name not in found:
            problem = f"{name[:100]!r} is no interface of this machine"
        elif told and not found[name]:
            problem = f"{name!r} has no address: it is down, or not set up"
        else:
            continue
        raise ConfigError(
            f"{GLOO}={one_line(value)}: {problem}. There are: {listed()}. Name the one through "
            f"which the ranks' machines reach each other, as in {GLOO}={_best(found)}, or unset it."
        )


def advice(variables: Mapping[str, str], *, one_machine: bool) -> str:
    """What to look at where a transport finds no way to the other ranks, as sentences."""
    there = f"The interfaces of this machine are: {listed()}."
    if one_machine:
        return f"{there} The ranks of one machine talk over the loopback, {loopback()}."
    named = [f"{name}={one_line(variables[name])}" for name in (GLOO, NCCL) if variables.get(name)]
    said = ", ".join(named) or f"neither {GLOO} nor {NCCL} is set"
    return (
        f"{there} Here {said}. Name the interface through which the machines reach each other in "
        f"{GLOO} (CPU) or {NCCL} (CUDA), and let no firewall stand between them."
    )


def is_loopback(host: str) -> bool:
    """Whether a host's name or address means this machine alone, wherever it is read."""
    if host.lower() in ("localhost", "ip6-localhost", "localhost.localdomain"):
        return True
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


def on_loopback() -> dict[str, str]:
    """Variables that hold gloo, and the start of NCCL, to the loopback interface."""
    name = loopback()
    return {GLOO: name, NCCL: f"={name}"}


def ignored_interfaces(variables: Mapping[str, str]) -> Iterator[str]:
    """What a user's variables say that ranks of one machine do not follow, as sentences."""
    name = loopback()
    for variable in (GLOO, NCCL):
        value = variables.get(variable, "")
        if value and value.strip("=") != name:
            yield (
                f"{variable}={one_line(value)} is not used: the ranks of one machine talk over "
                f"its loopback interface, {name}."
            )


def _ipv4(name: str) -> str:
    import fcntl

    request = struct.pack("256s", os.fsencode(name)[:15])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        answer = fcntl.ioctl(probe, _SIOCGIFADDR, request)
    return socket.inet_ntoa(answer[20:24])


def _best(found: Mapping[str, list[str]]) -> str:
    """An interface that others could reach, else the loopback."""
    for name, addresses in found.items():
        for address in map(ipaddress.ip_address, addresses):
            if not (address.is_loopback or address.is_link_local):
                return name
    return loopback()
