import os
import signal

import pytest
import torch

from training.learn.processes import Processes, ignore_stop_signals, started_processes, stop_signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stop_signal_sets_the_event_and_handlers_are_restored(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with stop_signals() as stop:
        assert not stop.is_set()
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        assert stop.is_set()
    assert signal.getsignal(number) == before


def test_processes_that_read_images_ignore_stop_signals() -> None:
    with stop_signals() as stop:
        ignore_stop_signals()
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert not stop.is_set()


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
