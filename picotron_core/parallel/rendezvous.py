"""How the processes of a run meet: through a folder of one machine, or a TCPStore.

`--nproc` starts ranks with a private folder (see `lifeline`): they meet through torch's FileStore,
and nothing listens for it. torchrun, Slurm or a user starts them with MASTER_ADDR and MASTER_PORT:
torchrun's agent keeps the TCPStore; otherwise the first rank does, on the address named alone.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from picotron_core.errors import ConfigError, RunError, one_line, reason
from picotron_core.parallel.folder_store import FolderStore
from picotron_core.parallel.lifeline import Lifeline
from picotron_core.parallel.network import check_gloo_interfaces, is_loopback, on_loopback

BACKLOG = 4096  # connections of ranks that all come at once
RESOLVE_S = 15.0
log = logging.getLogger("picotron")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Which of the processes this one is, by torchrun's variables.

    host, port: of the TCPStore; "" and 0 where the ranks meet in a folder.
    one_machine: whether all ranks are known to be on this machine.
    """

    rank: int
    size: int
    local_rank: int
    host: str = ""
    port: int = 0
    one_machine: bool = False


def place_of(variables: Mapping[str, str], *, in_folder: bool = False) -> Place | None:
    """Read torchrun's variables; None for a process that is alone.

    Args:
        in_folder: MASTER_ADDR and MASTER_PORT are not needed.

    Raises: ConfigError where they are set in part, or to what cannot be.
    """
    if "WORLD_SIZE" not in variables:
        return None
    size = _number(variables, "WORLD_SIZE", least=1)
    if size == 1:
        if variables.get("RANK"):
            _number(variables, "RANK", least=0, below=1, of="WORLD_SIZE")
        return None
    needed = ["RANK", "LOCAL_RANK", *([] if in_folder else ["MASTER_ADDR", "MASTER_PORT"])]
    if missing := [name for name in needed if not variables.get(name)]:
        raise ConfigError(
            f"WORLD_SIZE is {size}, but the environment lacks {', '.join(missing)}. Start with "
            "torchrun, or unset WORLD_SIZE for one process."
        )
    rank = _number(variables, "RANK", least=0, below=size, of="WORLD_SIZE")
    local_size = size
    if variables.get("LOCAL_WORLD_SIZE"):
        local_size = _number(variables, "LOCAL_WORLD_SIZE", least=1)
    of = "LOCAL_WORLD_SIZE" if variables.get("LOCAL_WORLD_SIZE") else "WORLD_SIZE"
    local_rank = _number(variables, "LOCAL_RANK", least=0, below=local_size, of=of)
    if in_folder:
        return Place(rank=rank, size=size, local_rank=local_rank, one_machine=True)
    host = variables["MASTER_ADDR"]
    on_one = is_loopback(host) or (of == "LOCAL_WORLD_SIZE" and local_size == size)
    port = _number(variables, "MASTER_PORT", least=1, below=2**16)
    return Place(
        rank=rank, size=size, local_rank=local_rank, host=host, port=port, one_machine=on_one
    )


def _number(
    variables: Mapping[str, str], name: str, *, least: int, below: int = 2**31, of: str = ""
) -> int:
    text = variables[name]
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if least <= number < below:
        return number
    wanted = f"at least {least} and below {of}, which is {below}" if of else ""
    wanted = wanted or (f"{least} to {below - 1}" if below < 2**31 else f"at least {least}")
    raise ConfigError(
        f"{name} is {one_line(text, longest=100)!r}; it must be a number, {wanted}. Start with "
        "torchrun, which sets it, or unset WORLD_SIZE for one process."
    )


def choose_interfaces(place: Place, *, in_folder: bool) -> None:
    """Have gloo and NCCL talk over the loopback interface where all ranks are on this machine,
    unless the user of torchrun has named another.

    Raises: ConfigError for a name that gloo could not use.
    """
    if not in_folder:
        check_gloo_interfaces(os.environ)
    if place.one_machine:
        for name, value in on_loopback().items():
            if in_folder or not os.environ.get(name):
                os.environ[name] = value


