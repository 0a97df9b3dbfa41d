"""The processes of a run, by the variables that torchrun sets."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from picotron_core.errors import ConfigError

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """This process among all. `store` is torch's rendezvous store; None for a single process."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    store: Any = field(default=None, repr=False)

    @property
    def is_first(self) -> bool:
        """Whether this process prints and writes the run's files."""
        return self.rank == 0

    def share(self, key: str, make: Callable[[], str]) -> str:
        """Rank 0's value of `make()`, on every rank."""
        if self.size == 1:
            return make()
        if self.is_first:
            self.store.set(key, make())
        return bytes(self.store.get(key)).decode()

    def gather(self, key: str, value: str) -> list[str]:
        """Every rank's value, in rank order."""
        if self.size == 1:
            return [value]
        self.store.set(f"{key}/{self.rank}", value)
        return [bytes(self.store.get(f"{key}/{rank}")).decode() for rank in range(self.size)]


def join(*, timeout_s: float) -> World:
    """Meet the other processes; a lone process where torchrun's variables are not set."""
    values = {name: os.environ.get(name) for name in VARIABLES}
    if values["WORLD_SIZE"] in (None, "1"):
        return World()
    try:
        rank, size, local_rank = (int(values[name] or "") for name in VARIABLES)
    except ValueError:
        raise ConfigError(
            f"WORLD_SIZE is set, but of {values} not all are numbers. Start the run with torchrun, "
            "or unset WORLD_SIZE for a single process."
        ) from None

    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(rendezvous("env://", rank, size, timeout=timedelta(seconds=timeout_s)))
    return World(rank=rank, size=size, local_rank=local_rank, store=store)
