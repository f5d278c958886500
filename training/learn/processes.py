"""The processes of a run, one a device, as `torchrun` starts them; without it one process alone."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, distributed


@dataclass(frozen=True)
class Processes:
    """Which process this is, of how many, and its device."""

    rank: int = 0
    count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its mean over all processes, in one exchange.

        Not DistributedDataParallel: which parameters learn changes from step to step here, which it does not allow, and
        an embedding is too small for overlapping the exchange with the backward pass to pay.
        """
        if self.count == 1:
            return
        own = list(tensors)
        flat = torch.cat([tensor.flatten() for tensor in own])
        distributed.all_reduce(flat)
        flat /= self.count
        for tensor, mean in zip(own, flat.split([tensor.numel() for tensor in own]), strict=True):  # type: ignore[no-untyped-call]
            tensor.copy_(mean.view_as(tensor))


@contextmanager
def started_processes() -> Iterator[Processes]:
    """Join the others where `torchrun` says that there are some: nccl between GPUs, gloo between CPUs."""
    has_gpu = torch.cuda.is_available()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if has_gpu else torch.device("cpu")
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Processes(device=device)
        return
    distributed.init_process_group("nccl" if has_gpu else "gloo")
    try:
        yield Processes(distributed.get_rank(), distributed.get_world_size(), device)
    finally:
        distributed.destroy_process_group()