def meet_in_folder(place: Place, line: Lifeline, timeout: timedelta) -> tuple[Any, Any, str]:
    """The ranks' store, one for the watchdog alone, and what it says of a store that is lost.

    Raises: RunError where the folder cannot be used.
    """
    from torch.distributed import DistError, FileStore  # type: ignore[attr-defined]

    folder = line.folder.path
    hearts = FolderStore(folder, place.rank)
    try:
        name: Any = os.fsencode(folder / "store")  # its own encoding would refuse some names
        store = FileStore(name)
        store.set_timeout(timeout)
        store.set(f"here/{place.rank}", "")  # else whoever asks first waits for the file
        hearts.set(f"failed-{place.rank}", "")  # room for its last words on a disk that fills up
    except (DistError, RuntimeError, OSError) as error:
        raise RunError(
            f"Rank {place.rank} cannot meet the others in {folder}: {reason(error)}. Set TMPDIR "
            "to a folder of a local disk with some space."
        ) from None
    lost = f"the folder {folder}, in which they meet, cannot be read or written any more."
    return store, hearts, lost


def meet_over_tcp(place: Place, timeout: timedelta) -> tuple[Any, Any, str]:
    """As `meet_in_folder`.

    Raises: ConfigError for a host that is none; RunError where the others cannot be met within the
        timeout.
    """
    from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]
    from torch.distributed.rendezvous import rendezvous

    address = _resolve(place.host, place.port, min(RESOLVE_S, timeout.total_seconds()))
    by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        if place.rank == 0 and not by_agent:
            listener = _listen(place, *address)
            store: Any = TCPStore(
                place.host,
                place.port,
                world_size=place.size,
                is_master=True,
                timeout=timeout,
                master_listen_fd=listener.detach(),
            )
        else:
            store, _, _ = next(rendezvous("env://", place.rank, place.size, timeout=timeout))
        hearts = store.clone() if hasattr(store, "clone") else store  # torch 2.8
    except (DistError, RuntimeError, OSError, ValueError) as error:
        raise RunError(
            f"Rank {place.rank} cannot meet the others at {place.host}:{place.port}: "
            f"{reason(error)}. Look whether all {place.size} ranks were started, with this "
            "MASTER_ADDR and MASTER_PORT, and what they say."
        ) from None
    keeper = f"the launcher at {place.host}" if by_agent else "rank 0"
    lost = (
        f"the store does not answer, which {keeper} keeps: killed or stopped, or its machine is "
        "gone. See its output."
    )
    return store, hearts, lost


def _resolve(host: str, port: int, patience_s: float) -> tuple[int, Any]:
    """Family and address of a host. A name server may be slow when a machine starts.

    Raises: ConfigError where there is none.
    """
    end = time.monotonic() + patience_s
    while True:
        try:
            family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        except (OSError, UnicodeError) as error:
            again = isinstance(error, OSError) and error.errno == socket.EAI_AGAIN
            if again and time.monotonic() < end:
                time.sleep(0.5)
                continue
            raise ConfigError(
                f"MASTER_ADDR is {one_line(host, longest=100)!r}, which cannot be resolved: "
                f"{reason(error)}. Set it to the name or address of the first rank's machine."
            ) from None
        return family, address


def _listen(place: Place, family: int, address: Any) -> socket.socket:
    """A socket for the store that the first rank keeps, on the address of MASTER_ADDR alone: torch
    would listen on every interface, and whoever reaches the store can change what is in it.

    Raises: OSError where the port is in use.
    """
    host = address[0]
    if is_loopback(host) and not place.one_machine:
        why = f"is {host} on this machine, where no other reaches it"
    else:
        try:
            return socket.create_server(address, family=family, backlog=BACKLOG)
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:
                raise
            why = f"is {host}, which is no address of this machine"
    log.warning(
        "MASTER_ADDR=%s %s: the store listens on every interface. Let nobody else reach port %d, "
        "or set MASTER_ADDR to an address of the first rank's machine.",
        *(place.host, why, place.port),
    )
    both = socket.has_dualstack_ipv6()
    return socket.create_server(
        ("", place.port),
        family=socket.AF_INET6 if both else socket.AF_INET,
        backlog=BACKLOG,
        dualstack_ipv6=both,
    )
