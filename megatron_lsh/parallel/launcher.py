"""Where this process stands among all, as its launcher tells it in the environment."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_lsh.errors import ConfigError


@dataclass(frozen=True)
class Place:
    """Number of this process among all and among those of its machine, how many there are, and a name of its node."""

    rank: int
    local_rank: int
    world_size: int
    node: str


def place_of(environment: Mapping[str, str]) -> Place:
    """What torchrun's variables say; one process alone without them."""
    rank, world_size = int(environment.get("RANK", 0)), int(environment.get("WORLD_SIZE", 1))
    local_rank = int(environment.get("LOCAL_RANK", rank))
    # torchrun numbers the ranks of a node one after the other; there may be several of its nodes on one machine.
    node = f"from rank {rank - local_rank}" if "LOCAL_WORLD_SIZE" in environment else socket.gethostname()
    return Place(rank, local_rank, world_size, node)


def check_complete(environment: Mapping[str, str]) -> None:
    """Raise ConfigError where some of torchrun's variables are set, but not all that are needed to meet other ranks."""
    needed = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if name not in environment]
    if missing and not {"RANK", "WORLD_SIZE"} <= set(missing):
        raise ConfigError(f"environment variables {missing} are not set but other torchrun variables are: use torchrun")
