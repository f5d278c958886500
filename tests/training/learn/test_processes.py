import multiprocessing
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from training.learn.processes import Processes, obey_parent_only, started_processes, stop_signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stop_signal_sets_the_event_and_handlers_are_restored(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with stop_signals() as stop:
        assert not stop.is_set()
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        assert stop.is_set()
    assert signal.getsignal(number) == before


def test_data_worker_obeys_the_stop_signals_of_its_parent_only() -> None:
    """A signal from elsewhere, as from a terminal or torchrun, leaves it running."""
    context = multiprocessing.get_context("fork")
    ready, is_asked = context.Event(), context.Event()

    def work() -> None:
        obey_parent_only()
        ready.set()
        is_asked.wait()

    worker = context.Process(target=work)
    worker.start()
    ready.wait()
    for name in ("INT", "TERM"):
        subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
    worker.join(0.3)
    assert worker.is_alive()
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 0


def failing_together(rank: int, address: str, results: Any) -> None:
    """Agree once, then fail in the second process alone."""
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    processes = Processes(rank, 2)
    outcome: list[Any] = [processes.agreed(lambda: rank)]

    def fail() -> None:
        if rank == 1:
            raise ValueError("b.png cannot be read")

    try:
        processes.agreed(fail)
    except (ValueError, SystemExit) as err:
        outcome.append(repr(err))
    results.put((rank, outcome))


def test_failure_of_one_process_ends_all_and_the_first_reports_it(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    address = f"file://{tmp_path / 'store'}"
    workers = [context.Process(target=failing_together, args=(rank, address, results)) for rank in (0, 1)]
    for worker in workers:
        worker.start()
    found = dict(results.get(timeout=60) for _ in workers)
    for worker in workers:
        worker.join(10)
    assert found == {0: [0, "ValueError('b.png cannot be read')"], 1: [1, "SystemExit(2)"]}


def test_single_process_is_the_first_and_exchanges_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with started_processes() as processes:
        assert (processes.rank, processes.count, processes.is_first) == (0, 1, True)
        assert processes.device.type == "cpu"
        tensor = torch.ones(3)
        processes.average([tensor])
        assert tensor.tolist() == [1, 1, 1]
        assert (processes.any(True), processes.any(False)) == (True, False)
        assert processes.from_first(lambda: {"a": 1}) == {"a": 1}


def test_other_processes_read_nothing_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    def receive(found: list[object], device: torch.device) -> None:
        assert found == [None]
        found[0] = "what the first read"

    monkeypatch.setattr(Processes, "any", lambda _, flag: flag)
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", receive)
    assert Processes(rank=1, count=2).from_first(lambda: pytest.fail("it read")) == "what the first read"


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with (
        pytest.raises(ValueError, match="process 2 of this machine has no GPU: there are 2"),
        started_processes(),
    ):
        pass
