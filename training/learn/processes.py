"""The processes of a run, one per device, as `torchrun` starts them; without it, a single process."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Event, Thread
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, distributed

T = TypeVar("T")
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_REFUSED = 2


@dataclass(frozen=True)
class Processes:
    """This process's rank, the number of processes, and the device."""

    rank: int = 0
    count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its mean over all processes, in one all-reduce.

        DistributedDataParallel does not allow the set of trained parameters to change between
        steps, as it does here. Its overlap of communication and backward pass would save little
        with so few parameters.
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
        """Return whether the flag is set in any process. All processes get the same answer."""
        share = torch.tensor([float(flag)], device=self.device)
        self.average([share])
        return float(share) > 0

    def agreed(self, call: Callable[[], T]) -> T:
        """Call in each process; where the call fails in one of them, end all of them.

        Otherwise the others would wait for ever for the process that failed. The first process
        reports; the others exit quietly, unless the fault is their own and unexpected.
        Raises: what the call raised; ValueError with the message of another process's error;
            SystemExit
        """
        if self.count == 1:
            return call()
        result, error = None, None
        try:
            result = call()
        except Exception as err:  # noqa: BLE001 - raised below, once all processes know of it
            error = err
        if self.any(error is not None):
            messages: list[Any] = [None] * self.count
            distributed.all_gather_object(messages, None if error is None else str(error))
            if error is not None and (self.is_first or not isinstance(error, (ValueError, OSError))):
                raise error
            if self.is_first:
                raise ValueError(next(message for message in messages if message is not None))
            raise SystemExit(_REFUSED)
        return cast(T, result)

    def from_first(self, read: Callable[[], T]) -> T:
        """Read in the first process and broadcast: other processes may not have the file.

        Raises: as `agreed`.
        """
        found: list[Any] = [self.agreed(lambda: read() if self.is_first else None)]
        if self.count > 1:
            distributed.broadcast_object_list(found, device=self.device)
        result: T = found[0]
        return result


@contextmanager
def started_processes() -> Iterator[Processes]:
    """Join the process group that `torchrun` started, if any: nccl between GPUs, gloo between CPUs.

    Raises: ValueError where this machine has GPUs, but fewer than processes.
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
        raise ValueError(f"process {local_rank} of this machine has no GPU: there are {n_gpus}")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def describe_device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@contextmanager
def stop_signals() -> Iterator[Event]:
    """Set the event on Ctrl-C or SIGTERM, so that a run can end after its step.

    Further signals are ignored: `torchrun` forwards the signal to processes that already received
    it.
    """
    event = Event()
    before = {number: signal.signal(number, lambda *_: event.set()) for number in _STOP_SIGNALS}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def obey_parent_only(worker: int = 0) -> None:
    """Ignore stop signals in a data worker, except the SIGTERM of the training process itself.

    A terminal and `torchrun` signal the whole process group, and the run still needs its images
    then. But at its exit Python sends each worker SIGTERM and waits for it: a worker that ignored
    this one would keep the run alive for ever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Threads that start later inherit the mask.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    Thread(target=_end_by_parent, args=(os.getppid(),), daemon=True).start()


def _end_by_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
