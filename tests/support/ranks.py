# SPDX-License-Identifier: Apache-2.0
"""A tensor-parallel head: what each of several processes does with its share of the vocabulary."""

import torch
import torch.distributed as dist

from dlmkernels import ops


def work(rank, ranks, folder):
    """Read the whole head's input from `folder`, take this rank's share of the weights, write what all say together."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks)
    try:
        given = torch.load(f"{folder}/input.pt")
        hidden, weight, options = given["hidden"], given["weight"], given["options"]
        size = -(-len(weight) // ranks) // 256 * 256
        first = rank * size
        own = weight[first:] if rank == ranks - 1 else weight[first : first + size]
        partial = ops.shard_confidence(hidden, first, weight=own, **options)
        everyone = [torch.empty_like(partial) for _ in range(ranks)]
        dist.all_gather(everyone, partial)
        torch.save(
            tuple(ops.combine_shards(torch.stack(everyone), temperature=options["temperature"])), f"{folder}/{rank}.pt"
        )
    finally:
        dist.destroy_process_group()
