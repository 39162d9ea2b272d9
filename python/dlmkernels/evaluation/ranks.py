# SPDX-License-Identifier: Apache-2.0
"""Communication between the processes of an evaluation, started by torchrun or accelerate."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist


class Ranks:
    """This process among those that share an evaluation, according to RANK and WORLD_SIZE in the environment."""

    def __init__(self):
        self.rank, self.world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if self.world_size > 1 and not dist.is_initialized():
            dist.init_process_group("gloo")  # only exchanges a few numbers and the answers, on the host

    def device(self, name: str) -> str:
        """Return the device of this process: with several processes, `cuda` becomes a GPU per process."""
        return f"cuda:{self.local_rank}" if name == "cuda" and self.world_size > 1 else name

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Gather the numbers of all processes, `[world_size]`."""
        mine = tensor.detach().cpu().reshape(1)
        if self.world_size == 1:
            return mine
        parts = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(parts, mine)
        return torch.cat(parts)

    def all_objects(self, mine: Any) -> list[Any]:
        """Gather the objects of all processes on every process."""
        if self.world_size == 1:
            return [mine]
        out: list[Any] = [None] * self.world_size
        dist.all_gather_object(out, mine)
        return out

    def gather_object(self, mine: Any, dst: int = 0) -> list[Any] | None:
        """Gather the objects of all processes on process `dst`. Returns None on the others."""
        if self.world_size == 1:
            return [mine]
        out: list[Any] | None = [None] * self.world_size if self.rank == dst else None
        dist.gather_object(mine, out, dst=dst)
        return out

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world_size > 1:
            dist.barrier()
