"""What a task consists of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from training.data.preprocessing import InputRule
from training.models.calibration import Calibration
from training.models.embedding import DecoupledEmbedding
from training.models.frozen import FrozenModule
from training.models.vit import MetricChoice
from training.tasks.measure import Measure


@dataclass(frozen=True)
class Output:
    """One output of a graph.

    name: in the graph, in golden files and in the manifest. role: its key in the manifest's
        `output`; "name" for the result of a task.
    is_exact: it must equal eager's, up to 1e-6 of its value; others are compared within a
        tolerance.
    """

    name: str
    dtype: str
    role: str = "name"
    is_exact: bool = False


TOKENS = Output("tokens", dtype="int64", role="tokens", is_exact=True)  # (B, blocks + 1)
GMACS = Output("gmacs", dtype="float32", role="gmacs", is_exact=True)  # (B,)


class Freeze(Protocol):
    """Return a model at a constant rate. Raises: ValueError where it cannot remove r tokens"""

    def __call__(
        self, model: nn.Module, rule: InputRule, r: int, /, *, metric: MetricChoice = "keys", metric_seed: int = 0
    ) -> FrozenModule: ...


FreezeAdaptive = Callable[[nn.Module, InputRule, Calibration, DecoupledEmbedding | None], FrozenModule]


@dataclass(frozen=True)
class Task:
    """What is loaded, exported and measured.

    result: the output that an export's tolerance applies to. Adaptive graphs of any task also
        return tokens and GMACs of each image.
    measure: how results are compared with labels.
    load: as `load_vit`: (architecture, weights=…, **arguments) -> timm's ViT, with the task's own
        head as its `head`.
    freeze, freeze_adaptive: wrap that model with merging, for evaluation or export. None where the
        task has no adaptive policies.
    """

    name: str
    result: Output
    measure: Measure
    load: Callable[..., nn.Module]
    freeze: Freeze
    freeze_adaptive: FreezeAdaptive | None = None

    def outputs_of(self, *, is_adaptive: bool) -> tuple[Output, ...]:
        """Return the outputs of a graph, in order."""
        return (self.result, TOKENS, GMACS) if is_adaptive else (self.result,)


def output_tensors(answer: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the outputs of a module or a graph as a tuple, whether there is one or several."""
    return (answer,) if isinstance(answer, Tensor) else tuple(answer)
