from types import SimpleNamespace
from typing import Any

import pytest
import torch

from training import tasks
from training.export.manifest import output_entry
from training.models.classifier import CLASSIFY, check_activation
from training.tasks import TASKS, find_measure, find_task, graph_outputs
from training.tasks.task import output_tensors


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


def test_manifest_names_an_activation_but_softmax() -> None:
    outputs = TASKS[CLASSIFY].outputs_of(is_adaptive=False)
    assert output_entry(outputs, "sigmoid") == {"name": "logits", "dtype": "float32", "activation": "sigmoid"}


@pytest.mark.parametrize(
    ("activation", "n_outputs", "message"),
    [("softmax", 1, "1 output, .* always 1: expected activation sigmoid"), ("tanh", 3, "'tanh': expected softmax or")],
)
def test_a_head_that_cannot_answer_is_refused_by_name(activation: str, n_outputs: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_activation(activation, n_outputs)
    check_activation("sigmoid", n_outputs)
    check_activation("softmax", 2)


def test_one_logit_is_right_on_its_side_of_a_half() -> None:
    logits, labels = torch.tensor([[-2.0], [0.1], [3.0], [-0.1]]), torch.tensor([0, 1, 0, 1])
    assert find_measure("top1").score(logits, labels).tolist() == [True, True, False, False]


def test_outputs_of_a_module_are_those_of_its_task() -> None:
    module: Any = SimpleNamespace(task=CLASSIFY, is_adaptive=False)
    assert [output.name for output in graph_outputs(module)] == ["logits"]


def test_unknown_tasks_and_measures_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tasks.TASKS, "other", TASKS[CLASSIFY])
    with pytest.raises(ValueError, match="task segment: expected one of classify, other"):
        find_task("segment")
    with pytest.raises(ValueError, match="measure miou: expected one of top1"):
        find_measure("miou")


def test_one_output_and_several_are_a_tuple() -> None:
    one = torch.zeros(2)
    assert output_tensors(one) == (one,)
    assert output_tensors([one, one]) == (one, one)
