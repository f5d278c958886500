from types import SimpleNamespace

import pytest
import torch

from training.export.manifest import output_entry
from training.models import tasks
from training.models.tasks import CLASSIFY, TASKS, Output, Task, graph_outputs, output_tensors


def test_classification_returns_logits_and_for_adaptive_graphs_the_costs() -> None:
    task = TASKS[CLASSIFY]
    assert [output.name for output in task.outputs_of(is_adaptive=False)] == ["logits"]
    assert [output.name for output in task.outputs_of(is_adaptive=True)] == ["logits", "tokens", "gmacs"]


def test_manifest_lists_outputs_by_role() -> None:
    task = TASKS[CLASSIFY]
    assert output_entry(task.outputs_of(is_adaptive=False)) == {"name": "logits", "dtype": "float32"}
    assert output_entry(task.outputs_of(is_adaptive=True)) == {
        "name": "logits",
        "dtype": "float32",
        "tokens": "tokens",
        "gmacs": "gmacs",
    }


def test_one_entry_adds_a_task(monkeypatch: pytest.MonkeyPatch) -> None:
    masks = Task("segment", (Output("masks", role="name", dtype="float32"),))
    monkeypatch.setattr(tasks, "TASKS", {**TASKS, "segment": masks})
    module = SimpleNamespace(task="segment", is_adaptive=False)
    assert [output.name for output in graph_outputs(module)] == ["masks"]


def test_one_output_and_several_are_a_tuple() -> None:
    one = torch.zeros(2)
    assert output_tensors(one) == (one,)
    assert output_tensors([one, one]) == (one, one)
