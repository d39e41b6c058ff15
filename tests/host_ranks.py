"""What each of two processes of tests/test_host_group.py runs: `python host_ranks.py FOLDER BACKEND`."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FakeProcessGroup
from toys import rollout

from prime_lightning.engines.host_group import host_group, of_all_ranks, reduced, together
from prime_lightning.models.batch import Batch
from prime_lightning.sampling.ranks import balanced


def silent(common: Any, _: Any) -> Any:
    """A group that sends nothing, with the timeout that it was asked for."""
    options = FakeProcessGroup.Options()
    options._timeout = common.timeout
    return FakeProcessGroup._create_internal(common.group_rank, common.group_size, options)


def main(folder: Path, backend: str) -> None:
    """Ask the other rank for objects and counts, while the default group is of that backend."""
    rank, limit = int(os.environ["RANK"]), timedelta(seconds=77)
    dist.Backend.register_backend("silent", silent, extended_api=True, devices=["cpu"])
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group(backend, store=store, rank=rank, world_size=2, timeout=limit)
    groups = [[rollout(draw, response=[4] * length, score=s) for s in (0.0, 1.0)] for draw, length in sizes(rank)]
    batch = Batch.of_groups(groups, rank=rank, world=2)
    side = host_group()
    found = {
        "objects": of_all_ranks({"rank": rank}),
        "together": together(lambda: rank),
        "sum": reduced(torch.tensor([rank + 1.0]), "sum").item(),
        "max": reduced(torch.tensor([rank + 1.0]), "max").item(),
        "groups": sorted(set(balanced(batch).group_B.tolist())),
        "lengths": balanced(batch).response_length_B.tolist(),
        "backend": dist.get_backend(side),
        "is the default": side is dist.group.WORLD,
        "made once": side is host_group(),
        "timeout": side._get_backend(torch.device("cpu")).options._timeout == limit,
    }
    dist.destroy_process_group()
    found["ended"] = side not in dist.distributed_c10d._world.pg_map
    torch.save(found, folder / f"{backend}{rank}.pt")


def sizes(rank: int) -> list[tuple[int, int]]:
    """Draws and lengths of this rank's groups."""
    return [(rank, 30), (2 + rank, 20)] if rank == 0 else [(rank, 2), (2 + rank, 1)]


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
