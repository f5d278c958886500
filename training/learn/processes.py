"""The processes of a run, one a device, as `torchrun` starts them; without it one process alone."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Event
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

T = TypeVar("T")
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


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

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set in any process: the same answer in all."""
        share = torch.tensor([float(flag)], device=self.device)
        self.average([share])
        return float(share) > 0

    def from_first(self, read: Callable[[], T]) -> T:
        """Read in the first process alone and give it to all: the others may have no such file, or not yet."""
        found: list[Any] = [read() if self.is_first else None]
        if self.count > 1:
            distributed.broadcast_object_list(found, device=self.device)
        result: T = found[0]
        return result


@contextmanager
def started_processes() -> Iterator[Processes]:
    """Join the others where `torchrun` says that there are some: nccl between GPUs, gloo between CPUs.

    Raises: ValueError where there are GPUs, but fewer than processes on this machine.
    """
    device = _device(int(os.environ.get("LOCAL_RANK", "0")))
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Processes(device=device)
        return
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Processes(distributed.get_rank(), distributed.get_world_size(), device)
    finally:
        distributed.destroy_process_group()


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    n_gpus = torch.cuda.device_count()
    if local_rank >= n_gpus:
        raise ValueError(f"process {local_rank} of this machine has no GPU of its own: there are {n_gpus}")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


@contextmanager
def stop_signals() -> Iterator[Event]:
    """Set the event on Ctrl-C or SIGTERM, so that a run can end after its step; SIGQUIT still ends it at once.

    A second signal says no more than the first, since `torchrun` sends one on to processes that had it already.
    """
    event = Event()
    before = {number: signal.signal(number, lambda *_: event.set()) for number in _STOP_SIGNALS}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore_stop_signals(worker: int = 0) -> None:
    """Leave it to the process that trains when a process that reads images for it ends: a signal reaches both."""
    for number in _STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
