"""Tasks: what is loaded, exported and measured for each.

To add a task, add a module with its `Task`, and an entry to `TASKS`.
"""

from __future__ import annotations

from torch import nn

from training.data.preprocessing import InputRule
from training.models.calibration import Calibration
from training.models.embedding import DecoupledEmbedding
from training.models.frozen import FrozenModule
from training.tasks.classification import CLASSIFICATION
from training.tasks.measure import Measure
from training.tasks.task import Output, Task

TASKS = {task.name: task for task in (CLASSIFICATION,)}


def find_task(name: str) -> Task:
    """Return the task of that name. Raises: ValueError where there is none."""
    if name not in TASKS:
        raise ValueError(f"task {name}: expected one of {', '.join(TASKS)}")
    return TASKS[name]


def find_measure(name: str) -> Measure:
    """Return the measure of that name. Raises: ValueError where no task has it."""
    for task in TASKS.values():
        if task.measure.name == name:
            return task.measure
    raise ValueError(f"measure {name}: expected one of {', '.join(task.measure.name for task in TASKS.values())}")


def graph_outputs(module: FrozenModule) -> tuple[Output, ...]:
    """Return the outputs of a module that is exported: those of its task."""
    return find_task(module.task).outputs_of(is_adaptive=module.is_adaptive)


def frozen_calibration(
    task: Task, model: nn.Module, rule: InputRule, calibration: Calibration, embedding: DecoupledEmbedding | None
) -> FrozenModule:
    """Return a model with calibrated thresholds.

    Raises: CalibrationMismatch; ValueError where the task has no adaptive policies.
    """
    if task.freeze_adaptive is None:
        raise ValueError(f"calibration of {calibration.policy}: task {task.name} has no adaptive policies")
    return task.freeze_adaptive(model, rule, calibration, embedding)
