"""Tasks: what the outputs of a graph are called, and how they are compared.

To add a task, add an entry to `TASKS`, and a module whose `task` names it and that returns the
outputs in that order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Output:
    """One output of a graph.

    name: in the graph, in golden files and in the manifest. role: its key in the manifest's
        `output`.
    is_exact: it must equal eager's, up to 1e-6 of its value; others are compared within a
        tolerance.
    adaptive_only: present where the number of tokens depends on the image.
    """

    name: str
    role: str
    dtype: str
    is_exact: bool = False
    adaptive_only: bool = False


@dataclass(frozen=True)
class Task:
    """The outputs of a graph. The first is the result, to which an export's tolerance applies."""

    name: str
    outputs: tuple[Output, ...]

    def outputs_of(self, *, is_adaptive: bool) -> tuple[Output, ...]:
        """Return the outputs of a graph, in order."""
        return tuple(output for output in self.outputs if is_adaptive or not output.adaptive_only)


CLASSIFY = "classify"
TASKS = {
    task.name: task
    for task in (
        Task(
            CLASSIFY,
            (
                Output("logits", role="name", dtype="float32"),  # (B, classes)
                Output("tokens", role="tokens", dtype="int64", is_exact=True, adaptive_only=True),  # (B, blocks + 1)
                Output("gmacs", role="gmacs", dtype="float32", is_exact=True, adaptive_only=True),  # (B,)
            ),
        ),
    )
}


def output_tensors(answer: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the outputs of a module or a graph as a tuple, whether there is one or several."""
    return (answer,) if isinstance(answer, Tensor) else tuple(answer)


def graph_outputs(classifier: Any) -> tuple[Output, ...]:
    """Return the outputs of a module that is exported: those of its `task`."""
    return TASKS[classifier.task].outputs_of(is_adaptive=classifier.is_adaptive)
