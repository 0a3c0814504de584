"""What carries activations and gradients from one rank of a pipeline to another."""

from __future__ import annotations

from collections import deque

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lsh.parallel.context import Group


class Inlet:
    """Receives tensors of one shape from one rank, in the order in which they are sent. One is under way beforehand."""

    def __init__(self, link: Group, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self._link, self._shape, self._dtype, self._device = link, shape, dtype, device
        self._source = next(rank for rank in link.ranks if rank != link.ranks[link.rank])
        self._left = 0
        self._coming: tuple[Tensor, dist.Work] | None = None

    def expect(self, count: int) -> None:
        """So many will be sent. All of before must have been received."""
        self._left = count
        self._start()

    def receive(self) -> Tensor:
        """Wait for the next one."""
        assert self._coming is not None, "nothing is expected"
        x, work = self._coming
        work.wait()
        self._start()
        return x

    def _start(self) -> None:
        self._coming = None
        if self._left == 0:
            return
        self._left -= 1
        x = torch.empty(self._shape, dtype=self._dtype, device=self._device)
        work = dist.irecv(x, src=self._source, group=self._link.process_group)
        assert work is not None
        self._coming = x, work


class Outlet:
    """Sends tensors to one rank without waiting for it; each is kept until it has left."""

    def __init__(self, link: Group) -> None:
        self._link = link
        self._target = next(rank for rank in link.ranks if rank != link.ranks[link.rank])
        self._leaving: deque[tuple[Tensor, dist.Work]] = deque()

    def send(self, x: Tensor) -> None:
        while self._leaving and self._leaving[0][1].is_completed():
            self._leaving.popleft()
        x = x.detach().contiguous()
        work = dist.isend(x, dst=self._target, group=self._link.process_group)
        assert work is not None
        self._leaving.append((x, work))

    def flush(self) -> None:
        """Wait until all have left."""
        while self._leaving:
            self._leaving.popleft()[1].wait()
